"""The figures of the notebook. Each function takes data and returns a matplotlib figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from scripts.checks import Report, by_kind, length_bias

CHOSEN, REJECTED, NEUTRAL, ACCENT = "#1b7f5c", "#c0392b", "#6b7280", "#2b5fb3"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


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
    figure, axis = plt.subplots(figsize=(9, 3.3))
    axis.set(xlim=(0, 10.6), ylim=(0.2, 3.6))
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
        axis.text(8.4, y, memory, fontsize=8, va="center", color=colour)
    axis.text(0.95, 3.5, "learns from, and how", fontsize=8, color=NEUTRAL)
    axis.text(8.4, 3.5, "models in memory", fontsize=8, color=NEUTRAL)
    figure.tight_layout()
    return figure


def loss_curve() -> Figure:
    """The DPO loss and the weight it gives a pair, against the pair's reward margin."""
    margin = np.linspace(-5, 5, 201)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.5, 2.9))
        axis.plot(margin, np.log1p(np.exp(-margin)), color=ACCENT, label="loss  −log σ(margin)")
        axis.plot(
            margin,
            1 / (1 + np.exp(margin)),
            "--",
            color=NEUTRAL,
            label="push on the pair  σ(−margin)",
        )
        axis.plot(0, np.log(2), "o", color=REJECTED)
        axis.annotate("start: ln 2 ≈ 0.693", (0, np.log(2)), (0.5, 1.5), fontsize=8)
        axis.set(xlabel="implicit reward margin, chosen − rejected", ylim=(0, 4))
        axis.legend()
        figure.tight_layout()
    return figure


def pair_lengths(lengths: pd.DataFrame) -> Figure:
    """Histograms of the answers' lengths, chosen against rejected, in tokens."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 2.6))
        bins = np.linspace(0, lengths[["chosen", "rejected"]].to_numpy().max(), 30)
        for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
            axis.hist(lengths[side], bins, alpha=0.65, color=colour, label=side)
        axis.set(xlabel="tokens of the answer", ylabel="pairs")
        axis.legend()
        figure.tight_layout()
    return figure


def data_check(report: Report) -> Figure:
    """What the check of a dataset found: sequence lengths, length bias, and rows by finding."""
    found = by_kind(report)
    lengths = np.concatenate(list(report.lengths.values()))
    prompt, chosen, rejected = lengths.T
    with plt.rc_context(STYLE):
        figure, (whole, bias, kinds) = plt.subplots(
            1, 3, figsize=(11, 3.4), gridspec_kw={"width_ratios": [1, 1.1, 1]}
        )
        if len(lengths):
            bins = np.linspace(0, (prompt + np.maximum(chosen, rejected)).max() + 1, 40)
            for side, tokens, colour in (
                ("chosen", chosen, CHOSEN),
                ("rejected", rejected, REJECTED),
            ):
                whole.hist(prompt + tokens, bins, alpha=0.55, color=colour, label=side)
            top = max(chosen.max(), rejected.max()) * 1.05
            shown = np.random.default_rng(0).permutation(len(lengths))[:3000]
            bias.scatter(chosen[shown], rejected[shown], 7, ACCENT, alpha=0.35, lw=0)
            bias.plot([0, top], [0, top], color=NEUTRAL, lw=0.8, ls="--")
            bias.set(xlim=(0, top), ylim=(0, top))
            share = length_bias(lengths)
            shares = share["chosen_shorter"], share["chosen_longer"]
            title = "chosen is shorter in {:.0%}, longer in {:.0%}".format(*shares)
            bias.set_title(title, loc="left")
        if report.max_length:
            whole.axvline(report.max_length, color="black", lw=1, ls=":", label="max_length")
        whole.set_title("prompt and answer (tokens)", loc="left")
        whole.set_ylabel("pairs")
        whole.legend()
        bias.set(xlabel="tokens of chosen", ylabel="tokens of rejected")
        colours = [REJECTED if level == "bad" else NEUTRAL for level in found["level"]]
        bars = kinds.barh(found["kind"], found["rows"], color=colours, alpha=0.85)
        kinds.bar_label(bars, padding=3, fontsize=8)
        kinds.set(ylim=(max(len(found), 4) - 0.4, -0.6), xlabel="rows")
        kinds.margins(x=0.15)
        kinds.grid(axis="y", visible=False)
        kinds.set_title("findings (red: bad rows)" if len(found) else "no findings", loc="left")
        figure.tight_layout()
    return figure


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


def plan_memory(planned: pd.DataFrame) -> Figure:
    """What `plan.memory_table` foretells: a bar a phase, in GB, stacked by part."""
    parts = planned.drop("peak")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 2.6))
        left = np.zeros(len(parts.columns))
        for part, colour in zip(parts.index, plt.get_cmap("tab20").colors, strict=False):
            size = parts.loc[part].fillna(0).to_numpy()
            axis.barh(parts.columns, size, 0.62, left=left, color=colour, label=part)
            left += size
        for y, total in enumerate(left):
            axis.text(total, y, f" {total:.1f}", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="GB, planned", xlim=(0, left.max() * 1.08))
        axis.grid(axis="y", visible=False)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7.5)
        figure.tight_layout()
    return figure


def memory_timeline(frame: pd.DataFrame, kind: str, planned: dict | None = None) -> Figure:
    """Memory in use over the run, in GB, shaded by phase; `planned` peaks as dashed lines."""
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 3))
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
                axis.text((start + end) / 2, top, label, ha="center", va="top", fontsize=7.5)
        axis.set(xlabel="minutes", ylabel=f"{kind} (GB)", ylim=(0, top * 1.02))
        axis.set_xlim(0, minutes.max())
        figure.tight_layout()
    return figure


def before_after(figures: dict, frame: pd.DataFrame) -> Figure:
    """Reply lengths prompt by prompt, and the shares that must not get worse, with intervals."""
    with plt.rc_context(STYLE):
        figure, (lengths, shares) = plt.subplots(
            1, 2, figsize=(9, 3.4), gridspec_kw={"width_ratios": [1.1, 1]}
        )
        order = frame.sort_values("base_length", ignore_index=True)
        for who, colour in (("base", NEUTRAL), ("tuned", ACCENT)):
            done = order[f"{who}_finished"]
            lengths.scatter(order.index[done], order[f"{who}_length"][done], 16, colour, label=who)
            cut = order.index[~done]
            lengths.scatter(cut, order[f"{who}_length"][~done], 22, colour, marker="x")
            mean = frame[f"{who}_length"].mean()
            lengths.axhline(mean, color=colour, lw=1, ls="--")
        lengths.set_title(
            f"reply length: {figures['shorter']:.0%} shorter on average (× = cut off)", loc="left"
        )
        lengths.set(xlabel="held-out prompts, by the base model's length", ylabel="tokens")
        lengths.legend(loc="upper left", bbox_to_anchor=(0, 0.9), frameon=True)
        names = [n for n in ("finished", "facts", "repeated") if n in figures["measures"]]
        titles = {"finished": "finish", "facts": "key facts", "repeated": "repeated\n4-grams"}
        for x, name in enumerate(names):
            for shift, who, colour in ((-0.13, "base", NEUTRAL), (0.13, "tuned", ACCENT)):
                value = figures["measures"][name][who]
                error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
                shares.bar(x + shift, value["mean"], 0.24, color=colour, alpha=0.85)
                shares.errorbar(x + shift, value["mean"], error, color="black", lw=1, capsize=3)
        shares.set_xticks(range(len(names)), [titles[n] for n in names])
        shares.set(ylim=(0, 1.05))
        shares.set_title("share, with 95% interval (grey: base, blue: tuned)", loc="left")
        figure.tight_layout()
    return figure


def benchmark(results: dict) -> Figure:
    """Speed and peak memory of both trainers by case, and how the time of a pair grows."""
    names = {"trl": ("TRL's trainer", NEUTRAL), "shared": ("prefix sharing", ACCENT)}
    growth = results["growth"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2 + len(growth), figsize=(6.4 + 3 * len(growth), 3.6), width_ratios=[2, 2]
            + [1.3] * len(growth), layout="constrained",
        )  # fmt: skip
        cases = list(results["cases"])
        for axis, key, title in (
            (axes[0], "pairs_per_second", "pairs a second"),
            (axes[1], "peak_gb", "peak memory (GB)"),
        ):
            for shift, (name, (label, colour)) in zip((-0.2, 0.2), names.items(), strict=True):
                values = [
                    np.median([r[key] for r in results["cases"][c][name] if "error" not in r] or 0)
                    for c in cases
                ]
                bars = axis.barh(np.arange(len(cases)) + shift, values, 0.38, color=colour)
                axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
                bars.set_label(label)
            axis.set_yticks(range(len(cases)), cases if axis is axes[0] else [""] * len(cases))
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(title, loc="left")
            axis.grid(axis="y", visible=False)
        handles, labels = axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        for axis, (what, found) in zip(axes[2:], growth.items(), strict=True):
            for name, (_, colour) in names.items():
                runs = {c: r[name][0] for c, r in found.items() if "error" not in r[name][0]}
                sizes = [c.split("/")[0] if what == "prompt" else c.split("x")[1] for c in runs]
                times = [1 / run["pairs_per_second"] for run in runs.values()]
                axis.plot([int(size) for size in sizes], times, "o-", color=colour, ms=4)
            axis.set_title("seconds a pair", loc="left")
            axis.set_xlabel("tokens of the prompt" if what == "prompt" else "pairs at a time")
            axis.set_ylim(bottom=0)
    return figure


def save(figure: Figure, path) -> None:
    """Write `figure` as a PNG at `path`, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
