"""What DPO is, drawn: the pipelines it replaces, and its loss."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from scripts.plots.style import ACCENT, NEUTRAL, REJECTED, STYLE, described


def pipelines() -> Figure:
    """What SFT, RLHF and DPO each learn from, and what each keeps in memory."""
    rows = [
        ("SFT", ["prompt + one\ngood answer", "imitate it,\ntoken by token"], "policy"),
        (
            "RLHF",
            [
                "prompt + chosen\n+ rejected",
                "train a\nreward model",
                "sample answers,\nscore them",
                "PPO against\nthe reward",
            ],
            "policy, reference,\nreward model, value model",
        ),
        (
            "DPO",
            ["prompt + chosen\n+ rejected", "one classification\nloss on pairs"],
            "policy\n(adapter off = reference)",
        ),
    ]
    figure, axis = plt.subplots(figsize=(8, 3.3))
    axis.set(xlim=(0, 10.9), ylim=(0.5, 3.7))
    axis.axis("off")
    for y, (name, steps, memory) in zip((3, 2, 1), rows, strict=True):
        colour = ACCENT if name == "DPO" else NEUTRAL
        axis.text(0.05, y, name, fontsize=12, weight="bold", va="center", color=colour)
        for i, step in enumerate(steps):
            x = 0.95 + i * 1.85
            box = FancyBboxPatch(
                (x, y - 0.32), 1.5, 0.64, boxstyle="round,pad=0.03", fc="white", ec=colour, lw=1.4
            )
            axis.add_patch(box)
            axis.text(x + 0.75, y, step, ha="center", va="center", fontsize=8)
            if i:
                arrow = {"arrowstyle": "->", "color": colour}
                axis.annotate("", (x - 0.04, y), (x - 0.31, y), arrowprops=arrow)
        axis.text(8.35, y, memory, fontsize=8.5, va="center", color=colour)
    axis.text(0.95, 3.5, "learns from, and how", fontsize=8.5, color=NEUTRAL)
    axis.text(8.35, 3.5, "models in memory", fontsize=8.5, color=NEUTRAL)
    figure.tight_layout()
    told = "; ".join(
        f"{name}: {', then '.join(steps)}, with {memory} in memory" for name, steps, memory in rows
    )
    return described(figure, f"Three ways to tune a model. {told}.")


def loss_curve() -> Figure:
    """The DPO loss and the weight it gives a pair, against the pair's reward margin."""
    margin = np.linspace(-5, 5, 201)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 3.1))
        axis.plot(margin, np.log1p(np.exp(-margin)), color=ACCENT, label="loss  −log σ(margin)")
        axis.plot(
            margin,
            1 / (1 + np.exp(margin)),
            "--",
            color=NEUTRAL,
            label="push on the pair  σ(−margin)",
        )
        axis.plot(0, np.log(2), "o", color=REJECTED)
        axis.annotate("start: ln 2 ≈ 0.693", (0, np.log(2)), (0.5, 1.5), fontsize=8.5)
        axis.set(xlabel="implicit reward margin, chosen − rejected (nats)", ylim=(0, 4))
        axis.set_ylabel("loss (nats), weight (0 to 1)")
        axis.legend()
        figure.tight_layout()
    return described(
        figure,
        "The DPO loss falls with the reward margin, from 5 nats at a margin of -5 through ln 2 at "
        "0 towards 0; the weight of a pair's gradient falls from 1 through one half to 0.",
    )
