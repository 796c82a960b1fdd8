"""The plan's memory of an 8B run on a GPU, against the simulation of the run itself."""

import subprocess
import sys

import pytest

from tests.gpu_simulation.__main__ import (
    A100,
    ALLOWED,
    CASES,
    SimulationError,
    compare,
    off,
    simulate,
    summary,
    table,
)
from tests.gpu_simulation.runtime import Card, environment, why_not

needs_it = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def found(**parts) -> dict:
    """A result with these (simulated, planned) activations."""
    plan = {"linear layers": 3.0, "embeddings, norms, head": 2.0, "adapter": 0.5}
    phases = {}
    for name, (simulated, planned) in parts.items():
        own = {"model": 5.0, "adapter": 0.5, "gradients": 0.25, "paged": 1.0, "optimiser": 0.5}
        own |= {"activations": simulated - 0.1, "workspace": 0.1}
        phases[name] = ({"parts": own}, plan | {"activations": planned, "logits chunk": 0.1})
    phases["step"][1].update({"gradients": 0.25, "optimiser": 1.5})
    return {
        "phases": {name: own for name, (own, _) in phases.items()},
        "plan": {name: plan for name, (_, plan) in phases.items()},
    }


def test_parts_are_compared_by_what_the_plan_has_in_a_phase():
    compared = compare(found(reference=(1.0, 0.9), step=(2.0, 2.9)))
    assert "gradients" not in compared["reference"]  # the plan has none there
    assert compared["reference"]["all"] == pytest.approx((6.5, 6.5))
    assert compared["step"]["optimiser"] == (1.5, 1.5)  # paged memory and all
    assert compared["step"]["all"] == pytest.approx((9.25, 10.25))
    assert off(*compared["step"]["all"]) == pytest.approx(1 / 9.25)


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
@pytest.mark.parametrize(
    ("override", "instead"),
    [("prefix_attention=flex", "set segments"), ("precompute_ref_log_probs=true", "set it to fal")],
)
def test_what_cannot_be_simulated_is_one_line(override, instead):
    with pytest.raises(SimulationError, match=f"^{A100}: not simulated: .*{instead}"):
        simulate(A100, [override])


@pytest.fixture(scope="module")
def simulated():
    """Simulates a case of `CASES` once: under a minute each."""
    kept = {}

    def once(number: int) -> dict:
        if number not in kept:
            kept[number] = simulate(*CASES[number])
            print(table(kept[number]))
        return kept[number]

    return once


@needs_it
@pytest.mark.parametrize("phase", ["reference", "step"])
@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.slow] if n else []) for n in range(len(CASES))]
)
def test_the_plan_is_near_the_simulation(simulated, number, phase):
    result = simulated(number)
    parts = result["compared"][phase]
    assert off(*parts["weights"]) == pytest.approx(0, abs=1e-3)
    assert off(*parts["adapter"]) == pytest.approx(0, abs=1e-3)
    assert abs(off(*parts["all"])) <= ALLOWED, table(result)


@needs_it
def test_what_the_step_needs_is_told_by_part(simulated):
    """Of the A100 config: the parts that nothing but the run itself could have told."""
    result = simulated(0)
    step = result["phases"]["step"]
    assert result["adapter dtype"] == ["float32"]
    # bitsandbytes pages a moment of 100,000 numbers or more: down's A, gate's and up's B.
    paged = 32 * 8 * 3 * 14336 * 16 / 1024**3
    assert result["paged"] == pytest.approx(paged, rel=1e-3)
    unpaged = 8 * 41_943_040 / 1024**3 - paged
    assert step["parts"]["optimiser"] == pytest.approx(unpaged, rel=0.01)
    assert step["peak"] == pytest.approx(sum(step["parts"].values()) - result["paged"])
    # One checkpoint a layer, 2 bytes a number: 2 pairs, the last token of an answer predicts none.
    checkpoints = 31 * 2 * (1792 - 1) * 4096 * 2 / 1024**3
    held = {what: size for what, _, size in step["largest"]}
    assert held["[activations] aten::add.Tensor 1x3582x4096 bfloat16"] >= checkpoints * 0.999
    assert "| llama3-8b-a100; 2 x 256/768/768" in summary([result])
