"""Memory, drawn: planned by part, and measured over time."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.plots.style import ACCENT, NEUTRAL, PALETTE, REJECTED, STYLE, described

# As `planning.memory.OUTSIDE_TORCH` has them; plots come before planning.
OUTSIDE_TORCH = ("runtime", "optimiser, paged")


def plan_memory(planned: pd.DataFrame) -> Figure:
    """What `planning.hardware.memory_table` foretells: a bar a phase, in GB, stacked by part.

    Hatched parts are outside what torch counts on a GPU: `runtime`, and paged optimiser state.
    """
    parts = planned.drop("peak")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 2.8))
        left = np.zeros(len(parts.columns))
        for i, part in enumerate(parts.index):
            size = parts.loc[part].fillna(0).to_numpy()
            colour = PALETTE[i % len(PALETTE)]
            hatch = "////" if part in OUTSIDE_TORCH else (None, "...", "xx")[i // len(PALETTE)]
            axis.barh(parts.columns, size, 0.62, left=left, color=colour, label=part, hatch=hatch,
                      ec="white", lw=0.4)  # fmt: skip
            left += size
        for y, total in enumerate(left):
            axis.text(total, y, f" {total:.1f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="GB, planned", xlim=(0, left.max() * 1.08))
        axis.grid(axis="y", visible=False)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        figure.tight_layout()
    told = ", ".join(f"{n} {gb:.1f} GB" for n, gb in zip(parts.columns, left, strict=True))
    return described(figure, f"Planned memory by phase, stacked by part: {told}.")


def memory_timeline(frame: pd.DataFrame, kind: str, planned: dict | None = None) -> Figure:
    """Memory in use over the run, in GB, shaded by phase; `planned` peaks as dashed lines."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        minutes = frame["seconds"] / 60
        axis.fill_between(minutes, frame["gb"], color=ACCENT, alpha=0.18, lw=0)
        axis.plot(minutes, frame["gb"], color=ACCENT, lw=1.2)
        planned = planned or {}
        top = max(frame["gb"].max(), *planned.values(), 0) * 1.18
        for i, (name, rows) in enumerate(frame.groupby("phase", sort=False)):
            start, end = rows["seconds"].min() / 60, rows["seconds"].max() / 60
            if i % 2:
                axis.axvspan(start, end, color=NEUTRAL, alpha=0.08, lw=0)
            if name in planned:
                axis.hlines(planned[name], start, end, color=REJECTED, lw=1.2, ls="--")
            if end - start > minutes.max() * 0.03:
                label = f"{name}\npeak {rows['gb'].max():.1f}"
                axis.text((start + end) / 2, top, label, ha="center", va="top", fontsize=8)
        axis.set(xlabel="minutes", ylabel=f"{kind} (GB)", ylim=(0, top * 1.02))
        axis.set_xlim(0, minutes.max())
        figure.tight_layout()
    peaks = frame.groupby("phase", sort=False)["gb"].max().items()
    told = ", ".join(f"{name} {gb:.1f} GB" for name, gb in peaks)
    return described(figure, f"{kind} over {minutes.max():.1f} minutes; peaks by phase: {told}.")
