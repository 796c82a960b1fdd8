"""Preference pairs, drawn: lengths, length bias, findings."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.pairs.checks import Report
from scripts.pairs.report import by_kind, length_bias
from scripts.plots.style import ACCENT, CHOSEN, NEUTRAL, REJECTED, STYLE, described


def pair_lengths(lengths: pd.DataFrame) -> Figure:
    """Histograms of the answers' lengths, chosen against rejected, in tokens."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 2.6))
        bins = np.linspace(0, lengths[["chosen", "rejected"]].to_numpy().max(), 30)
        for side, colour, hatch in (("chosen", CHOSEN, None), ("rejected", REJECTED, "////")):
            axis.hist(lengths[side], bins, alpha=0.65, color=colour, label=side, hatch=hatch)
        axis.set(xlabel="tokens of the answer", ylabel="pairs")
        axis.legend()
        figure.tight_layout()
    medians = ", ".join(f"{side} {lengths[side].median():.0f}" for side in ("chosen", "rejected"))
    return described(figure, f"Histograms of the answers' lengths; medians in tokens: {medians}.")


def data_check(report: Report) -> Figure:
    """What the check of a dataset found: sequence lengths, length bias, and rows by finding."""
    findings = by_kind(report)
    lengths = np.concatenate(list(report.lengths.values()))
    prompt, chosen, rejected = lengths.T
    with plt.rc_context(STYLE):
        figure, (whole, bias, kinds) = plt.subplots(
            1, 3, figsize=(8, 3.4), width_ratios=[1, 1.1, 0.8], layout="constrained"
        )
        if len(lengths):
            bins = np.linspace(0, (prompt + np.maximum(chosen, rejected)).max() + 1, 40)
            for side, tokens, colour, hatch in (
                ("chosen", chosen, CHOSEN, None),
                ("rejected", rejected, REJECTED, "////"),
            ):
                whole.hist(prompt + tokens, bins, alpha=0.6, color=colour, label=side, hatch=hatch)
            top = max(chosen.max(), rejected.max()) * 1.05
            shown = np.random.default_rng(0).permutation(len(lengths))[:3000]
            bias.scatter(chosen[shown], rejected[shown], 7, ACCENT, alpha=0.35, lw=0)
            bias.plot([0, top], [0, top], color=NEUTRAL, lw=0.8, ls="--")
            bias.set(xlim=(0, top), ylim=(0, top))
            share = length_bias(lengths)
            shares = share["chosen_shorter"], share["chosen_longer"]
            title = "chosen is shorter in {:.0%},\nlonger in {:.0%}".format(*shares)
            bias.set_title(title, loc="left")
        if report.max_length:
            whole.axvline(report.max_length, color="black", lw=1, ls=":", label="max_length")
        whole.set_title("prompt and answer", loc="left")
        whole.set(xlabel="tokens", ylabel="pairs")
        whole.legend()
        bias.set(xlabel="tokens of chosen", ylabel="tokens of rejected")
        colours = [REJECTED if level == "bad" else NEUTRAL for level in findings["level"]]
        names = [
            f"× {row.kind}" if row.level == "bad" else row.kind for row in findings.itertuples()
        ]
        bars = kinds.barh(names, findings["rows"], color=colours, alpha=0.85)
        kinds.bar_label(bars, padding=3, fontsize=8)
        kinds.set(ylim=(max(len(findings), 4) - 0.4, -0.6), xlabel="rows")
        kinds.margins(x=0.15)
        kinds.grid(axis="y", visible=False)
        kinds.set_title("findings (×: bad rows)" if len(findings) else "no findings", loc="left")
    told = ", ".join(f"{row.kind} in {row.rows} rows" for row in findings.itertuples())
    return described(
        figure,
        f"The check of a dataset: lengths of {len(lengths)} pairs with their prompts, tokens of "
        f"chosen against rejected answers, and findings: {told or 'none'}.",
    )
