"""Show two runs side by side: the settings that differ, final figures, and the curves of both.

    python -m scripts.compare outputs/smollm2-135m-cpu outputs/smollm2-135m-cpu-beta-0.2

Two runs with the same settings are also compared figure by figure, to see whether a repeated run
gives the same. Reads `config.yaml`, `metrics.jsonl`, `evaluation.json`, `replies.jsonl` and
`environment.json` of both run folders.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("compare")

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from scripts.config import is_harmless
from scripts.doctor import RunFolder, read_run
from scripts.plots import compared_runs, save
from scripts.tables import MEASURES, compared, with_interval

# Of the training log: the mean of its last fifth.
ENDS = {
    "rewards/margins": "training: reward margin (nats)",
    "rewards/chosen": "training: chosen reward (nats)",
    "rewards/rejected": "training: rejected reward (nats)",
    "rewards/accuracies": "training: accuracy",
}
HELD_OUT = {
    "reward_accuracy": "implicit-reward accuracy",
    "reward_margin": "implicit-reward margin (nats)",
}


class Comparison(NamedTuple):
    """Two runs: one row a setting that differs, one row a figure, remarks, and the runs by name."""

    settings: pd.DataFrame
    figures: pd.DataFrame
    remarks: list[str]
    runs: dict[str, RunFolder]


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare the runs in two folders.

    Replies to the same prompts are compared prompt by prompt, which gives the `change` from the
    first run to the second its own interval. With other prompts there is no such column.

    Raises:
        RecipeError: one of the folders is not a run's.
    """
    folders = [Path(run_a), Path(run_b)]
    names = [folder.resolve().name for folder in folders]
    if names[0] == names[1]:
        names = [str(run_a), str(run_b) if str(run_a) != str(run_b) else f"{run_b} (again)"]
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    evaluated = [bool(run.evaluation) for run in runs.values()]
    remarks = [
        f"{name} has no evaluation yet: only the training is compared."
        for name, run in runs.items()
        if not run.evaluation
    ]
    rows = {"training: optimiser steps": {n: str(r.steps[-1]["step"]) for n, r in runs.items()}}
    for column, text in ENDS.items():
        rows[text] = {name: f"{run.late(column):.2f}" for name, run in runs.items()}
    if all(evaluated):
        measured, remark = _measured(runs, folders)
        rows, remarks = rows | measured, remarks + remark
    settings = _settings(runs)
    if settings.empty and evaluated[0] == evaluated[1]:
        remarks += _repeated(runs, folders)
    figures = pd.DataFrame.from_dict(rows, orient="index").fillna("")
    return Comparison(settings, figures, remarks, runs)


def _settings(runs: dict[str, RunFolder]) -> pd.DataFrame:
    """The settings that differ and that the trained weights depend on."""
    keys = sorted({key for run in runs.values() for key in run.config if not is_harmless(key)})
    rows = {key: [str(run.config.get(key, "(default)")) for run in runs.values()] for key in keys}
    differ = {key: values for key, values in rows.items() if len(set(values)) > 1}
    return pd.DataFrame.from_dict(differ, orient="index", columns=list(runs))


def _repeated(runs: dict[str, RunFolder], folders: list[Path]) -> list[str]:
    """For runs with the same settings: whether all figures are equal, and what may explain it."""
    one, other = (
        pd.json_normalize(
            {f"step {step['step']}": step for step in run.steps} | {"evaluation": run.evaluation}
        ).T[0]
        for run in runs.values()
    )
    every = list(dict.fromkeys([*one.index, *other.index]))
    differ = [name for name in every if str(one.get(name)) != str(other.get(name))]
    if not differ:
        return [f"Same settings, and all {len(every):,} figures are equal."]
    first = differ[0]
    remarks = [
        f"Same settings, but {len(differ):,} of {len(every):,} figures differ. The first is "
        f"{first}: {one.get(first)} and {other.get(first)}."
    ]
    with suppress(OSError, ValueError):
        then, now = (json.loads((f / "environment.json").read_text()) for f in folders)
        changed = [f"{k}: {then[k]} and {now.get(k)}" for k in then if then[k] != now.get(k)]
        remarks.append(f"Versions and machine: {'; '.join(changed) or 'the same'}.")
    return remarks


def _measured(runs: dict[str, RunFolder], folders: list[Path]) -> tuple[dict, list[str]]:
    """The tuned models' figures, and a remark where there can be no `change`."""
    rows = {
        text: {name: with_interval(run.evaluation[key]) for name, run in runs.items()}
        for key, text in HELD_OUT.items()
    }
    a, b = runs
    frame = _same_prompts(folders)
    if frame is not None:
        for key, found in compared(frame, "one", "other").items():
            figures = {a: with_interval(found["one"]), b: with_interval(found["other"])}
            rows[MEASURES[key]] = figures | {"change": with_interval(found["change"], signed=True)}
        return rows, []
    one, other = (run.evaluation["measures"] for run in runs.values())
    for key, text in MEASURES.items():
        if key in one and key in other:
            rows[text] = {
                a: with_interval(one[key]["tuned"]),
                b: with_interval(other[key]["tuned"]),
            }
    return rows, ["The runs replied to different prompts, so there is no change prompt by prompt."]


def _same_prompts(folders: list[Path]) -> pd.DataFrame | None:
    """Measures of both tuned models' replies, `one_...` and `other_...`; None for other prompts."""
    files = [folder / "replies.jsonl" for folder in folders]
    if not all(file.is_file() for file in files):
        return None
    first, second = (pd.read_json(file, lines=True, dtype=False) for file in files)
    if list(first["prompt"]) != list(second["prompt"]):
        return None
    tuned = [
        frame.filter(regex="^tuned_").rename(columns=lambda name, who=who: who + name[5:])
        for who, frame in (("one", first), ("other", second))
    ]
    return pd.concat([first["cluster"], *tuned], axis=1)


def main(args: argparse.Namespace) -> None:
    found = compare(args.run_a, args.run_b)
    settings = found.settings.to_string() if len(found.settings) else "none"
    parts = [*found.remarks, "Settings that differ:", settings]
    print("\n\n".join([*parts, "Figures, with 95% intervals:", found.figures.to_string()]))
    if args.figure:
        steps = {n: pd.DataFrame(run.steps).set_index("step") for n, run in found.runs.items()}
        save(compared_runs(steps), args.figure)
        print(f"\ncurves: {args.figure}")
