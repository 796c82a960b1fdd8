"""Repeat a run from its folder, and compare the two figure by figure.

    python -m scripts.repeat outputs/smollm2-135m-cpu

The new run has the config as resolved, the seed, and the commits of model and data that the old one
noted; it goes into a folder beside the old one, `<name>-repeat`. Other versions or another device
are told, since they may change the last digits. On the same machine with the same versions every
figure is the same.

Exit codes: 0, all figures are equal within `--tolerance`; 1, some differ, or the run failed.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("repeat")  # before the libraries load, so that --help is answered at once

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from scripts.cli import InputError
from scripts.config import ROOT, Config, RecipeError, load_config
from scripts.monitoring.folder import describe_machine
from scripts.origins import dataset_origin, read_origins

# Of a log: what depends on the machine's load and not on what was computed.
TIMES = ("runtime", "per_second", "seconds", "total_flos", "_loc")


class Difference(NamedTuple):
    """One figure of both runs; `gap` is the absolute difference, infinite where one lacks it."""

    figure: str
    before: float | str | None
    after: float | str | None
    gap: float


class RepeatError(RecipeError):
    """The repeated run does not have the figures of the first."""


def flat(value: object, name: str = "") -> Iterator[tuple[str, float | str]]:
    """The figures and words in a JSON value by their path, `margin.low`; times left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not any(word in str(key) for word in TIMES):
                yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from flat(inner, f"{name}[{i}]")
    elif value is not None:
        yield name, float(value) if isinstance(value, int | float) else value


def figures(run_dir: Path) -> dict[str, float | str]:
    """All figures of a run: every step of `metrics.jsonl` (the last log of a step counts), and
    `evaluation.json` if there is one.

    Raises:
        RepeatError: one of the two is damaged.
    """
    found = {}
    path = log = run_dir / "metrics.jsonl"
    try:
        for row in map(json.loads, log.read_text().splitlines() if log.is_file() else []):
            found |= dict(flat(row, f"step {row['step']}"))
        path = run_dir / "evaluation.json"
        if path.is_file():
            found |= dict(flat(json.loads(path.read_text()), "evaluation"))
    except (ValueError, LookupError, TypeError) as error:
        raise RepeatError(f"{path} is damaged ({error}): half a line, say, of a kill") from None
    return found


def differences(
    before: dict[str, float | str], after: dict[str, float | str], tolerance: float = 0.0
) -> list[Difference]:
    """The figures that differ by more than `tolerance`, in the order of `before`."""
    found = []
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        if isinstance(one, float) and isinstance(two, float):
            both_nan = math.isnan(one) and math.isnan(two)
            gap = 0.0 if one == two or both_nan else abs(one - two)
            gap = math.inf if math.isnan(gap) else gap
        else:
            gap = 0.0 if one == two else math.inf
        if gap > tolerance:
            found.append(Difference(name, one, two, gap))
    return found


def changed_machine(run_dir: Path) -> list[str]:
    """What of versions, device and commit is not as the run noted it."""
    try:
        then = dict(json.loads((run_dir / "environment.json").read_text()))
    except (OSError, ValueError, TypeError):
        return ["environment.json cannot be read: versions and device of the run are unknown"]
    now = describe_machine()
    return [f"{k}: {then[k]} then, {now.get(k)} now" for k in then if now.get(k) != then[k]]


def pins(cfg: Config, run_dir: Path) -> dict[str, str]:
    """The overrides that take the very model and data that the run in `run_dir` had.

    Raises:
        RepeatError: the data on this machine is not what it was.
    """
    origins, found = read_origins(run_dir), {}
    for what, key in {"model": "model_revision", "dataset": "dataset_revision"}.items():
        if commit := origins.get(what, {}).get("commit"):
            found[key] = commit
    then = origins.get("dataset", {}).get("content")
    if then and then != dataset_origin(cfg)["content"]:
        raise RepeatError(f"{cfg.script.dataset_name} is not what it was when {run_dir} was run")
    return found


def repeat(run_dir: Path, target: Path, notebook: bool) -> None:
    """Run the config of `run_dir` again, into `target`: the notebook, or training alone.

    Raises:
        RepeatError: the run failed; its last line is told.
    """
    cfg = load_config(run_dir / "config.yaml", output_dir=str(target))
    given = {"output_dir": str(target), **pins(cfg, run_dir)}
    # As a mapping in a file, so that no value passes through a command line.
    target.mkdir(parents=True)
    values = yaml.safe_load((run_dir / "config.yaml").read_text()) | given
    values.pop("resume_from_checkpoint", None)
    (target / "repeat.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    module = "scripts.run" if notebook else "scripts.training"
    command = [sys.executable, "-m", module, "--config", str((target / "repeat.yaml").resolve())]
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise RepeatError(f"the repeated run ended with {done.returncode}; see above")


def report(run_dir: Path, target: Path, tolerance: float) -> None:
    """Print the comparison.

    Raises:
        RepeatError: a figure differs.
    """
    before, after = figures(run_dir), figures(target)
    found = differences(before, after, tolerance)
    print(f"\n{len(before)} figures of {run_dir} against {target}: {len(found)} differ", end="")
    print(f" by more than {tolerance:g}" if tolerance else "")
    for one in found[:40]:
        print(f"  {one.figure:<50} {one.before} -> {one.after}  ({one.gap:.3g})")
    if len(found) > 40:
        print(f"  ... and {len(found) - 40} more")
    if found:
        raise RepeatError(f"{len(found)} of {len(before)} figures differ, first: {found[0].figure}")


def main(args: argparse.Namespace) -> None:
    run_dir = args.run_folder
    if not (run_dir / "config.yaml").is_file() or not figures(run_dir):
        raise InputError(f"{run_dir} is no run folder: it needs config.yaml and metrics.jsonl")
    target = args.output_dir or run_dir.with_name(f"{run_dir.resolve().name}-repeat")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} is there already; name another with --output-dir")
    for line in changed_machine(run_dir):
        print(f"changed: {line}", flush=True)
    repeat(run_dir, target, (run_dir / "evaluation.json").is_file())
    report(run_dir, target, args.tolerance)


if __name__ == "__main__":
    cli.command(main, ARGS)
