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
# How near the first DPO loss must be to ln 2 for the line: another loss type starts elsewhere.
NEAR_LN2 = 0.05


def _smooth(history: pd.DataFrame) -> pd.DataFrame:
    """The running mean of a tenth of the logs."""
    return history.rolling(max(1, len(history) // 10), min_periods=1).mean()


def training_curves(history: pd.DataFrame) -> Figure:
    """DPO loss, rewards, margin with accuracy, and the SFT term or learning rate, by step.

    Terms of the loss are drawn apart if the log has them (`loss/dpo`, `loss/sft`). Faint lines
    are every log, strong lines the running mean of a tenth of them.
    """
    smooth = _smooth(history)
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
    return described(figure, _curves_in_words(history, dpo))


def _curves_in_words(history: pd.DataFrame, dpo: str) -> str:
    """The curves as a screen reader would read them out."""
    first, last = history.iloc[0], _smooth(history).iloc[-1]
    return (
        f"Four curves over {history.index[-1]} steps. {'DPO term' if dpo != 'loss' else 'Loss'} "
        f"from {first[dpo]:.2f} to {last[dpo]:.2f} nats; chosen reward from "
        f"{first['rewards/chosen']:+.2f} to {last['rewards/chosen']:+.2f}, rejected from "
        f"{first['rewards/rejected']:+.2f} to {last['rewards/rejected']:+.2f}; margin to "
        f"{last['rewards/margins']:+.2f}; accuracy from {first['rewards/accuracies']:.2f} to "
        f"{last['rewards/accuracies']:.2f}."
    )


def compared_runs(histories: dict[str, pd.DataFrame]) -> Figure:
    """Margins and rewards of several runs: running means of a tenth of the logs.

    Each run has a colour and a mark; chosen rewards are solid lines, rejected ones dashed.
    """
    with plt.rc_context(STYLE):
        figure, (margins, rewards) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
        for number, (name, history) in enumerate(histories.items()):
            smooth = _smooth(history)
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
    ends = {name: _smooth(history).iloc[-1] for name, history in histories.items()}
    told = "; ".join(
        f"{name}: margin {end['rewards/margins']:+.2f}, "
        f"chosen {end['rewards/chosen']:+.2f} at the end"
        for name, end in ends.items()
    )
    return described(figure, f"Reward margins and rewards of the runs, in nats. {told}.")


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


def memory_timeline(frame: pd.DataFrame, kind: str, planned: dict | None = None) -> Figure:
    """Memory in use over the run, in GB, shaded by phase; `planned` peaks as dashed lines."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 3))
        minutes = frame["seconds"] / 60
        axis.fill_between(minutes, frame["gb"], color=ACCENT, alpha=0.18, lw=0)
        axis.plot(minutes, frame["gb"], color=ACCENT, lw=1.2)
        planned = planned or {}
        top = max(frame["gb"].max(), *planned.values(), 0) * 1.18
        for i, (name, rows) in enumerate(frame.groupby("phase", sort=False)):
            start, end = rows["seconds"].min() / 60, rows["seconds"].max() / 60
            if i % 2:
                axis.axvspan(start, end, color=NEUTRAL, alpha=0.08, lw=0)
            if name in planned:
                axis.hlines(planned[name], start, end, color=REJECTED, lw=1.2, ls="--")
            if end - start > minutes.max() * 0.03:
                label = f"{name}\npeak {rows['gb'].max():.1f}"
                axis.text((start + end) / 2, top, label, ha="center", va="top", fontsize=8)
        axis.set(xlabel="minutes", ylabel=f"{kind} (GB)", ylim=(0, top * 1.02))
        axis.set_xlim(0, minutes.max())
        figure.tight_layout()
    peaks = frame.groupby("phase", sort=False)["gb"].max().items()
    told = ", ".join(f"{name} {gb:.1f} GB" for name, gb in peaks)
    return described(figure, f"{kind} over {minutes.max():.1f} minutes; peaks by phase: {told}.")


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


def benchmark_chart(results: dict) -> Figure:
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
    return described(figure, _cases_in_words(results["cases"]))


def _cases_in_words(cases: dict) -> str:
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
