"""Do real faults to the recipe, and say which of them it survived.

    python -m tests.survival [--area TEXT] [--only TEXT] [--json FILE]

Every `tests/survival/*_faults.py` is an area: a name `AREA`, and `faults()`, which yields
`(name, callable)`; the callable does the fault, and raises an `AssertionError` where it was not
survived. Any other exception counts as not survived too. Exit code 1 if one was not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import tests.survival


class Fault(NamedTuple):
    area: str
    name: str
    do: Callable[[], None]


class Outcome(NamedTuple):
    area: str
    name: str
    survived: bool
    seconds: float
    detail: str  # the first line of what went wrong, or nothing


def discover() -> Iterator[Fault]:
    """All faults of all areas, in the order of the files' names."""
    for module in sorted(m.name for m in pkgutil.iter_modules(tests.survival.__path__)):
        if module.endswith("_faults"):
            area = importlib.import_module(f"tests.survival.{module}")
            for name, do in area.faults():
                yield Fault(area.AREA, name, do)


def attempt(fault: Fault) -> Outcome:
    """Do one fault."""
    start = time.monotonic()
    try:
        fault.do()
        detail = ""
    except Exception as error:  # any failure is an answer here
        first = (str(error).strip() or "no message").splitlines()[0]
        detail = f"{type(error).__name__}: {first}"
    return Outcome(fault.area, fault.name, not detail, time.monotonic() - start, detail)


def table(outcomes: list[Outcome]) -> str:
    """Markdown: area, tried, survived."""
    lines = ["| area | tried | survived |", "|---|---|---|"]
    for area in dict.fromkeys(outcome.area for outcome in outcomes):
        survived = [outcome.survived for outcome in outcomes if outcome.area == area]
        lines.append(f"| {area} | {len(survived)} | {sum(survived)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.survival", description=__doc__)
    parser.add_argument("--area", default="", help="only areas whose name contains this")
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    parser.add_argument("--json", type=Path, help="write all outcomes here")
    options = parser.parse_args()
    outcomes = []
    for fault in discover():
        if options.area in fault.area and options.only in fault.name:
            outcomes.append(outcome := attempt(fault))
            verdict = "survived" if outcome.survived else f"NOT SURVIVED: {outcome.detail}"
            name = f"{outcome.area}: {outcome.name}"
            print(f"{name}: {verdict} ({outcome.seconds:.1f} s)", flush=True)
    print(f"\n{table(outcomes)}")
    if options.json:
        options.json.write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    return int(not all(outcome.survived for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
