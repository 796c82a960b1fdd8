"""Every bad input of `tests/survival` is refused, and what hypothesis makes up beside them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.base import InputError
from scripts.config import load_config, parse_overrides
from tests.survival import bad_input_faults

CASES = dict(bad_input_faults.processless())
PROCESSES = {k: v for k, v in bad_input_faults.faults() if k not in CASES}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    CASES[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_bad_input_of_a_command(name):
    PROCESSES[name]()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=30))
def test_any_override_is_taken_or_refused_in_one_line(text):
    try:
        load_config(bad_input_faults.DEFAULT, parse_overrides([text]))
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode()))
def test_any_file_is_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:  # none of them names a model
        load_config(path)
    assert "\n" not in str(refused.value)
