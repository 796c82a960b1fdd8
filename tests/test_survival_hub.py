"""Every fault of the hub in `tests/survival` is survived."""

import pytest

from tests.survival import hub_faults

CASES = dict(hub_faults.faults())


@pytest.mark.parametrize("name", CASES)
def test_hub_fault(name):
    CASES[name]()
