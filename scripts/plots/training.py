"""A training run, drawn step by step."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.plots.style import (
    ACCENT,
    ACCENT_MARK,
    CHOSEN,
    CHOSEN_MARK,
    NEUTRAL,
    NEUTRAL_MARK,
    ORANGE,
    PALETTE,
    REJECTED,
    REJECTED_MARK,
    STYLE,
    described,
)

LN2 = float(np.log(2))
MARKS = ("o", "D", "^", "s")
# How near the first DPO loss must be to ln 2 for the line: another loss type starts elsewhere.
NEAR_LN2 = 0.05


def training_curves(history: pd.DataFrame) -> Figure:
    """DPO loss, rewards, margin with accuracy, and the SFT term or learning rate, by step.

    `loss/dpo` and `loss/sft`, where the log has them, are drawn apart; without them the whole loss
    is. Faint: every log; strong: the running mean of a tenth of them.
    """
    smooth = history.rolling(max(1, len(history) // 10), min_periods=1).mean()
    with plt.rc_context(STYLE):
        figure, ((loss, rewards), (margin, last)) = plt.subplots(
            2, 2, figsize=(8, 5.2), sharex=True, layout="constrained"
        )

        def draw(axis: Axes, column: str, colour: str, mark: str, label: str) -> None:
            axis.plot(history.index, history[column], color=colour, alpha=0.3, lw=1)
            axis.plot(smooth.index, smooth[column], color=colour, lw=1.8, label=label,
                      marker=mark, markevery=max(1, len(smooth) // 8))  # fmt: skip

        dpo = "loss/dpo" if "loss/dpo" in history else "loss"
        draw(loss, dpo, ACCENT, ACCENT_MARK, "DPO term" if dpo != "loss" else "loss")
        if abs(history[dpo].iloc[0] - LN2) < NEAR_LN2:
            loss.axhline(LN2, color=NEUTRAL, ls=":", label="ln 2: cannot tell them apart")
        loss.set_ylabel("nats a pair")
        draw(rewards, "rewards/chosen", CHOSEN, CHOSEN_MARK, "chosen")
        draw(rewards, "rewards/rejected", REJECTED, REJECTED_MARK, "rejected")
        rewards.axhline(0, color=NEUTRAL, lw=0.8)
        rewards.set_ylabel("nats")
        draw(margin, "rewards/margins", ACCENT, ACCENT_MARK, "margin (left)")
        margin.set_ylabel("margin (nats)")
        accuracy = margin.twinx()
        accuracy.spines["right"].set_visible(True)
        accuracy.grid(False)
        draw(accuracy, "rewards/accuracies", NEUTRAL, NEUTRAL_MARK, "accuracy (right)")
        accuracy.set(ylim=(0, 1.05), ylabel="share of pairs")
        if "loss/sft" in history:
            draw(last, "loss/sft", ORANGE, "^", "SFT term")
            last.set_ylabel("nats a token")
            title = "SFT term: loss on the chosen answers"
        else:
            last.plot(history.index, history["learning_rate"], color=ACCENT)
            last.set_ylabel("per step")
            title = "learning rate"
        for axis, text in (
            (loss, "DPO loss" if dpo != "loss" else "loss"),
            (rewards, "implicit rewards"),
            (margin, "reward margin and accuracy"),
            (last, title),
        ):
            axis.set_title(text, loc="left")
        handles = [h for a in (margin, accuracy) for h in a.get_legend_handles_labels()[0]]
        margin.legend(handles=handles, loc="lower right")
        low, high = loss.get_ylim()
        loss.set_ylim(low, high + 0.3 * (high - low))  # room for the legend above the line at ln 2
        loss.legend(loc="upper right")
        rewards.legend()
        margin.set_xlabel("optimiser step")
        last.set_xlabel("optimiser step")
    return described(figure, _in_words(history, dpo))


def _in_words(history: pd.DataFrame, dpo: str) -> str:
    """The curves as a screen reader would tell them."""
    first, last = history.iloc[0], history.tail(max(1, len(history) // 10)).mean()
    return (
        f"Four curves over {history.index[-1]} steps. {'DPO term' if dpo != 'loss' else 'Loss'} "
        f"from {first[dpo]:.2f} to {last[dpo]:.2f} nats; chosen reward from "
        f"{first['rewards/chosen']:+.2f} to {last['rewards/chosen']:+.2f}, rejected from "
        f"{first['rewards/rejected']:+.2f} to {last['rewards/rejected']:+.2f}; margin to "
        f"{last['rewards/margins']:+.2f}; accuracy from {first['rewards/accuracies']:.2f} to "
        f"{last['rewards/accuracies']:.2f}."
    )


def compared_runs(histories: dict[str, pd.DataFrame]) -> Figure:
    """Margins, and chosen and rejected rewards, of some runs: running means of a tenth of the logs.

    A run has a colour and a mark; of the rewards, chosen is the solid line and rejected the dashed.
    """
    with plt.rc_context(STYLE):
        figure, (margins, rewards) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
        for number, (name, history) in enumerate(histories.items()):
            smooth = history.rolling(max(1, len(history) // 10), min_periods=1).mean()
            look = {"color": PALETTE[number % len(PALETTE)], "marker": MARKS[number % len(MARKS)],
                    "markevery": max(1, len(smooth) // 8)}  # fmt: skip
            margins.plot(smooth.index, smooth["rewards/margins"], label=name, **look)
            rewards.plot(smooth.index, smooth["rewards/chosen"], **look)
            rewards.plot(smooth.index, smooth["rewards/rejected"], ls="--", **look)
        rewards.axhline(0, color=NEUTRAL, lw=0.8)
        margins.set_title("reward margin", loc="left")
        rewards.set_title("chosen (solid), rejected (dashed)", loc="left")
        for axis in (margins, rewards):
            axis.set(xlabel="optimiser step", ylabel="nats")
        margins.legend()
    ends = [
        f"{name}: margin {h['rewards/margins'].tail(max(1, len(h) // 10)).mean():+.2f}, chosen "
        f"{h['rewards/chosen'].tail(max(1, len(h) // 10)).mean():+.2f} at the end"
        for name, h in histories.items()
    ]
    return described(figure, f"Reward margins and rewards of the runs, in nats. {'; '.join(ends)}.")
