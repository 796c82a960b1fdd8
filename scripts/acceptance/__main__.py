"""What a GPU machine can prove in twenty minutes, in one command and one report.

    python -m scripts.acceptance                  # on an A100; anywhere else, as far as it goes

It prepares the model, holds the plan against two measured steps, runs the GPU-marked tests, the
benchmark against TRL's trainer and the notebook with the short 8B config. Without a GPU the same
parts run on a tiny Llama, and the report says which figures are open. `acceptance.json` and
`acceptance.md` are written after every part; a part that fails does not stop the others. Beside
them stay logs, the run's folder and, where Llama 3 was not to be had, 16 GB of random weights.

Exit codes: 0, all that could run here is as it should be; 1, something is not, or the time was up.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from pathlib import Path

from scripts.acceptance.budget import Budget, PartError
from scripts.acceptance.parts import PARTS, Context, facts
from scripts.acceptance.report import Report, Row
from scripts.base import DEFAULT_CONFIG, RecipeError
from scripts.cli import command, parse

GPU_CONFIG = "configs/llama3-8b-a100-short.yaml"


def run_part(name: str, run: Context, report: Report) -> None:
    """Add what the part finds, or that it failed and why."""
    started = time.monotonic()
    try:
        rows = PARTS[name](run)
    except PartError as error:
        rows = [Row(name, "the part", "open", met=False, note=str(error))]
    except Exception:  # what a part reads may have any shape; the other parts matter more
        last = traceback.format_exc().strip().splitlines()[-1]
        rows = [Row(name, "the part", "open", met=False, note=last[:200])]
    seconds = time.monotonic() - started
    report.add(rows, name, seconds)
    for row in rows:
        mark = {None: " ", True: "+", False: "!"}[row.met]
        value = row.value if not isinstance(row.value, float) else f"{row.value:.3f}"
        print(f"{mark} {name}: {row.name}: {row.state} {value or ''} {row.unit} {row.note}")
    print(f"  {name} took {seconds:.0f} s, {run.budget.left() / 60:.1f} minutes left", flush=True)


def chosen_parts(names: list[str] | None) -> list[str]:
    """The parts to run, `prepare` first.

    Raises:
        RecipeError: there is no such part.
    """
    for name in names or ():
        if name not in PARTS:
            raise RecipeError(f"no part {name!r}; there are {', '.join(PARTS)}")
    return [name for name in PARTS if not names or name in names or name == "prepare"]


def main() -> None:
    options = parse("acceptance")
    for stop in (signal.SIGTERM, signal.SIGHUP):  # end what was started, too: it holds the GPU
        signal.signal(stop, lambda *_: sys.exit(1))
    names = chosen_parts(options.parts)
    folder = Path(options.output_dir or "outputs/acceptance").resolve()
    budget = Budget(60 * options.minutes)
    machine = facts(folder, budget)
    cuda = machine["cuda"] and options.device != "cpu"
    if options.device == "cuda" and not cuda:
        raise RecipeError("--device cuda: torch sees no GPU here (scripts.preflight says more)")
    from scripts.config import parse_overrides  # it loads TRL, so not before the options are read

    report = Report(folder, machine)
    config = options.config or (GPU_CONFIG if cuda else DEFAULT_CONFIG)
    given = parse_overrides(options.overrides)
    build = machine["CUDA build"] != "no"
    run = Context(config, given, folder, budget, cuda, build)
    for name in names:
        run_part(name, run, report)
    report.finished = True
    report.write()
    print(f"\n{report.verdict()}\n{folder / 'acceptance.md'}")
    sys.exit(not report.passed)


if __name__ == "__main__":
    command(main)
