"""Both trainers, drawn: speed, memory, and how time grows."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.plots.style import ACCENT, NEUTRAL, STYLE


def benchmark(results: dict) -> Figure:
    """Speed and peak memory of both trainers by case, and how the time of a pair grows."""
    names = {"trl": ("TRL's trainer", NEUTRAL), "shared": ("prefix sharing", ACCENT)}
    growth = results["growth"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2 + len(growth), figsize=(6.4 + 3 * len(growth), 3.6), width_ratios=[2, 2]
            + [1.3] * len(growth), layout="constrained",
        )  # fmt: skip
        cases = list(results["cases"])
        for axis, key, title in (
            (axes[0], "pairs_per_second", "pairs a second"),
            (axes[1], "peak_gb", "peak memory (GB)"),
        ):
            for shift, (name, (label, colour)) in zip((-0.2, 0.2), names.items(), strict=True):
                values = [
                    np.median([r[key] for r in results["cases"][c][name] if "error" not in r] or 0)
                    for c in cases
                ]
                bars = axis.barh(np.arange(len(cases)) + shift, values, 0.38, color=colour)
                axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
                bars.set_label(label)
            axis.set_yticks(range(len(cases)), cases if axis is axes[0] else [""] * len(cases))
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(title, loc="left")
            axis.grid(axis="y", visible=False)
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        for axis, (what, found) in zip(axes[2:], growth.items(), strict=True):
            for name, (_, colour) in names.items():
                runs = {c: r[name][0] for c, r in found.items() if "error" not in r[name][0]}
                sizes = [c.split("/")[0] if what == "prompt" else c.split("x")[1] for c in runs]
                times = [1 / run["pairs_per_second"] for run in runs.values()]
                axis.plot([int(size) for size in sizes], times, "o-", color=colour, ms=4)
            axis.set_title("seconds a pair", loc="left")
            axis.set_xlabel("tokens of the prompt" if what == "prompt" else "pairs at a time")
            axis.set_ylim(bottom=0)
    return figure
