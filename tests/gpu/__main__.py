"""What a machine with a GPU can measure of this project's claims, in one report.

    python -m tests.gpu                         # twenty minutes on an A100
    python -m tests.gpu --parts plan benchmark  # these alone

Parts: the plan against two measured steps, the GPU-marked tests, the benchmark against TRL's
trainer, and the notebook with the short 8B config from end to end. The model has random weights of
the config's shapes unless `--model` names one. Without a GPU the same parts run on a tiny Llama,
which only shows that they run. `report.json` and `report.md` are written after every figure; a part
that fails does not stop the others. Exit code 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from scripts.base import DEFAULT_CONFIG, ROOT, RecipeError, write_whole

GPU_CONFIG = "configs/llama3-8b-a100-short.yaml"
OFF = 0.1  # by how much the plan may be off


@dataclass
class GpuCheck:
    """Where to run what, for how long, and what was found so far."""

    folder: Path
    ends: float  # time.monotonic()
    config: str = DEFAULT_CONFIG
    machine: dict = field(default_factory=dict)
    model: str = ""
    rows: list[dict] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.machine.get("cuda", False)

    def add(self, part: str, what: str, value, unit: str = "", met: bool | None = None, note=""):
        """A row of the report. `met` is None where there is nothing to meet."""
        value = round(value, 4) if isinstance(value, float) else value
        row = {"part": part, "what": what, "value": value, "unit": unit, "met": met, "note": note}
        self.rows.append(row)
        mark = {None: " ", True: "+", False: "!"}[met]
        print(f"{mark} {part}: {what}: {value} {unit} {note}", flush=True)
        write_whole(self.folder / "report.json", json.dumps(vars(self), default=str, indent=1))
        write_whole(self.folder / "report.md", self.page())

    def page(self) -> str:
        """The report as Markdown."""
        lines = ["# GPU check", "", *(f"- {k}: {v}" for k, v in self.machine.items()), ""]
        lines += ["| part | what | value | met | note |", "|---|---|---|---|---|"]
        met = {None: "", True: "yes", False: "**no**"}
        for row in self.rows:
            cells = (row["part"], row["what"], f"{row['value']} {row['unit']}", met[row["met"]],
                     row["note"])  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines) + "\n"

    def python(self, log: str, *arguments: str, most: float = 3600, codes=(0,)) -> str:
        """What `python arguments` prints, which also goes to `log` as it comes.

        Raises:
            RecipeError: it took longer than `most` seconds or than is left, and was stopped with
                all that it started; or it ended with an exit code that is not in `codes`.
        """
        limit = min(most, self.ends - time.monotonic())
        if limit < 1:
            raise RecipeError("not begun: the time was used up")
        path = self.folder / f"{log}.log"
        with path.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise RecipeError(f"stopped after {limit:.0f} s (more in {path.name})") from None
            finally:
                if process.poll() is None:  # also when this program is interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said = path.read_text(errors="replace")
        if code not in codes:
            last = (said.strip().splitlines() or ["no output"])[-1]
            raise RecipeError(f"exit code {code}: {last[:200]} (more in {path.name})")
        return said

    def measured(self, name: str, *arguments, most: float = 600) -> dict:
        """A function of `measured.py`, in a process of its own."""
        call = json.dumps([name, *arguments])
        said = self.python(name, "-m", "tests.gpu.measured", call, most=most)
        return json.loads(said.strip().splitlines()[-1])

    def settings(self, **more) -> list[str]:
        """The model and more, as options of a command."""
        values = {"model_name_or_path": self.model, "report_to": "none"} | more
        return [part for k, v in values.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def plan(check: GpuCheck) -> None:
    """The plan's step beside a measured one."""
    values = {"model_name_or_path": check.model, "output_dir": str(check.folder / "run")}
    found = check.measured("plan_against_measured", check.config, values)
    off = found["planned"] / found["measured"] - 1
    note = f"planned {found['planned']:.2f} GB ({off:+.1%}), pairs of {found['lengths']}"
    # A tiny model's process is mostly libraries, which the plan only estimates.
    met = abs(off) <= OFF if check.cuda else None
    check.add("plan", "peak of a step", found["measured"], "GB", met, note)
    first = abs(found["loss"] - math.log(2))
    check.add("plan", "first loss, off ln 2", first, "nats", first < 0.01)


def tests(check: GpuCheck) -> None:
    """The tests that are marked for a GPU; without one, TRL's Triton head in the interpreter."""
    what = ("-m", "gpu") if check.cuda else ("tests/test_triton_head.py",)
    said = check.python("tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", *what, most=300,
                        codes=(0, 1))  # fmt: skip
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", said.strip().splitlines()[-1])
    bad = [word for _, word in counts if word != "passed"]
    met = bool(counts) and (not bad if check.cuda else "failed" not in bad)
    check.add("tests", " ".join(what), ", ".join(map(" ".join, counts)), met=met)


def benchmark(check: GpuCheck) -> None:
    """A step against TRL's own trainer, with the fastest attention that it has here."""
    case = "256/768/768x2" if check.cuda else "32/16/24x2"
    folder = check.folder / "benchmark"
    call = ["--cases", case, "--repeats", "1", "--formats", "nf4", "--no-growth"]
    call += ["--config", check.config, "--output-dir", str(folder), *check.settings()]
    check.python("benchmark", "-m", "scripts.benchmark", *call, most=420)
    row = json.loads((folder / "benchmark.json").read_text())["table"][f"nf4 {case}"]
    for name in ("trl", "shared"):
        for key, unit in (("pairs_per_second", "1/s"), ("peak_gb", "GB"), ("share_of_limit", "")):
            check.add("benchmark", f"{name}, {case}: {key}", row[f"{key} {name}"], unit)
    check.add("benchmark", "speed, shared to TRL", row["speed"],
              met=row["speed"] > 1 if check.cuda else None)  # fmt: skip
    check.add("benchmark", "memory, shared to TRL", row["memory"],
              met=row["memory"] < 1 if check.cuda else None)  # fmt: skip


def end_to_end(check: GpuCheck) -> None:
    """The notebook from top to bottom, with few prompts and short replies."""
    part, folder = "end to end", check.folder / "run"
    few = {"eval_prompts": 16, "max_new_tokens": 256, "dataset_name": "data/concise",
           "dataset_format": "auto"}  # fmt: skip
    if not check.cuda:
        few |= {"eval_prompts": 2, "max_new_tokens": 8, "max_steps": 3, "train_samples": 24}
        few |= {"eval_samples": 4, "loss_type": ["sigmoid"], "loss_weights": None}
    call = ["--config", check.config, "--output-dir", str(folder), "--overwrite"]
    said = check.python("run", "-m", "scripts.run", *call, *check.settings(**few), most=1000)
    minutes = float(re.findall(r"Done in ([\d.]+) minutes", said)[-1])
    check.add(part, "the notebook, every cell", minutes, "min", True)
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [log["loss"] for log in logs if "loss" in log][-1]
    check.add(part, "last loss", last, "nats", math.isfinite(last))
    peaks: dict[str, float] = {}
    with (folder / "memory.csv").open() as file:
        for row in csv.DictReader(file):
            peaks[row["phase"]] = max(peaks.get(row["phase"], 0.0), float(row["gb"]))
    for phase, gb in peaks.items():
        check.add(part, f"peak of {phase}", gb, "GB")


PARTS = {"plan": plan, "tests": tests, "benchmark": benchmark, "end-to-end": end_to_end}


def run_part(name: str, check: GpuCheck) -> None:
    """One part; that it failed, and why, is a row too."""
    started = time.monotonic()
    try:
        PARTS[name](check)
    except RecipeError as error:
        check.add(name, "the part", "failed", met=False, note=str(error))
    except Exception:  # what a part reads may have any shape; the other parts matter more
        last = traceback.format_exc().strip().splitlines()[-1]
        check.add(name, "the part", "failed", met=False, note=last[:200])
    check.add(name, "took", time.monotonic() - started, "s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", help=f"default: {GPU_CONFIG} on a GPU, else {DEFAULT_CONFIG}")
    add("--model", help="its name on the hub or a folder (default: random weights)")
    add("--minutes", type=float, default=20, help="stop after so long")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these")
    add("--output-dir", type=Path, default=ROOT / "outputs" / "gpu-check")
    options = parser.parse_args()
    for stop in (signal.SIGTERM, signal.SIGHUP):  # ends what was started too: it holds the GPU
        signal.signal(stop, lambda *_: sys.exit(1))
    folder = options.output_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    check = GpuCheck(folder, time.monotonic() + 60 * options.minutes)
    try:
        check.machine = check.measured("machine", most=120)
        check.config = options.config or (GPU_CONFIG if check.cuda else DEFAULT_CONFIG)
        check.model = options.model or check.measured(
            "random_model", check.config, str(folder / "model"), check.cuda
        )["model"]  # fmt: skip
    except RecipeError as error:
        sys.exit(f"error: {error}")
    for name in options.parts:
        run_part(name, check)
    missed = [f"{row['part']}: {row['what']}" for row in check.rows if row["met"] is False]
    print(f"\n{'FAILED: ' + '; '.join(missed) if missed else 'passed'}\n{folder / 'report.md'}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
