"""The memory of a run on a GPU, by simulation on a machine without one, beside the plan's figures.

    python -m tests.gpu_simulation --config configs/llama3-8b-a100.yaml
    python -m tests.gpu_simulation --all      # every 8B config, TRL's own way, planned defaults

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
CARDS = {
    "A100": Card(),
    "A100-40": Card(gib=40),
    "RTX 4090": Card(gib=24, minor=9, processors=128),
    "H100": Card(major=9, processors=132),
}
TRL = ["prefix_sharing=false"]
SOME = ["lora_target_modules=[q_proj, v_proj]"]
BATCH2 = ["per_device_train_batch_size=2", "activation_checkpointing=true"]
BATCH8 = ["per_device_train_batch_size=8", "activation_checkpointing=true"]
# config, overrides, card
CASES = [
    (A100, [], "A100"),
    ("configs/llama3-8b-a100-short.yaml", [], "A100"),
    (SMALL, [], "RTX 4090"),
    (RANK416, [], "A100"),
    (A100, TRL, "A100"),
    (SMALL, TRL, "RTX 4090"),
    (RANK416, TRL, "A100"),
    (A100, BATCH2, "A100-40"),
    (A100, BATCH8, "A100-40"),
    (A100, ["bf16=false"], "A100"),
    (A100, SOME, "A100"),
    (A100, SOME + TRL, "A100"),
]
ALLOWED = 0.05
# The parts of both, where simulation and plan do not divide alike.
WEIGHTS = ("weights", "reference model")
PASSING = ("activations", "passing", "logits")


class SimulationError(Exception):
    """The simulation cannot run here, or broke off."""


def simulate(
    config: str, overrides: list[str] = (), card: str = "A100",
    lengths: tuple[int, int, int] | None = None, top: int = 8,
) -> dict:  # fmt: skip
    """Simulate one config in a process of its own; `step.result` says what comes back.

    Raises:
        SimulationError: something that it needs is not here, or it failed; the message says what.
    """
    if reason := why_not():
        raise SimulationError(reason)
    case = {"config": config, "overrides": list(overrides), "card": card}
    case |= {"lengths": lengths, "top": top}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_simulation.step", json.dumps(case)],
        cwd=ROOT, capture_output=True, text=True, env=environment(CARDS[card]),
    )  # fmt: skip
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SimulationError(f"{config}: {reason}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {"compared": compare(found)}


def compare(found: dict) -> dict[str, dict[str, tuple[float, float]]]:
    """By phase and part: (simulated, planned) in GB. Paged moments count as the optimiser's here,
    and `all` has what the plan has in that phase."""
    phases = {}
    for name in ("reference", "step"):
        plan, parts = found["plan"][name], found["phases"][name]["parts"]
        simulated = {
            "weights": parts["model"] + parts.get("reference model", 0),
            "adapter": parts["adapter"],
            "gradients": parts.get("gradients", 0),
            "optimiser": parts.get("optimiser", 0) + parts.get("paged", 0),
            "activations": parts.get("activations", 0) + parts.get("workspace", 0),
        }
        planned = {
            "weights": sum(plan.get(part, 0) for part in WEIGHTS),
            "adapter": plan["adapter"],
            "gradients": plan.get("gradients", 0),
            "optimiser": plan.get("optimiser", 0) + plan.get("optimiser, paged", 0),
            "activations": sum(plan.get(part, 0) for part in PASSING),
        }
        both = {part: (simulated[part], planned[part]) for part in planned if planned[part]}
        both["all"] = tuple(map(sum, zip(*both.values(), strict=True)))
        phases[name] = both
    return phases


def off(simulated: float, planned: float) -> float:
    """By how much the plan is over (under, if negative) the simulation, as a share of it."""
    return planned / simulated - 1


def name_of(found: dict) -> str:
    """The case in a line."""
    case = found["case"]
    words = [Path(case["config"]).stem, *case["overrides"]]
    lengths = "/".join(map(str, found["lengths"]))
    types = ", ".join(found["adapter dtype"])
    return f"{' '.join(words)}; {found['pairs']} x {lengths}, adapter {types}, {case['card']}"


def table(found: dict) -> str:
    """Simulated and planned GB by phase and part, then the largest tensors at the step's peak."""
    lines = [name_of(found), f"  {'':<12}{'':<13}{'simulated':>10}{'plan':>9}{'off':>7}"]
    for phase, parts in found["compared"].items():
        for part, (simulated, planned) in parts.items():
            share = f"{off(simulated, planned):+.1%}" if simulated else ""
            lines.append(f"  {phase:<12}{part:<13}{simulated:10.3f}{planned:9.3f}{share:>7}")
    lines.append("  peak in torch's own count, of paged memory:")
    for phase in ("reference", "step", "optimiser"):
        lines.append(f"  {phase:<25}{found['phases'][phase]['peak']:10.3f}")
    lines.append(f"  {'paged, not in it':<25}{found['paged']:10.3f}")
    lines.append("  the largest at the step's peak:")
    for what, count, size in found["phases"]["step"]["largest"]:
        lines.append(f"  {size:10.3f}  {count:4} x {what}")
    return "\n".join(lines)


def summary(results: list[dict]) -> str:
    """One line a case, in Markdown: as the README tells it."""
    lines = ["| config | reference | plan | step | plan | off |", "|---|---|---|---|---|---|"]
    for found in results:
        reference, step = (found["compared"][phase]["all"] for phase in ("reference", "step"))
        figures = (f"{x:.2f}" for x in (*reference, *step))
        lines.append(f"| {name_of(found)} | {' | '.join(figures)} | {off(*step):+.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_simulation", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", default=A100, help="the run's YAML file")
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="replace a value of the config; may be repeated")  # fmt: skip
    add("--lengths", metavar="P/C/R", help="tokens of each pair (default: the plan's worst)")
    add("--card", choices=list(CARDS), default="A100", help="the GPU to be")
    add("--top", type=int, default=8, help="how many of the largest tensors to list")
    add("--all", action="store_true", help="the README's cases instead")
    add("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    lengths = options.lengths and tuple(map(int, options.lengths.split("/")))
    one = (options.config, options.overrides, options.card)
    results = []
    try:
        for case in CASES if options.all else [one]:
            results.append(simulate(*case, lengths=lengths, top=options.top))
            print(f"{table(results[-1])}\n", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    except SimulationError as error:
        sys.exit(f"error: {error}")
    print(summary(results))
    worst = max(
        abs(off(*parts["all"])) for found in results for parts in found["compared"].values()
    )
    print(f"\nthe plan is off by at most {worst:.1%}")
    sys.exit(worst > ALLOWED)


if __name__ == "__main__":
    main()
