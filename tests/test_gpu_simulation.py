"""The plan's memory of an 8B run on a GPU, against the simulation of the run itself."""

import subprocess
import sys

import pytest

from tests.gpu_simulation.__main__ import (
    A100,
    ALLOWED,
    PEAKS,
    SimulationError,
    off,
    simulate,
)
from tests.gpu_simulation.runtime import Card, environment, why_not

needs_it = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@pytest.mark.skipif(why_not() is None, reason="the simulation can run here")
def test_where_it_cannot_run_it_says_what_is_missing():
    with pytest.raises(SimulationError, match="the GPU simulation needs"):
        simulate(A100)


@needs_it
def test_the_stand_in_is_the_card_that_it_is_told_to_be():
    code = "import torch; p = torch.cuda.get_device_properties(0); "
    code += "print(torch.cuda.device_count(), p.major, p.minor, p.total_memory, "
    code += "p.multi_processor_count, torch.cuda.is_bf16_supported(including_emulation=False))"
    card = Card(gib=24, major=7, minor=5, processors=40)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(card), capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "7", "5", str(24 * 1024**3), "40", "False"], done.stderr


@needs_it
def test_what_cannot_be_simulated_is_one_line():
    with pytest.raises(SimulationError, match=f"^{A100}: not simulated: .*set it to false"):
        simulate(A100, {"precompute_ref_log_probs": True})


@needs_it
@pytest.mark.parametrize(
    ("config", "overrides", "reference", "step"),
    [pytest.param(*case, marks=[pytest.mark.slow] if n else []) for n, case in enumerate(PEAKS)],
)
def test_the_simulation_gives_the_committed_peaks_and_the_plan_is_near(
    config, overrides, reference, step
):
    found = simulate(config, overrides)
    assert found["reference"][0] == pytest.approx(reference, rel=0.005)
    assert found["step"][0] == pytest.approx(step, rel=0.005)
    assert all(abs(off(*pair)) <= ALLOWED for pair in found.values()), found
