"""A training run, drawn step by step."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.plots.style import ACCENT, CHOSEN, NEUTRAL, REJECTED, STYLE


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, rewards, margin with accuracy, and learning rate, by optimiser step."""
    smooth = history.rolling(max(1, len(history) // 10), min_periods=1).mean()
    with plt.rc_context(STYLE):
        figure, ((loss, rewards), (margin, rate)) = plt.subplots(2, 2, figsize=(9, 5), sharex=True)

        def draw(axis, column: str, colour: str, label: str) -> None:
            axis.plot(history.index, history[column], color=colour, alpha=0.3, lw=1)
            axis.plot(smooth.index, smooth[column], color=colour, lw=1.8, label=label)

        draw(loss, "loss", ACCENT, "loss")
        if abs(history["loss"].iloc[0] - np.log(2)) < 0.05:  # the DPO loss and nothing else
            loss.axhline(np.log(2), color=NEUTRAL, ls=":", label="ln 2: cannot tell them apart")
        draw(rewards, "rewards/chosen", CHOSEN, "chosen")
        draw(rewards, "rewards/rejected", REJECTED, "rejected")
        rewards.axhline(0, color=NEUTRAL, lw=0.8)
        draw(margin, "rewards/margins", ACCENT, "margin (left)")
        accuracy = margin.twinx()
        accuracy.spines["right"].set_visible(True)
        accuracy.grid(False)
        draw(accuracy, "rewards/accuracies", NEUTRAL, "accuracy (right)")
        accuracy.set(ylim=(0, 1.05))
        rate.plot(history.index, history["learning_rate"], color=ACCENT, label="learning rate")
        for axis, title in (
            (loss, "loss"),
            (rewards, "implicit rewards (nats)"),
            (margin, "reward margin and accuracy"),
            (rate, "learning rate"),
        ):
            axis.set_title(title, loc="left")
        handles = [h for a in (margin, accuracy) for h in a.get_legend_handles_labels()[0]]
        margin.legend(handles=handles, loc="lower right")
        loss.legend()
        rewards.legend()
        margin.set_xlabel("step")
        rate.set_xlabel("step")
        figure.tight_layout()
    return figure
