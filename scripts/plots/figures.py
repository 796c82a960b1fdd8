"""The figures of a run: its data, training, memory, evaluation, and the benchmark."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.pairs.checks import Report
from scripts.pairs.report import by_kind, length_bias
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
SIDES = (("chosen", CHOSEN, CHOSEN_MARK, None), ("rejected", REJECTED, REJECTED_MARK, "////"))
# How near the first DPO loss must be to ln 2 for the line: another loss type starts elsewhere.
NEAR_LN2 = 0.05


def _smooth(history: pd.DataFrame) -> pd.DataFrame:
    """The running mean of a tenth of the logs."""
    return history.rolling(max(1, len(history) // 10), min_periods=1).mean()


@plt.rc_context(STYLE)
def training_curves(history: pd.DataFrame) -> Figure:
    """DPO loss, rewards, margin with accuracy, and the SFT term or learning rate, by step.

    Terms of the loss are drawn apart if the log has them (`loss/dpo`, `loss/sft`). Faint lines
    are every log, strong lines the running mean of a tenth of them.
    """
    smooth = _smooth(history)
    figure, axes = plt.subplots(2, 2, figsize=(8, 5.2), sharex=True)
    (loss, rewards), (margin, last) = axes

    def draw(axis: Axes, column: str, colour: str, mark: str, label: str) -> None:
        axis.plot(history.index, history[column], color=colour, alpha=0.3, lw=1)
        axis.plot(smooth.index, smooth[column], color=colour, lw=1.8, label=label,
                  marker=mark, markevery=max(1, len(smooth) // 8))  # fmt: skip

    dpo, name = ("loss/dpo", "DPO term") if "loss/dpo" in history else ("loss", "loss")
    draw(loss, dpo, ACCENT, ACCENT_MARK, name)
    if abs(history[dpo].iloc[0] - LN2) < NEAR_LN2:
        loss.axhline(LN2, color=NEUTRAL, ls=":", label="ln 2: cannot tell them apart")
    low, high = loss.get_ylim()
    # Room for the legend above the line at ln 2.
    loss.set(title=name, ylabel="nats a pair", ylim=(low, high + 0.3 * (high - low)))
    loss.legend(loc="upper right")
    for side, colour, mark, _ in SIDES:
        draw(rewards, f"rewards/{side}", colour, mark, side)
    rewards.axhline(0, color=NEUTRAL, lw=0.8)
    rewards.set(title="implicit rewards", ylabel="nats")
    rewards.legend()
    draw(margin, "rewards/margins", ACCENT, ACCENT_MARK, "margin (left)")
    margin.set(title="reward margin and accuracy", ylabel="margin (nats)", xlabel="optimiser step")
    accuracy = margin.twinx()
    accuracy.spines["right"].set_visible(True)
    accuracy.grid(False)
    draw(accuracy, "rewards/accuracies", NEUTRAL, NEUTRAL_MARK, "accuracy (right)")
    accuracy.set(ylim=(0, 1.05), ylabel="share of pairs")
    handles = [h for a in (margin, accuracy) for h in a.get_legend_handles_labels()[0]]
    margin.legend(handles=handles, loc="lower right")
    last.set_xlabel("optimiser step")
    if "loss/sft" in history:
        draw(last, "loss/sft", ORANGE, "^", "SFT term")
        last.set(title="SFT term: loss on the chosen answers", ylabel="nats a token")
    else:
        last.plot(history.index, history["learning_rate"], color=ACCENT)
        last.set(title="learning rate", ylabel="per step")
    first, end = history.iloc[0], smooth.iloc[-1]
    return described(
        figure,
        f"Four curves over {history.index[-1]} steps: {name} from {first[dpo]:.2f} to "
        f"{end[dpo]:.2f} nats; chosen reward from {first['rewards/chosen']:+.2f} to "
        f"{end['rewards/chosen']:+.2f}, rejected from {first['rewards/rejected']:+.2f} to "
        f"{end['rewards/rejected']:+.2f}; margin to {end['rewards/margins']:+.2f}; accuracy from "
        f"{first['rewards/accuracies']:.2f} to {end['rewards/accuracies']:.2f}.",
    )


@plt.rc_context(STYLE)
def compared_runs(histories: dict[str, pd.DataFrame]) -> Figure:
    """Margins and rewards of several runs: running means of a tenth of the logs.

    Each run has a colour and a mark; chosen rewards are solid lines, rejected ones dashed.
    """
    figure, (margins, rewards) = plt.subplots(1, 2, figsize=(8, 3.4))
    told = []
    for number, (name, history) in enumerate(histories.items()):
        smooth = _smooth(history)
        look = {"color": PALETTE[number % len(PALETTE)], "marker": MARKS[number % len(MARKS)],
                "markevery": max(1, len(smooth) // 8)}  # fmt: skip
        margins.plot(smooth.index, smooth["rewards/margins"], label=name, **look)
        rewards.plot(smooth.index, smooth["rewards/chosen"], **look)
        rewards.plot(smooth.index, smooth["rewards/rejected"], ls="--", **look)
        end = smooth.iloc[-1]
        told.append(f"{name}: margin {end['rewards/margins']:+.2f}, "
                    f"chosen {end['rewards/chosen']:+.2f} at the end")  # fmt: skip
    rewards.axhline(0, color=NEUTRAL, lw=0.8)
    margins.set(title="reward margin", xlabel="optimiser step", ylabel="nats")
    rewards.set(title="chosen (solid), rejected (dashed)", xlabel="optimiser step", ylabel="nats")
    margins.legend()
    return described(figure, f"Reward margins and rewards of the runs, in nats. {'; '.join(told)}.")


@plt.rc_context(STYLE)
def pair_lengths(lengths: pd.DataFrame) -> Figure:
    """Histograms of the answers' lengths, chosen against rejected, in tokens."""
    figure, axis = plt.subplots(figsize=(6, 2.6))
    bins = np.linspace(0, lengths[["chosen", "rejected"]].to_numpy().max(), 30)
    for side, colour, _, hatch in SIDES:
        axis.hist(lengths[side], bins, alpha=0.65, color=colour, label=side, hatch=hatch)
    axis.set(xlabel="tokens of the answer", ylabel="pairs")
    axis.legend()
    medians = ", ".join(f"{side} {lengths[side].median():.0f}" for side in ("chosen", "rejected"))
    return described(figure, f"Histograms of the answers' lengths; medians in tokens: {medians}.")


@plt.rc_context(STYLE)
def data_check(report: Report) -> Figure:
    """What the check of a dataset found: sequence lengths, length bias, and rows by finding."""
    findings = by_kind(report)
    lengths = np.concatenate(list(report.lengths.values()))
    prompt, chosen, rejected = lengths.T
    figure, (whole, bias, kinds) = plt.subplots(1, 3, figsize=(8, 3.4), width_ratios=[1, 1.1, 0.8])
    if len(lengths):
        bins = np.linspace(0, (prompt + np.maximum(chosen, rejected)).max() + 1, 40)
        for tokens, (side, colour, _, hatch) in zip((chosen, rejected), SIDES, strict=True):
            whole.hist(prompt + tokens, bins, alpha=0.6, color=colour, label=side, hatch=hatch)
        top = max(chosen.max(), rejected.max()) * 1.05
        shown = np.random.default_rng(0).permutation(len(lengths))[:3000]
        bias.scatter(chosen[shown], rejected[shown], 7, ACCENT, alpha=0.35, lw=0)
        bias.plot([0, top], [0, top], color=NEUTRAL, lw=0.8, ls="--")
        share = length_bias(lengths)
        title = "chosen is shorter in {chosen_shorter:.0%},\nlonger in {chosen_longer:.0%}"
        bias.set(xlim=(0, top), ylim=(0, top), title=title.format(**share))
    if report.max_length:
        whole.axvline(report.max_length, color="black", lw=1, ls=":", label="max_length")
    whole.set(title="prompt and answer", xlabel="tokens", ylabel="pairs")
    whole.legend()
    bias.set(xlabel="tokens of chosen", ylabel="tokens of rejected")
    colours = [REJECTED if level == "bad" else NEUTRAL for level in findings["level"]]
    names = [f"× {row.kind}" if row.level == "bad" else row.kind for row in findings.itertuples()]
    bars = kinds.barh(names, findings["rows"], color=colours, alpha=0.85)
    kinds.bar_label(bars, padding=3, fontsize=8)
    kinds.set(ylim=(max(len(findings), 4) - 0.4, -0.6), xlabel="rows",
              title="findings (×: bad rows)" if len(findings) else "no findings")  # fmt: skip
    kinds.margins(x=0.15)
    kinds.grid(axis="y", visible=False)
    told = ", ".join(f"{row.kind} in {row.rows} rows" for row in findings.itertuples())
    return described(
        figure,
        f"The check of a dataset: lengths of {len(lengths)} pairs with their prompts, tokens of "
        f"chosen against rejected answers, and findings: {told or 'none'}.",
    )


@plt.rc_context(STYLE)
def memory_timeline(frame: pd.DataFrame, kind: str) -> Figure:
    """Memory in use over the run, in GB, shaded by phase."""
    figure, axis = plt.subplots(figsize=(8, 3))
    minutes, told = frame["seconds"] / 60, []
    axis.fill_between(minutes, frame["gb"], color=ACCENT, alpha=0.18, lw=0)
    axis.plot(minutes, frame["gb"], color=ACCENT, lw=1.2)
    top = frame["gb"].max() * 1.18
    for i, (name, rows) in enumerate(frame.groupby("phase", sort=False)):
        start, end = rows["seconds"].min() / 60, rows["seconds"].max() / 60
        if i % 2:
            axis.axvspan(start, end, color=NEUTRAL, alpha=0.08, lw=0)
        if end - start > minutes.max() * 0.03:
            label = f"{name}\npeak {rows['gb'].max():.1f}"
            axis.text((start + end) / 2, top, label, ha="center", va="top", fontsize=8)
        told.append(f"{name} {rows['gb'].max():.1f} GB")
    axis.set(xlabel="minutes", ylabel=f"{kind} (GB)", ylim=(0, top * 1.02), xlim=(0, minutes.max()))
    words = f"{kind} over {minutes.max():.1f} minutes; peaks by phase: {', '.join(told)}."
    return described(figure, words)


# What `before_after` shows of questions on texts, and of other prompts: there is only the form.
SHARES = {"exact": "right, nothing\nwrong beside", "first": "in the first\nsentence",
          "mentioned": "mentioned", "finished": "finish"}  # fmt: skip
FORM = {"finished": "finish", "facts": "key facts", "repeated": "repeated\n4-grams"}


@plt.rc_context(STYLE)
def before_after(figures: dict, frame: pd.DataFrame) -> Figure:
    """Reply lengths prompt by prompt, and the shares that must not get worse, with intervals."""
    figure, (lengths, shares) = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=[1.15, 1])
    order = frame.sort_values("base_length", ignore_index=True)
    models = (("base", NEUTRAL, "s", "////", -0.13), ("tuned", ACCENT, "o", None, 0.13))
    measures = figures["measures"]
    titles = SHARES if "exact" in measures else FORM
    titles = {name: title for name, title in titles.items() if name in measures}
    for who, colour, mark, hatch, shift in models:
        tokens, done = order[f"{who}_length"], order[f"{who}_finished"]
        lengths.scatter(order.index[done], tokens[done], 16, colour, marker=mark, label=who)
        lengths.scatter(order.index[~done], tokens[~done], 22, colour, marker="x")
        lengths.axhline(tokens.mean(), color=colour, lw=1, ls="--")
        means = [measures[name][who]["mean"] for name in titles]
        places = np.arange(len(means)) + shift
        shares.bar(places, means, 0.24, color=colour, alpha=0.85, hatch=hatch, label=who)
        for place, mean, name in zip(places, means, titles, strict=True):
            low, high = (measures[name][who][end] for end in ("low", "high"))
            if low is not None:  # one prompt has no interval
                error = [[mean - low], [high - mean]]
                shares.errorbar(place, mean, error, color="black", lw=1, capsize=3)
    lengths.set(title=f"reply length: {figures['shorter']['mean']:.0%} shorter (× = cut off)",
                xlabel="held-out prompts, by the base model's length",
                ylabel="tokens of the reply")  # fmt: skip
    lengths.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=True)
    shares.set_xticks(range(len(titles)), titles.values())
    shares.set(ylim=(0, 1.05), ylabel="share", title="shares, with 95% intervals")
    shares.legend()
    told = ", ".join(
        f"{' '.join(title.split())} {measures[name]['base']['mean']:.2f} to "
        f"{measures[name]['tuned']['mean']:.2f}"
        for name, title in titles.items()
    )
    return described(
        figure,
        f"Before and after on {len(frame)} prompts. Reply length {frame['base_length'].mean():.0f} "
        f"to {frame['tuned_length'].mean():.0f} tokens on average; shares: {told}.",
    )


TRAINERS = {
    "trl": ("TRL's trainer, its fastest attention", NEUTRAL, NEUTRAL_MARK, "////"),
    "shared": ("prefix sharing", ACCENT, ACCENT_MARK, None),
}


@plt.rc_context(STYLE)
def benchmark_chart(results: dict) -> Figure:
    """Speed and peak memory of both trainers by case, and how the time of a pair grows.

    `results` is what `scripts.benchmark` writes as `benchmark.json`. Bars are medians of all
    measured steps, the lines at their ends reach from the slowest to the fastest.
    """
    cases, growth = results["cases"], results["growth"]
    figure = plt.figure(figsize=(8, 6.6 if growth else 3.8))
    heights = [3.8, 2.6] if growth else [1]
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    speed, memory = (figure.add_subplot(spot) for spot in rows[0].subgridspec(1, 2))
    _draw_bars(speed, cases, "rates", "pairs a second")
    _draw_bars(memory, cases, "peak_gb", "peak memory (GB)")
    memory.set_yticklabels([])
    handles, labels = memory.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    for at, (what, sizes) in enumerate(growth.items()):
        axis = figure.add_subplot(rows[1].subgridspec(1, len(growth))[at])
        _draw_growth(axis, sizes, what)
    told = "; ".join(
        f"{case}: "
        + ", ".join(
            f"{label} {np.median(_every(found[name], 'rates')):.2f} pairs a second and "
            f"{np.median(_every(found[name], 'peak_gb')):.1f} GB"
            for name, label in (("trl", "TRL"), ("shared", "prefix sharing"))
        )
        for case, found in cases.items()
    )
    return described(figure, f"Speed and peak memory of both trainers, by case. {told}.")


def _every(runs: list[dict], key: str) -> np.ndarray:
    """The values of all runs; 0 if the trainer failed in every one."""
    return np.hstack([run[key] for run in runs if key in run] or [0])


def _draw_bars(axis: Axes, cases: dict, key: str, title: str) -> None:
    """Two bars a case: the medians of `key`, with lines from the lowest to the highest."""
    looks = zip((-0.2, 0.2), TRAINERS.items(), strict=True)
    for shift, (name, (label, colour, _, hatch)) in looks:
        values = [_every(found[name], key) for found in cases.values()]
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
    axis.set(title="how time grows", ylabel="seconds a pair",
             xlabel="tokens of the prompt" if what == "prompt" else "pairs at a time")  # fmt: skip
    axis.set_ylim(bottom=0)
