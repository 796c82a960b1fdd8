"""Both trainers, drawn: speed, memory, and how time grows."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.plots.style import ACCENT, ACCENT_MARK, NEUTRAL, NEUTRAL_MARK, STYLE, described


def benchmark(results: dict) -> Figure:
    """Speed and peak memory of both trainers by case, and how the time of a pair grows.

    `results` is what `scripts.benchmark` writes as `benchmark.json`. Bars are medians of all
    measured steps, the lines at their ends reach from the slowest to the fastest.
    """
    growth = results["growth"]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(8, 6.6 if growth else 3.8), layout="constrained")
        rows = figure.add_gridspec(
            1 + bool(growth), 1, height_ratios=[3.8, 2.6][: 1 + bool(growth)]
        )
        bars = [figure.add_subplot(spot) for spot in rows[0].subgridspec(1, 2)]
        lines = rows[1].subgridspec(1, len(growth)) if growth else []
        axes = bars + [figure.add_subplot(spot) for spot in lines]
        _draw_bars(axes[0], results["cases"], "rates", "pairs a second")
        _draw_bars(axes[1], results["cases"], "peak_gb", "peak memory (GB)")
        axes[1].set_yticklabels([])
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        for axis, (what, cases) in zip(axes[2:], growth.items(), strict=True):
            _draw_growth(axis, cases, what)
    return described(figure, _in_words(results["cases"]))


def _in_words(cases: dict) -> str:
    """The medians of both trainers by case."""

    def median(runs: list[dict], key: str) -> float:
        return float(np.median(np.hstack([r[key] for r in runs if key in r] or [0])))

    told = "; ".join(
        f"{name}: TRL {median(c['trl'], 'rates'):.2f} pairs a second and "
        f"{median(c['trl'], 'peak_gb'):.1f} GB, prefix sharing {median(c['shared'], 'rates'):.2f} "
        f"and {median(c['shared'], 'peak_gb'):.1f} GB"
        for name, c in cases.items()
    )
    return f"Speed and peak memory of both trainers, by case. {told}."


TRAINERS = {
    "trl": ("TRL's trainer, its fastest attention", NEUTRAL, NEUTRAL_MARK, "////"),
    "shared": ("prefix sharing", ACCENT, ACCENT_MARK, None),
}


def _draw_bars(axis: Axes, cases: dict, key: str, title: str) -> None:
    """Two bars a case: the medians of `key`, with lines from the lowest to the highest."""
    looks = zip((-0.2, 0.2), TRAINERS.items(), strict=True)
    for shift, (name, (label, colour, _, hatch)) in looks:
        # A trainer that failed in every process has an empty bar.
        values = [np.hstack([r[key] for r in c[name] if key in r] or [0]) for c in cases.values()]
        middle = np.array([np.median(v) for v in values])
        reach = [middle - [v.min() for v in values], [v.max() for v in values] - middle]
        bars = axis.barh(
            np.arange(len(cases)) + shift, middle, 0.38, color=colour, label=label, xerr=reach,
            hatch=hatch, ec="white", error_kw={"lw": 0.8, "ecolor": "0.25"},
        )  # fmt: skip
        axis.bar_label(bars, [f"{v:.1f}" for v in middle], padding=3, fontsize=8)
    axis.set_yticks(range(len(cases)), list(cases))
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel(title)
    axis.grid(axis="y", visible=False)


def _draw_growth(axis: Axes, cases: dict, what: str) -> None:
    """Seconds a pair of both trainers over the size of the case."""
    for name, (_, colour, mark, _) in TRAINERS.items():
        rates = {c: r[name][0]["pairs_per_second"] for c, r in cases.items()
                 if "error" not in r[name][0]}  # fmt: skip
        sizes = [int(c.split("/")[0] if what == "prompt" else c.split("x")[1]) for c in rates]
        axis.plot(sizes, [1 / rate for rate in rates.values()], color=colour, marker=mark)
    axis.set_title("how time grows", loc="left")
    axis.set_ylabel("seconds a pair")
    axis.set_xlabel("tokens of the prompt" if what == "prompt" else "pairs at a time")
    axis.set_ylim(bottom=0)
