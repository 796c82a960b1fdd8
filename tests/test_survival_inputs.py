"""Every bad input of `tests/survival` is refused, and what hypothesis makes up beside them."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.base import InputError
from scripts.config import HINTS, load_config, parse_overrides
from tests.survival import bad_input_faults

CASES = dict(bad_input_faults.processless())
PROCESSES = {k: v for k, v in bad_input_faults.faults() if k not in CASES}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    CASES[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_bad_input_of_a_command(name):
    PROCESSES[name]()


@settings(max_examples=100, deadline=2000, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from(sorted(HINTS)), value=VALUES)
def test_any_value_is_taken_or_refused_in_one_line(key, value):
    try:
        cfg = load_config(bad_input_faults.DEFAULT, {key: value})
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 900
        assert key in str(error)
    else:
        taken = cfg.given[key]
        assert not isinstance(taken, float) or math.isfinite(taken)
        assert cfg.dpo.beta > 0


@settings(max_examples=60, deadline=2000, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=30))
def test_any_override_is_taken_or_refused_in_one_line(text):
    try:
        load_config(bad_input_faults.DEFAULT, parse_overrides([text]))
    except InputError as error:
        assert "\n" not in str(error)


@settings(max_examples=60, deadline=2000, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode()))
def test_any_file_is_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:  # none of them names a model
        load_config(path)
    assert "\n" not in str(refused.value)
