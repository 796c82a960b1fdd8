"""No run of `tests/survival` shows a canary token."""

import pytest

from tests.survival import secrets_faults

CASES = dict(secrets_faults.faults())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_secret(name):
    CASES[name]()
