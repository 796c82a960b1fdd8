"""The parts of an acceptance run: each runs the project's own commands and returns rows."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from scripts.acceptance.budget import Budget, PartError
from scripts.acceptance.report import Row

NO_GPU = "no GPU here"
SIMULATED_OFF, MEASURED_OFF = 0.05, 0.10  # by how much a plan may be off


@dataclass
class Context:
    """What every part is given."""

    config: str
    given: dict  # the config's overrides from the command line
    folder: Path
    budget: Budget
    cuda: bool
    cuda_build: bool
    model: dict = field(default_factory=dict)  # overrides that say which model and data
    note: str = ""

    def job(self, name: str, *arguments, most: float = 600) -> dict:
        """A function of `jobs.py` in a process of its own."""
        call = ["-m", "scripts.acceptance.jobs", json.dumps([name, *arguments])]
        said = self.budget.run(call, self.folder / "logs" / f"{name}.log", most)
        return json.loads(said.strip().splitlines()[-1])

    def command(self, part: str, *arguments: str, most: float, codes=(0,)) -> str:
        """One of the project's own commands."""
        return self.budget.run(
            ["-m", *arguments], self.folder / "logs" / f"{part}.log", most, codes
        )

    def settings(self, **more) -> list[str]:
        """The overrides as options."""
        values = self.given | self.model | more
        return [part for k, v in values.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def prepare(run: Context) -> list[Row]:
    """Find the model and the data, or make a stand-in of the same shapes."""
    most = 420 if run.cuda else 120
    folder = str((run.folder / "model").resolve())
    found = run.job("prepare", run.config, run.given, folder, run.cuda, most=most)
    run.model, run.note = found["overrides"], found["note"]
    return [Row("prepare", "model and data", "measured", run.note)]


def gpu_tests(run: Context) -> list[Row]:
    """The tests that are marked for a GPU; without one, the GPU's head in Triton's interpreter."""
    part = "tests"
    if run.cuda:
        said = run.command(part, "pytest", "-q", "-m", "gpu", most=300, codes=(0, 1))
        counts = outcomes(said)
        bad = counts["failed"] + counts["error"] + counts["skipped"]
        met = counts["passed"] > 0 and not bad
        return [Row(part, "GPU-marked tests", "measured", told(counts), met=met)]
    rows = [Row(part, "GPU-marked tests", "open", note=NO_GPU)]
    said = run.command(part, "pytest", "-q", "tests/test_triton_head.py", most=180, codes=(0, 1))
    counts, name = outcomes(said), "TRL's Triton head in the interpreter"
    if counts["skipped"]:
        return [*rows, Row(part, name, "open", note="triton is not installed")]
    return [*rows, Row(part, name, "simulated", told(counts), met=counts["passed"] == 1)]


def outcomes(said: str) -> dict[str, int]:
    """How many tests passed, failed and so on, from pytest's last line."""
    last = (said.strip().splitlines() or [""])[-1]
    found = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {word: found.get(word, 0) for word in ("passed", "failed", "skipped", "error")}


def told(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {word}" for word, n in counts.items() if n)


def simulation(run: Context) -> list[Row]:
    """The 8B memory by simulation, where there is the CUDA build of torch and no GPU."""
    part, name = "simulation", "memory of an 8B step"
    if run.cuda:
        return []
    config = run.config if "llama3-8b" in run.config else "configs/llama3-8b-a100-short.yaml"
    if not run.cuda_build:
        return [Row(part, name, "open", note="needs the CUDA build of torch")]
    file = run.folder / "simulation.json"
    call = ("tests.gpu_simulation", "--config", config, "--json", str(file.resolve()))
    try:
        run.command(part, *call, most=300, codes=(0, 1))
        found = json.loads(file.read_text())[0]
    except (PartError, FileNotFoundError) as error:
        return [Row(part, name, "open", note=str(error))]
    rows = []
    for phase, parts in found["compared"].items():
        simulated, planned = parts["all"]
        note = f"plan {planned:.2f} GB, {planned / simulated - 1:+.1%}; {Path(config).stem}"
        met = abs(planned / simulated - 1) <= SIMULATED_OFF
        rows.append(Row(part, f"8B {phase}", "simulated", simulated, "GB", met, note))
    return rows


def plan(run: Context) -> list[Row]:
    """Plan against measured: two steps of the longest pairs."""
    part = "plan"
    shorter = {} if run.cuda else {"max_length": 96, "per_device_train_batch_size": 2}
    overrides = run.given | run.model | shorter
    found = run.job("plan_against_measured", run.config, overrides, most=300)
    off = found["planned"] / found["measured"] - 1
    lengths = "/".join(map(str, found["lengths"]))
    note = f"plan {found['planned']:.2f} GB, {off:+.1%}; pairs of {lengths}"
    rows = [] if run.cuda else [Row(part, "peak of an 8B step", "open", note=NO_GPU)]
    name = "peak of a step, paged memory included" if run.cuda else "peak of a tiny step, process"
    # A tiny model's step is mostly the process itself: `scripts.plan validate` is a CPU's test.
    met = abs(off) <= MEASURED_OFF if run.cuda else None
    rows.append(Row(part, name, "measured", found["measured"], "GB", met, note))
    if run.cuda:
        rows.append(Row(part, "of it paged", "measured", found["paged"], "GB"))
    return [*rows, Row(part, "seconds of two steps", "measured", found["seconds"], "s")]


def benchmark(run: Context) -> list[Row]:
    """A step against TRL's own trainer."""
    part = "benchmark"
    case = "256/768/768x2" if run.cuda else "32/16/24x2"
    call = ["--cases", case, "--repeats", "1", "--formats", "nf4", "--no-growth"]
    call += ["--config", run.config, "--output-dir", str(run.folder / "benchmark")]
    run.command(part, "scripts.benchmark", *call, *run.settings(), most=420)
    saved = json.loads((run.folder / "benchmark" / "benchmark.json").read_text())
    found = saved["cases"][f"nf4 {case}"]
    rows = [] if run.cuda else [Row(part, "8B against TRL", "open", note=NO_GPU)]
    best = {}
    for name, runs in found.items():
        failed = [one["error"] for one in runs if "error" in one]
        if failed:
            return [*rows, Row(part, f"{name}, {case}", "open", met=False, note=failed[0])]
        for key, what, unit in (
            ("pairs_per_second", "pairs", "1/s"),
            ("peak_gb", "peak memory", "GB"),
            ("share_of_limit", "share of the matmul limit", ""),
        ):
            best[key, name] = float(median(one[key] for one in runs))
            rows.append(Row(part, f"{name}, {case}: {what}", "measured", best[key, name], unit))
    for key, name in (("pairs_per_second", "speed"), ("peak_gb", "memory")):
        ratio = best[key, "shared"] / best[key, "trl"]
        met = (ratio > 1 if name == "speed" else ratio < 1) if run.cuda else None
        rows.append(Row(part, f"{name}, shared to TRL", "measured", ratio, "times", met))
    return rows


def end_to_end(run: Context) -> list[Row]:
    """The notebook from top to bottom, with few prompts and short replies."""
    part = "end to end"
    few = {"report_to": "none", "eval_prompts": 16, "max_new_tokens": 256}
    if not run.cuda:
        few |= {"eval_prompts": 2, "max_new_tokens": 8, "max_steps": 3, "train_samples": 24}
        few |= {"eval_samples": 4, "loss_type": ["sigmoid"], "loss_weights": None}
    folder = run.folder / "run"
    call = ["--config", run.config, "--output-dir", str(folder.resolve()), "--overwrite"]
    call += run.settings(**few)
    said = run.command(part, "scripts.run", *call, most=1000)
    minutes = float(re.findall(r"Done in ([\d.]+) minutes", said)[-1])
    rows = [] if run.cuda else [Row(part, "the short 8B config", "open", note=NO_GPU)]
    rows.append(Row(part, "the notebook, every cell", "measured", minutes, "min", True, run.note))
    rows += training_rows(part, folder) + memory_rows(part, folder)
    figures = json.loads((folder / "evaluation.json").read_text())
    return rows + evaluation_rows(part, figures)


def training_rows(part: str, folder: Path) -> list[Row]:
    """The first loss, which is ln 2 as long as policy and reference agree, and the last."""
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    first = abs(losses[0] - math.log(2)) < 0.01
    return [
        Row(part, "loss of the first step", "measured", losses[0], "nats", first, "ln 2 = 0.693"),
        Row(part, f"loss of log {len(losses)}, the last", "measured", losses[-1], "nats",
            math.isfinite(losses[-1])),
    ]  # fmt: skip


def memory_rows(part: str, folder: Path) -> list[Row]:
    """The notebook's own record of memory: the peak of each phase."""
    peaks: dict[str, float] = {}
    with (folder / "memory.csv").open() as file:
        for row in csv.DictReader(file):
            peaks[row["phase"]] = max(peaks.get(row["phase"], 0.0), float(row["gb"]))
    return [Row(part, f"peak of {phase}", "measured", gb, "GB") for phase, gb in peaks.items()]


def evaluation_rows(part: str, figures: dict) -> list[Row]:
    """Before and after, as `evaluation.json` has it; the interval of a change in the note."""
    rows = [Row(part, "prompts evaluated", "measured", figures["prompts"])]
    for measure, sides in figures["measures"].items():
        for side, found in sides.items():
            note = f"[{found['low']:.3g}, {found['high']:.3g}]"
            rows.append(Row(part, f"{measure}, {side}", "measured", found["mean"], note=note))
    for name in ("reward_accuracy", "reward_margin"):
        rows.append(Row(part, name.replace("_", " "), "measured", figures[name]["mean"]))
    return rows


# In this order: what a GPU alone can tell comes before what takes long.
PARTS = {
    "prepare": prepare,
    "plan": plan,
    "tests": gpu_tests,
    "simulation": simulation,
    "benchmark": benchmark,
    "end to end": end_to_end,
}


def facts(folder: Path, budget: Budget) -> dict:
    """What machine this is, from a process that may import torch."""
    call = ["-m", "scripts.acceptance.jobs", json.dumps(["facts"])]
    return json.loads(budget.run(call, folder / "logs" / "facts.log", 120).strip().splitlines()[-1])
