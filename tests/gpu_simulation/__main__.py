"""The memory of a run on a GPU, by simulation on a machine without one, beside the plan's figures.

    python -m tests.gpu_simulation --config configs/llama3-8b-a100.yaml
    python -m tests.gpu_simulation --all      # the cases below: a minute each

It needs the CUDA build of torch that requirements.txt pins (several GB; no GPU) and a C compiler:

    python -m venv /var/tmp/cuda-torch
    /var/tmp/cuda-torch/bin/pip install -r requirements.txt -r requirements-dev.txt

The run's own model set-up, trainer, optimiser and two steps of two micro-batches go through torch's
FakeTensors on `cuda:0`, with a stand-in for the CUDA runtime; each live storage is counted as
torch's allocator would. Not in it: fragmentation, the libraries' own buffers (cuBLAS: 8 MB), the
CUDA context, loading, generation and merging. Exit code 1 if a plan is off by more than a
twentieth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tests.gpu_simulation.runtime import Card, environment, why_not

ROOT = Path(__file__).resolve().parents[2]
A100, SMALL, RANK416 = (f"configs/llama3-8b-{n}.yaml" for n in ("a100", "24gb", "a100-rank416"))
TRL = {"prefix_sharing": False}
AGAIN = {"per_device_train_batch_size": 8, "activation_checkpointing": True}
# GB that the simulation gave for the reference pass and for a step, for pairs of the plan's worst
# lengths. `tests/test_plan.py` holds the plan against these where the simulation cannot run.
PEAKS = [
    (A100, {}, 6.73, 48.24),
    (RANK416, {}, 21.98, 45.30),
    (SMALL, {}, 5.93, 6.43),
    (A100, AGAIN, 7.53, 12.92),
    (A100, TRL, 55.56, 55.23),
    (SMALL, TRL, 6.36, 6.53),
    (A100, {"bf16": False}, 6.73, 70.10),
    (A100, {"lora_target_modules": ["q_proj", "v_proj"]}, 6.21, 38.00),
]
CARDS = {SMALL: Card(gib=24, minor=9, processors=128)}  # an RTX 4090; the others are for an A100
ALLOWED = 0.05


class SimulationError(Exception):
    """The simulation cannot run here, or broke off."""


def simulate(config: str, overrides: dict | None = None) -> dict[str, tuple[float, float]]:
    """Simulate one config in a process of its own: by phase, (simulated, planned) GB.

    Raises:
        SimulationError: something that it needs is not here, or it failed; the message says what.
    """
    if reason := why_not():
        raise SimulationError(reason)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_simulation.step", json.dumps([config, overrides or {}])],
        cwd=ROOT, capture_output=True, text=True, env=environment(CARDS.get(config, Card())),
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SimulationError(f"{config}: {reason}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: (found["simulated"][name], found["planned"][name]) for name in found["simulated"]}


def off(simulated: float, planned: float) -> float:
    """By how much the plan is over (under, if negative) the simulation, as a share of it."""
    return planned / simulated - 1


def line(config: str, overrides: dict, found: dict[str, tuple[float, float]]) -> str:
    """A row of a Markdown table."""
    words = " ".join([Path(config).stem, *(f"{k}={v}" for k, v in overrides.items())])
    figures = (f"{gb:.2f}" for phase in ("reference", "step") for gb in found[phase])
    return f"| {words} | {' | '.join(figures)} | {off(*found['step']):+.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_simulation", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--config", default=A100, help="the run's YAML file")
    add("--set", default="{}", type=json.loads, metavar="JSON", help="values of the config")
    add("--all", action="store_true", help="the cases of the documentation instead")
    options = parser.parse_args()
    worst = 0.0
    print("| config | reference | plan | step | plan | off |\n|---|---|---|---|---|---|")
    cases = [case[:2] for case in PEAKS] if options.all else [(options.config, options.set)]
    for config, overrides in cases:
        try:
            found = simulate(config, overrides)
        except SimulationError as error:
            sys.exit(f"error: {error}")
        print(line(config, overrides, found), flush=True)
        worst = max(worst, *(abs(off(*pair)) for pair in found.values()))
    print(f"\nthe plan is off by at most {worst:.1%}")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
