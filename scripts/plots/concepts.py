"""The tutorial's figures: what DPO is, its loss, 4 bits, runs that fail, tokens, low rank."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from scripts.plots.style import (
    ACCENT,
    ACCENT_MARK,
    BLUE,
    CHOSEN,
    CHOSEN_MARK,
    NEUTRAL,
    ORANGE,
    PALETTE,
    REJECTED,
    REJECTED_MARK,
    STYLE,
    VERMILLION,
    described,
)

SIDES = ("chosen", "rejected")
ARM_STYLES = {  # arms of lessons.json
    "alone": (REJECTED, REJECTED_MARK, "-"),
    "sft": (CHOSEN, CHOSEN_MARK, "--"),
    "sft_fifth": (ACCENT, ACCENT_MARK, "-."),
}
LENGTH_ARMS = {  # the failure and its two cures
    "lopsided": "lopsided pairs,\nlog-ratios of answers",
    "norm": "lopsided pairs,\nlog-ratios per token",
    "alone": "pairs of like length,\nlog-ratios of answers",
}
CONTOURS = (0.05, 0.2, 0.69, 1.5, 3.0)  # nats of loss
STRONGEST = 0.55  # opacity behind a token: text stays readable on light and dark pages


def pipelines() -> Figure:
    """What SFT, RLHF and DPO each learn from, and what each keeps in memory."""
    pairs = "prompt + chosen\n+ rejected"
    rewards = ["train a\nreward model", "sample answers,\nscore them", "PPO against\nthe reward"]
    rows = {
        "SFT": (["prompt + one\ngood answer", "imitate it,\ntoken by token"], "policy"),
        "RLHF": ([pairs, *rewards], "policy, reference,\nreward model, value model"),
        "DPO": ([pairs, "one classification\nloss on pairs"], "policy\n(adapter off = reference)"),
    }
    figure, axis = plt.subplots(figsize=(8, 3.3))
    axis.set(xlim=(0, 10.9), ylim=(0.5, 3.7))
    axis.axis("off")
    for y, (name, (steps, memory)) in zip((3, 2, 1), rows.items(), strict=True):
        colour = ACCENT if name == "DPO" else NEUTRAL
        axis.text(0.05, y, name, fontsize=12, weight="bold", va="center", color=colour)
        for i, step in enumerate(steps):
            x = 0.95 + i * 1.85
            look = {"boxstyle": "round,pad=0.03", "fc": "white", "ec": colour, "lw": 1.4}
            axis.add_patch(FancyBboxPatch((x, y - 0.32), 1.5, 0.64, **look))
            axis.text(x + 0.75, y, step, ha="center", va="center", fontsize=8)
            if i:
                arrow = {"arrowstyle": "->", "color": colour}
                axis.annotate("", (x - 0.04, y), (x - 0.31, y), arrowprops=arrow)
        axis.text(8.35, y, memory, fontsize=8.5, va="center", color=colour)
    axis.text(0.95, 3.5, "learns from, and how", fontsize=8.5, color=NEUTRAL)
    axis.text(8.35, 3.5, "models in memory", fontsize=8.5, color=NEUTRAL)
    figure.tight_layout()
    words = "; ".join(
        f"{name}: {', then '.join(steps)}, with {memory} in memory"
        for name, (steps, memory) in rows.items()
    )
    return described(figure, f"Three ways to tune a model. {words}.")


@plt.rc_context(STYLE)
def loss_curve() -> Figure:
    """The DPO loss and the weight it gives a pair, against the pair's reward margin."""
    margin = np.linspace(-5, 5, 201)
    weight = 1 / (1 + np.exp(margin))
    figure, axis = plt.subplots(figsize=(6.4, 3.1))
    axis.plot(margin, np.log1p(np.exp(-margin)), color=ACCENT, label="loss  −log σ(margin)")
    axis.plot(margin, weight, "--", color=NEUTRAL, label="push on the pair  σ(−margin)")
    axis.plot(0, np.log(2), "o", color=REJECTED)
    axis.annotate("start: ln 2 ≈ 0.693", (0, np.log(2)), (0.5, 1.5), fontsize=8.5)
    axis.set(xlabel="implicit reward margin, chosen − rejected (nats)", ylim=(0, 4),
             ylabel="loss (nats), weight (0 to 1)")  # fmt: skip
    axis.legend()
    return described(
        figure,
        "The DPO loss falls with the reward margin, from 5 nats at a margin of -5 through ln 2 at "
        "0 towards 0; the weight of a pair's gradient falls from 1 through one half to 0.",
    )


@plt.rc_context(STYLE)
def quantization(
    blocks: np.ndarray, levels: dict[str, np.ndarray], ways: dict[str, tuple[float, float]]
) -> Figure:
    """A matrix's weights, each over its block's largest, with the levels of 4-bit formats.

    `blocks` has any shape, values in -1 to 1. `levels` gives each format's by name. `ways` gives,
    by name, a format's relative error and its bits a weight.
    """
    figure, (weights, bars) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=[1.7, 1])
    weights.hist(blocks.ravel(), np.linspace(-1, 1, 101), color=NEUTRAL, alpha=0.45)
    top = weights.get_ylim()[1]
    weights.set_ylim(-0.22 * top, top)
    weights.set_yticks([tick for tick in weights.get_yticks() if 0 <= tick <= top])
    looks = (("|", ACCENT, 2.0), ("x", ORANGE, 1.4))
    for row, (name, at) in enumerate(levels.items()):
        (mark, colour, width), y = looks[row], np.full(len(at), -(0.06 + 0.1 * row) * top)
        weights.plot(at, y, mark, color=colour, ms=10 - 3 * row, mew=width,
                     label=f"{name}: {len(at)} levels")  # fmt: skip
    weights.axhline(0, color="black", lw=0.6)
    weights.set(xlabel="weight / largest of its block of 64", ylabel="weights",
                title="where the weights lie, and the levels")  # fmt: skip
    weights.legend(loc="upper left")
    percent = [100 * error for error, _ in ways.values()]
    colours = (NEUTRAL, ACCENT, "#00557f")[: len(ways)]
    drawn = bars.barh([name.replace(", ", ",\n") for name in ways], percent, color=colours)
    labels = [f"{100 * error:.2f}%, {bits:.2f} bits" for error, bits in ways.values()]
    bars.bar_label(drawn, labels, fontsize=8, label_type="center", color="white")
    bars.invert_yaxis()
    bars.set(xlabel="error (% of the weights' size)", title="what rounding costs")
    bars.grid(axis="y", visible=False)
    words = ", ".join(f"{name} {100 * error:.2f}%" for name, (error, _) in ways.items())
    return described(
        figure,
        "Histogram of one matrix's weights, bell-shaped around zero; NF4's 16 levels lie close "
        f"together in the middle, int4's are evenly spaced. Errors: {words}.",
    )


def coloured_answers(rows: dict[str, tuple[Sequence[str], Sequence[float]]], scale: float) -> str:
    """HTML: answers one below the other, each token coloured by its log-ratio.

    `rows` is `{title: (tokens, log-ratios in nats)}`. Blue and a solid line: the token became more
    probable; vermillion and a dotted line: less. At `scale` nats the colour is at its strongest; a
    token's tooltip has its number.
    """
    parts = [
        '<div style="text-align:left;line-height:1.8;max-width:60em">'
        "<p>log π − log π<sub>ref</sub> of each token: "
        + _token(" more probable than before ", scale, scale)
        + " · "
        + _token(" less probable ", -scale, scale)
        + f" (strongest at {scale:g} nats; hold the pointer over a token for its number)</p>"
    ]
    for title, (tokens, ratios) in rows.items():
        tokens_html = "".join(
            _token(t, float(r), scale) for t, r in zip(tokens, ratios, strict=True)
        )
        total = float(sum(map(float, ratios)))
        heading = f"{html.escape(title)}</b>, {len(tokens)} tokens, sum {total:+.2f} nats"
        parts.append(f"<p><b>{heading}<br>{tokens_html}</p>")
    return "".join(parts) + "</div>"


def _token(text: str, ratio: float, scale: float) -> str:
    strength = min(abs(ratio) / scale, 1.0)
    shown = html.escape(text).replace("\n", "↵<br>")
    if strength < 0.02:
        return f'<span title="{ratio:+.2f} nats">{shown}</span>'
    colour, line = (BLUE, "solid") if ratio > 0 else (VERMILLION, "dotted")
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    style = (
        f"background-color:rgba({red},{green},{blue},{STRONGEST * strength:.2f});"
        f"border-bottom:2px {line} {colour}"
    )
    return f'<span title="{ratio:+.2f} nats" style="{style}">{shown}</span>'


@plt.rc_context(STYLE)
def spectrum(updates: dict[str, np.ndarray]) -> Figure:
    """Singular values of learned updates, largest first, each over its own largest."""
    shares = {name: values / max(values[0], 1e-30) for name, values in updates.items()}
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for i, (name, values) in enumerate(shares.items()):
        axis.plot(range(1, len(values) + 1), values, color=PALETTE[i], marker="oDv^s"[i],
                  label=name)  # fmt: skip
    axis.set(xlabel="direction", ylabel="singular value / largest", ylim=(0, 1.05),
             title="what LoRA learned, direction by direction")  # fmt: skip
    axis.legend()
    words = ", ".join(f"{name}: the last is {values[-1]:.2f}" for name, values in shares.items())
    return described(figure, f"Singular values of learned updates fall from 1. {words}.")


@plt.rc_context(STYLE)
def beta_surface(
    betas: tuple[float, ...] = (0.05, 0.1, 0.5), points: dict | None = None, reach: float = 30
) -> Figure:
    """The DPO loss over the log-ratios of both answers (eq. 7 of the DPO paper), a panel a beta.

    `points` are held-out pairs, `{"chosen": [...], "rejected": [...]}` in nats.
    """
    line = np.linspace(-reach, reach, 161)
    chosen, rejected = np.meshgrid(line, line)
    figure, axes = plt.subplots(1, len(betas), figsize=(8, 3.5), sharey=True, squeeze=False)
    for axis, beta in zip(axes[0], betas, strict=True):
        loss = np.logaddexp(0, -beta * (chosen - rejected))
        axis.contourf(chosen, rejected, loss, levels=(0, *CONTOURS, 99), cmap="cividis_r",
                      norm=plt.Normalize(0, 4))  # fmt: skip
        lines = axis.contour(chosen, rejected, loss, levels=CONTOURS, colors="black",
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
        "Contours of the DPO loss over the log-ratios of the chosen and the rejected answer, for "
        f"beta {', '.join(f'{b:g}' for b in betas)}. All contours run along the diagonal; the loss "
        "falls to the lower right, the faster the higher beta is. The star, where training starts, "
        "is at ln 2. An arrow from it along its contour: both answers fall, the loss stays."
    )
    return described(figure, alt + (" Dots: held-out pairs after a short run." if points else ""))


def _label_contours(axis: Axes, lines: ContourSet, beta: float, reach: float) -> None:
    """Write each contour's loss on it, off the middle, where it does not touch the one before."""
    spots, last = [], -np.inf
    for level in reversed(CONTOURS):
        gap = -np.log(np.expm1(level)) / beta / 2  # where it crosses the other diagonal
        if abs(gap) < 0.7 * reach and (gap - last > 0.14 * reach or level == 0.69):
            spots.append((gap + 0.25 * reach, -gap + 0.25 * reach))
            last = gap
    for text in axis.clabel(lines, fontsize=8, fmt="%g", manual=spots):
        text.set_bbox({"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.85})


@plt.rc_context(STYLE)
def displacement(results: dict) -> Figure:
    """Both answers' log-ratios while training, with and without an SFT term, from `lessons.json`.

    Faint: each step's pairs; strong: the mean of the last four steps; the large mark at the right
    end: held-out pairs after the run.
    """
    arms = {name: results["arms"][name] for name in ARM_STYLES if name in results["arms"]}
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, side in zip(axes, SIDES, strict=True):
        for name, arm in arms.items():
            colour, mark, dash = ARM_STYLES[name]
            steps = arm["steps"]
            ratio = pd.Series(steps[f"rewards/{side}"], steps["step"]) / arm["beta"]
            axis.plot(ratio, color=colour, alpha=0.25, lw=1)
            smooth = ratio.rolling(4, min_periods=1).mean()  # a step is of few pairs
            axis.plot(smooth, dash, color=colour, marker=mark, label=arm["title"])
            end, held = steps["step"][-1] * 1.15, np.mean(arm["held_out"][side])
            axis.plot(end, held, mark, color=colour, ms=12, mec="black")
        axis.axhline(0, color=NEUTRAL, lw=0.8)
        axis.axvline(end * 0.94, color=NEUTRAL, lw=0.8, ls="--")
        axis.set(title=f"{side} answers", xlabel="optimiser step; right of the line: held out")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("log-ratio (nats an answer)")
    axes[0].legend()
    words = "; ".join(
        f"{arm['title']}: on held-out pairs "
        + ", ".join(f"{side} {np.mean(arm['held_out'][side]):+.1f}" for side in SIDES)
        + " nats"
        for arm in arms.values()
    )
    return described(figure, f"Log-ratios of chosen and rejected answers by step. {words}.")


@plt.rc_context(STYLE)
def length_hacking(results: dict) -> Figure:
    """Held-out margins against length, a panel an arm, from `lessons.json`.

    Left of the dashed line the chosen answer is the longer one. Margins are signed square roots, so
    that small ones can be seen beside large ones; what counts is on which side of 0 they lie.
    """
    arms = {t: results["arms"][n]["held_out"] for n, t in LENGTH_ARMS.items()
            if n in results["arms"]}  # fmt: skip
    figure, axes = plt.subplots(1, len(arms), figsize=(8, 3.3), sharex=True, squeeze=False)
    words = []
    for axis, (title, held) in zip(axes[0], arms.items(), strict=True):
        gap, margin = (np.array(held[name], float) for name in ("length_gap", "margin"))
        y = np.sign(margin) * np.sqrt(np.abs(margin))
        for won, colour, mark in ((y > 0, CHOSEN, CHOSEN_MARK), (y <= 0, REJECTED, REJECTED_MARK)):
            axis.plot(np.exp(gap[won]), y[won], mark, color=colour, ms=4.5)
        axis.axhline(0, color=NEUTRAL, lw=0.8)
        axis.axvline(1, color=NEUTRAL, ls="--", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        reach = 1.6 * max(np.abs(y).max(initial=0), 0.1)
        axis.set(title=title, ylim=(-reach, reach), xlabel="rejected / chosen (tokens)")
        places = {"chosen longer": (0.02, "left"), "chosen shorter": (0.98, "right")}
        shares = {n: share for n, share in held["accuracy"].items() if share is not None}
        for name, share in shares.items():
            x, align = places[name]
            axis.text(x, 0.98, f"{name}:\n{share:.0%} right", transform=axis.transAxes, va="top",
                      ha=align, fontsize=8)  # fmt: skip
        told = ", ".join(f"{share:.2f} with the {name}" for name, share in shares.items())
        words.append(f"{title}: accuracy {told}")
    axes[0, 0].set_ylabel("margin (signed root of nats)")
    alt = f"Margins of held-out pairs against the answers' lengths. {'; '.join(words)}."
    return described(figure, alt)
