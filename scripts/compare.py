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
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from scripts.base import RecipeError
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


@dataclass(frozen=True)
class Comparison:
    """Two runs: one row a setting that differs, one row a figure, and the training logs."""

    settings: pd.DataFrame
    figures: pd.DataFrame
    curves: dict[str, pd.DataFrame]
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        settings = self.settings.to_string() if len(self.settings) else "none"
        parts = [*self.remarks, "Settings that differ:", settings]
        return "\n\n".join([*parts, "Figures, with 95% intervals:", self.figures.to_string()])

    def _repr_html_(self) -> str:
        """For a notebook."""
        settings = self.settings.to_html() if len(self.settings) else "<p>the same settings</p>"
        remarks = "".join(f"<p>{remark}</p>" for remark in self.remarks)
        return remarks + settings + self.figures.to_html()

    def plot(self) -> Figure:
        """The curves of both runs in one figure."""
        return compared_runs(self.curves)


def compare(run_a: str | Path, run_b: str | Path) -> Comparison:
    """Compare the runs in two folders.

    Replies to the same prompts are compared prompt by prompt, which gives the `change` from the
    first run to the second its own interval. With other prompts there is no such column.

    Raises:
        RecipeError: one of the folders is not a run's.
    """
    folders = [Path(run_a), Path(run_b)]
    runs = {name: read_run(folder) for name, folder in zip(names(*folders), folders, strict=True)}
    remarks = [
        f"{name} has no evaluation yet: only the training is compared."
        for name, run in runs.items()
        if not run.evaluation
    ]
    rows, settings = _trained(runs), _settings(runs)
    if not remarks:
        rows |= _measured(runs, folders, remarks)
    if settings.empty and len({bool(run.evaluation) for run in runs.values()}) == 1:
        remarks += _repeated(runs, folders)
    return Comparison(
        settings,
        pd.DataFrame.from_dict(rows, orient="index").fillna(""),
        {name: pd.DataFrame(run.steps).set_index("step") for name, run in runs.items()},
        tuple(remarks),
    )


def names(one: Path, other: Path) -> tuple[str, str]:
    """The folders' own names; where these are equal, whole paths."""
    if one.resolve().name != other.resolve().name:
        return one.resolve().name, other.resolve().name
    return str(one), str(other) if str(one) != str(other) else f"{other} (again)"


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


def _trained(runs: dict[str, RunFolder]) -> dict[str, dict[str, str]]:
    rows = {"training: optimiser steps": {n: str(r.steps[-1]["step"]) for n, r in runs.items()}}
    for column, text in ENDS.items():
        rows[text] = {name: f"{run.late(column):.2f}" for name, run in runs.items()}
    return rows


def _measured(
    runs: dict[str, RunFolder], folders: list[Path], remarks: list[str]
) -> dict[str, dict[str, str]]:
    """The tuned models' figures; adds to `remarks` if there can be no `change`."""
    (a, one), (b, other) = runs.items()
    rows = {
        text: {name: with_interval(run.evaluation[key]) for name, run in runs.items()}
        for key, text in HELD_OUT.items()
    }
    frame = _same_prompts(folders)
    if frame is not None:
        for key, found in compared(frame, "one", "other").items():
            figures = {a: with_interval(found["one"]), b: with_interval(found["other"])}
            rows[MEASURES[key]] = figures | {"change": with_interval(found["change"], signed=True)}
        return rows
    remarks.append("The runs replied to different prompts, so there is no change prompt by prompt.")
    for key, text in MEASURES.items():
        if all(key in run.evaluation["measures"] for run in (one, other)):
            rows[text] = {
                n: with_interval(r.evaluation["measures"][key]["tuned"]) for n, r in runs.items()
            }
    return rows


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


def other_runs(run_dir: str | Path) -> list[Path]:
    """The runs in the folders beside `run_dir` that can be read, the newest first."""
    run_dir = Path(run_dir).resolve()
    logs = [log for log in run_dir.parent.glob("*/metrics.jsonl") if log.parent != run_dir]
    found = []
    for log in sorted(logs, key=lambda log: -log.stat().st_mtime):
        with suppress(RecipeError):
            read_run(log.parent)
            found.append(log.parent)
    return found


def main(args: argparse.Namespace) -> None:
    found = compare(args.run_a, args.run_b)
    print(found)
    if args.figure:
        save(found.plot(), args.figure)
        print(f"\ncurves: {args.figure}")
