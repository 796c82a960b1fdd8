"""Before and after, drawn."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.plots.style import ACCENT, NEUTRAL, STYLE, described


def before_after(figures: dict, frame: pd.DataFrame) -> Figure:
    """Reply lengths prompt by prompt, and the shares that must not get worse, with intervals."""
    with plt.rc_context(STYLE):
        figure, (lengths, shares) = plt.subplots(
            1, 2, figsize=(8, 3.4), width_ratios=[1.15, 1], layout="constrained"
        )
        order = frame.sort_values("base_length", ignore_index=True)
        for who, colour, mark in (("base", NEUTRAL, "s"), ("tuned", ACCENT, "o")):
            done = order[f"{who}_finished"]
            lengths.scatter(
                order.index[done], order[f"{who}_length"][done], 16, colour, mark, label=who
            )
            cut = order.index[~done]
            lengths.scatter(cut, order[f"{who}_length"][~done], 22, colour, marker="x")
            mean = frame[f"{who}_length"].mean()
            lengths.axhline(mean, color=colour, lw=1, ls="--")
        lengths.set_title(
            f"reply length: {figures['shorter']['mean']:.0%} shorter (× = cut off)",
            loc="left",
        )
        lengths.set(
            xlabel="held-out prompts, by the base model's length", ylabel="tokens of the reply"
        )
        lengths.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=True)
        # Of questions on texts what is right; of other prompts there is only the form.
        names = ("exact", "first", "mentioned", "finished")
        if "exact" not in figures["measures"]:
            names = ("finished", "facts", "repeated")
        names = [name for name in names if name in figures["measures"]]
        titles = {
            "exact": "right, nothing\nwrong beside", "first": "in the first\nsentence",
            "mentioned": "mentioned", "finished": "finish", "facts": "key facts",
            "repeated": "repeated\n4-grams",
        }  # fmt: skip
        for x, name in enumerate(names):
            for shift, who, colour, hatch in ((-0.13, "base", NEUTRAL, "////"),
                                              (0.13, "tuned", ACCENT, None)):  # fmt: skip
                value = figures["measures"][name][who]
                shares.bar(x + shift, value["mean"], 0.24, color=colour, alpha=0.85, hatch=hatch,
                           label=who if x == 0 else None)  # fmt: skip
                if value["low"] is None:  # one prompt has no interval
                    continue
                error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
                shares.errorbar(x + shift, value["mean"], error, color="black", lw=1, capsize=3)
        shares.set_xticks(range(len(names)), [titles[n] for n in names])
        shares.set(ylim=(0, 1.05), ylabel="share")
        shares.set_title("shares, with 95% intervals", loc="left")
        shares.legend()
    told = ", ".join(
        f"{titles[n].replace(chr(10), ' ')} {figures['measures'][n]['base']['mean']:.2f} to "
        f"{figures['measures'][n]['tuned']['mean']:.2f}"
        for n in names
    )
    return described(
        figure,
        f"Before and after on {len(frame)} prompts. Reply length "
        f"{frame['base_length'].mean():.0f} to {frame['tuned_length'].mean():.0f} tokens on "
        f"average; shares: {told}.",
    )
