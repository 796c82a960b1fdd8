"""The lessons, drawn: beta's surface, DPO that fails and its cures, 4 bits, low rank, the head."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure

from scripts.plots.style import (
    ACCENT,
    ACCENT_MARK,
    CHOSEN,
    CHOSEN_MARK,
    NEUTRAL,
    ORANGE,
    PALETTE,
    REJECTED,
    REJECTED_MARK,
    STYLE,
    described,
)

ARM_STYLES = {  # of lessons.failures.ARMS
    "alone": (REJECTED, REJECTED_MARK, "-"),
    "sft": (CHOSEN, CHOSEN_MARK, "--"),
    "sft_fifth": (ACCENT, ACCENT_MARK, "-."),
}
LENGTH_ARMS = {  # the failure and its two cures
    "lopsided": "lopsided pairs,\nlog-ratios of answers",
    "norm": "lopsided pairs,\nlog-ratios per token",
    "alone": "pairs of like length,\nlog-ratios of answers",
}
BASE_HATCH = "///"
LEVELS = (0.05, 0.2, 0.69, 1.5, 3.0)  # nats of loss, a contour each


def beta_surface(
    betas: tuple[float, ...] = (0.05, 0.1, 0.5), points: dict | None = None, reach: float = 30
) -> Figure:
    """The DPO loss over the log-ratios of both answers (eq. 7 of the DPO paper), a panel a beta.

    `points` are held-out pairs, `{"chosen": [...], "rejected": [...]}` in nats, as
    `lessons.json` has them. Every contour runs along the diagonal: the loss does not see how far
    down both answers went together.
    """
    line = np.linspace(-reach, reach, 161)
    chosen, rejected = np.meshgrid(line, line)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(betas), figsize=(8 if len(betas) > 1 else 4.4, 3.5 if len(betas) > 1 else 3.9),
            sharey=True, layout="constrained", squeeze=False,
        )  # fmt: skip
        for axis, beta in zip(axes[0], betas, strict=True):
            loss = np.logaddexp(0, -beta * (chosen - rejected))
            axis.contourf(chosen, rejected, loss, levels=(0, *LEVELS, 99), cmap="cividis_r",
                          norm=plt.Normalize(0, 4))  # fmt: skip
            lines = axis.contour(chosen, rejected, loss, levels=LEVELS, colors="black",
                                 linewidths=0.7)  # fmt: skip
            _label_contours(axis, lines, beta, reach)
            if points:
                dots = {"ms": 4.5, "mfc": ORANGE, "mec": "black", "mew": 0.6}
                axis.plot(points["chosen"], points["rejected"], "o", **dots)
            away = {"arrowstyle": "->", "color": "black", "lw": 1.6}
            axis.annotate("", (-0.55 * reach, -0.55 * reach), (0, 0), arrowprops=away)
            axis.plot(0, 0, "*", color="white", mec="black", ms=12)
            axis.set(title=f"beta = {beta:g}", xlabel="chosen log-ratio (nats)",
                     xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")  # fmt: skip
            axis.grid(False)
        axes[0, 0].set_ylabel("rejected log-ratio (nats)")
    alt = (
        f"Contours of the DPO loss over the log-ratios of the chosen and the rejected answer, for "
        f"beta {', '.join(f'{b:g}' for b in betas)}. All contours run along the diagonal; the loss "
        "falls to the lower right, the faster the higher beta is. The star, where training starts, "
        "is at ln 2."
    )
    alt += " An arrow from it along its contour: both answers fall, the loss stays."
    return described(figure, alt + (" Dots: held-out pairs after a short run." if points else ""))


def _label_contours(axis: Axes, lines: ContourSet, beta: float, reach: float) -> None:
    """Write each contour's loss on it, off the middle, where it does not touch the one before."""
    spots, last = [], -np.inf
    for level in reversed(LEVELS):
        gap = -np.log(np.expm1(level)) / beta / 2  # where it crosses the other diagonal
        if abs(gap) < 0.7 * reach and (gap - last > 0.14 * reach or level == 0.69):
            spots.append((gap + 0.25 * reach, -gap + 0.25 * reach))
            last = gap
    for text in axis.clabel(lines, fontsize=8, fmt="%g", manual=spots):
        text.set_bbox({"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85})


def displacement(results: dict) -> Figure:
    """Both answers' log-ratios while training, with and without an SFT term, from `lessons.json`.

    Faint: each step's pairs; strong: the mean of the last four steps; the large mark at the right
    end, held-out pairs after the run. Likelihood displacement: Razin et al., arXiv 2410.08847,
    section 3.
    """
    names = [name for name in ARM_STYLES if name in results["arms"]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
        for name in names:
            arm, (colour, mark, dash) = results["arms"][name], ARM_STYLES[name]
            steps = arm["steps"]
            for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
                ratio = pd.Series(steps[f"rewards/{side}"], steps["step"]) / arm["beta"]
                axis.plot(ratio, color=colour, alpha=0.25, lw=1)
                smooth = ratio.rolling(4, min_periods=1).mean()  # a step is of few pairs
                axis.plot(smooth, dash, color=colour, marker=mark, label=arm["title"])
                end = steps["step"][-1] * 1.15
                held = np.mean(arm["held_out"][side])
                axis.plot(end, held, mark, color=colour, markersize=12, markeredgecolor="black")
        for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
            axis.axhline(0, color=NEUTRAL, lw=0.8)
            axis.axvline(end * 0.94, color=NEUTRAL, lw=0.8, ls="--")
            axis.set(xlabel="optimiser step; right of the line: held out")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.set_title(f"{side} answers", loc="left")
        axes[0].set_ylabel("log-ratio (nats an answer)")
        axes[0].legend()
    told = "; ".join(_arm_in_words(results["arms"][n]) for n in names)
    return described(figure, f"Log-ratios of chosen and rejected answers by step. {told}.")


def _arm_in_words(arm: dict) -> str:
    chosen, rejected = (np.mean(arm["held_out"][side]) for side in ("chosen", "rejected"))
    return f"{arm['title']}: on held-out pairs chosen {chosen:+.1f}, rejected {rejected:+.1f} nats"


def length_hacking(results: dict) -> Figure:
    """Held-out margins against length, a panel an arm, from `lessons.json`.

    Left of the dashed line the chosen answer is the longer one. Margins are signed square roots, so
    that small ones can be seen beside large ones; what counts is on which side of 0 they lie.
    """
    arms = {t: results["arms"][n] for n, t in LENGTH_ARMS.items() if n in results["arms"]}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(arms), figsize=(8, 3.3), sharex=True, layout="constrained", squeeze=False
        )
        for axis, (title, arm) in zip(axes[0], arms.items(), strict=True):
            _margins_by_length(axis, arm)
            axis.set_title(title, loc="left")
        axes[0, 0].set_ylabel("margin (signed root of nats)")
    told = "; ".join(
        f"{title}: accuracy " + ", ".join(f"{v:.2f} with the {n}" for n, v in _known(arm))
        for title, arm in arms.items()
    )
    return described(figure, f"Margins of held-out pairs against the answers' lengths. {told}.")


def _known(arm: dict) -> list[tuple[str, float]]:
    """The accuracies that there were pairs for."""
    return [(name, v) for name, v in arm["held_out"]["accuracy"].items() if v is not None]


def _margins_by_length(axis: Axes, arm: dict) -> None:
    held = arm["held_out"]
    gap, margin = (np.array(held[name], float) for name in ("length_gap", "margin"))
    y = np.sign(margin) * np.sqrt(np.abs(margin))
    for won, colour, mark in ((y > 0, CHOSEN, CHOSEN_MARK), (y <= 0, REJECTED, REJECTED_MARK)):
        axis.plot(np.exp(gap[won]), y[won], mark, color=colour, ms=4.5)
    reach = 1.6 * max(np.abs(y).max(initial=0), 0.1)
    axis.axhline(0, color=NEUTRAL, lw=0.8)
    axis.axvline(1, color=NEUTRAL, ls="--", lw=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(ylim=(-reach, reach), xlabel="rejected / chosen (tokens)")
    places = {"chosen longer": (0.02, "left"), "chosen shorter": (0.98, "right")}
    for name, value in _known(arm):
        x, side = places[name]
        axis.text(x, 0.98, f"{name}:\n{value:.0%} right", transform=axis.transAxes, va="top",
                  ha=side, fontsize=8)  # fmt: skip


def quantization(blocks: np.ndarray, levels: dict[str, np.ndarray], errors: dict) -> Figure:
    """A matrix's weights, each over its block's largest, with the levels of 4-bit formats.

    `blocks` has any shape, values in -1 to 1; `levels` gives each format's by name; `errors` is
    what `lessons.compression.quantization_errors` returns.
    """
    with plt.rc_context(STYLE):
        figure, (weights, bars) = plt.subplots(
            1, 2, figsize=(8, 3.4), width_ratios=[1.7, 1], layout="constrained"
        )
        weights.hist(blocks.ravel(), np.linspace(-1, 1, 101), color=NEUTRAL, alpha=0.45)
        top = weights.get_ylim()[1]
        weights.set_ylim(-0.22 * top, top)
        weights.set_yticks([tick for tick in weights.get_yticks() if 0 <= tick <= top])
        looks = (("|", ACCENT, 2.0), ("x", ORANGE, 1.4))
        for row, ((name, at), (mark, colour, width)) in enumerate(
            zip(levels.items(), looks, strict=False)
        ):
            y = np.full(len(at), -(0.06 + 0.1 * row) * top)
            weights.plot(at, y, mark, color=colour, ms=10 - 3 * row, mew=width,
                         label=f"{name}: {len(at)} levels")  # fmt: skip
        weights.axhline(0, color="black", lw=0.6)
        weights.set(xlabel="weight / largest of its block of 64", ylabel="weights")
        weights.set_title("where the weights lie, and the levels", loc="left")
        weights.legend(loc="upper left")
        values = [100 * e["error"] for e in errors.values()]
        drawn = bars.barh(
            range(len(errors)), values, color=(NEUTRAL, ACCENT, "#00557f")[: len(errors)]
        )
        labels = [f"{v:.2f}%, {e['bits']:.2f} bits" for v, e in zip(values, errors.values(),
                                                                    strict=True)]  # fmt: skip
        bars.bar_label(drawn, labels, fontsize=8, label_type="center", color="white")
        names = [name.replace(", ", ",\n").replace("double ", "double\n") for name in errors]
        bars.set_yticks(range(len(errors)), names)
        bars.invert_yaxis()
        bars.set(xlabel="error (% of the weights' size)")
        bars.set_title("what rounding costs", loc="left")
        bars.grid(axis="y", visible=False)
    told = ", ".join(f"{n} {100 * e['error']:.2f}%" for n, e in errors.items())
    return described(
        figure,
        "Histogram of one matrix's weights, bell-shaped around zero; NF4's 16 levels lie close "
        f"together in the middle, int4's are evenly spaced. Errors: {told}.",
    )


def spectrum(updates: dict[str, np.ndarray]) -> Figure:
    """Singular values of learned updates, largest first, each over its own largest."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        for i, (name, values) in enumerate(updates.items()):
            axis.plot(np.arange(1, len(values) + 1), values / max(values.max(), 1e-30),
                      color=PALETTE[i], marker="oDv^sPX"[i % 7], label=name)  # fmt: skip
        axis.set(xlabel="direction", ylabel="singular value / largest", ylim=(0, 1.05))
        axis.set_title("what LoRA learned, direction by direction", loc="left")
        axis.legend()
    told = ", ".join(f"{n}: the last is {v[-1] / max(v[0], 1e-30):.2f}" for n, v in updates.items())
    return described(figure, f"Singular values of learned updates fall from 1. {told}.")


def head_memory(peaks: dict[str, float], logits_gb: float, tokens: int) -> Figure:
    """Measured peak memory of scoring answer tokens, by way, in GB; dashed: the logits alone."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.4, 1.9), layout="constrained")
        bars = axis.barh(list(peaks), list(peaks.values()), color=[REJECTED, CHOSEN], height=0.55)
        bars[0].set_hatch(BASE_HATCH)
        axis.axvline(logits_gb, color=NEUTRAL, ls="--",
                     label=f"the logits in float32, {logits_gb:.2f} GB")  # fmt: skip
        for text in axis.bar_label(bars, [f"{v:.2f} GB" for v in peaks.values()], padding=4):
            text.set_bbox({"fc": "white", "ec": "none", "pad": 0.6})
        axis.legend(loc="lower right")
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set(xlabel=f"GB at the peak, {tokens} tokens, forward and backward")
        axis.grid(axis="y", visible=False)
    told = ", ".join(f"{way} {value:.2f} GB" for way, value in peaks.items())
    return described(figure, f"Peak memory of the head: {told}.")
