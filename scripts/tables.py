"""The replies of an evaluation as figures with intervals, and these as tables."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd

from scripts.intervals import bootstrap

# The measures of a reply: their names in columns and figures, and in tables.
MEASURES = {
    "exact": "right, nothing wrong or made up",
    "first": "right in the first sentence",
    "mentioned": "right answer mentioned",
    "declined": "not in the text, and says so",
    "refused": "in the text, yet declined",
    "unsupported": "sentences that the text lacks",
    "length": "reply length (tokens)",
    "finished": "replies that finish",
    "repeated": "repeated 4-grams",
    "base_nll": "base-model loss per token",
    "facts": "key facts mentioned",
    "follows": "instructions followed",
}
# What the base model can do without training, and for less: tuning has to beat it.
BASELINES = {
    "asked": "base, asked to be brief",
    "cut": "base, first sentence only",
    "unrepeated": "base, no 4-gram twice",
}


def compared(frame: pd.DataFrame, one: str = "base", other: str = "tuned") -> dict[str, dict]:
    """Each measure of two models' replies, and the change prompt by prompt, with its interval.

    `both_finish` is the change on the prompts where both replies finish: a gain that is only there
    because the other model was cut off at the limit disappears in it.
    """
    both = (frame[f"{one}_finished"] & frame[f"{other}_finished"]).to_numpy(bool)
    measures = {}
    for name in MEASURES:
        columns = [f"{who}_{name}" for who in (one, other)]
        if not {*columns} <= {*frame}:
            continue
        first, second = frame[columns].to_numpy(float).T
        asked = ~np.isnan(first)  # some measures do not apply to every prompt
        figures = {one: (first, asked), other: (second, asked), "change": (second - first, asked),
                   "both_finish": (second - first, asked & both)}  # fmt: skip
        if asked.any():
            measures[name] = {
                figure: bootstrap(values[which], prompts=frame["cluster"][which])
                for figure, (values, which) in figures.items()
                if which.any()
            }
    return measures


def checked_wins(frame: pd.DataFrame) -> np.ndarray:
    """1 where the checker of the questions finds the tuned reply better, 0 worse, 0.5 a tie.

    Exact beats not exact; then right in the first sentence beats not.
    """
    grade = {
        who: 2 * frame[f"{who}_exact"] + frame[f"{who}_first"].fillna(0)
        for who in ("base", "tuned")
    }
    return (np.sign(grade["tuned"] - grade["base"]).to_numpy() + 1) / 2


def with_interval(value: dict, signed: bool = False) -> str:
    """A figure of `bootstrap` as text: `0.73 [0.65, 0.80]`."""
    sign, digits = "+" if signed else "", 1 if abs(value["mean"]) >= 10 else 2
    ends = [value["low"], value["high"]]
    mean, *ends = (f"{x:{sign}.{digits}f}" for x in [value["mean"], *ends] if x is not None)
    return f"{mean} [{', '.join(ends) or 'one prompt'}]"


def measures_table(measures: dict) -> pd.DataFrame:
    """Base, tuned, the change with its 95% interval, and the change where both replies finish."""
    rows = {}
    for name, m in measures.items():
        row = {who: with_interval(m[who]) for who in ("base", "tuned")}
        row["change"] = with_interval(m["change"], signed=True)
        both = m.get("both_finish")
        row["change where both finish"] = with_interval(both, signed=True) if both else ""
        rows[MEASURES[name]] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def evaluation_table(figures: dict) -> pd.DataFrame:
    """The figures as one table: base, tuned, and the change with its 95% interval."""
    table = measures_table(figures["measures"])
    # Before training every implicit reward is 0: each pair is a tie, and there is no margin.
    for label, base, name in (
        ("implicit-reward accuracy", "0.50", "reward_accuracy"),
        ("implicit-reward margin (nats)", "0", "reward_margin"),
    ):
        table.loc[label, ["base", "tuned"]] = [base, with_interval(figures[name])]
    return table.fillna("")


def win_rates(figures: dict) -> pd.DataFrame:
    """The tuned model's win rate over the base, as it is and with length removed."""
    rates = figures.get("win_rate", {})
    names = {"raw": "win rate", "length_controlled": "at equal length"}
    rows = {text: with_interval(rates[name]) for name, text in names.items() if name in rates}
    return pd.DataFrame({"tuned over base": rows})


def baselines_table(figures: dict) -> pd.DataFrame:
    """What the base can do by other means, beside the base as it is and the tuned model."""
    shown = ("exact", "first", "mentioned", "declined", "facts", "length", "finished", "repeated")
    measures = figures["measures"]
    columns = {"base": (measures, "base")}
    for who, label in BASELINES.items():
        if label in figures["baselines"]:
            columns[label] = (figures["baselines"][label], who)
    columns["tuned with DPO"] = (measures, "tuned")
    return pd.DataFrame(
        {
            label: {MEASURES[n]: with_interval(of[n][who]) for n in shown if n in measures}
            for label, (of, who) in columns.items()
        }
    )


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows where the checker finds the tuned reply worse, the worst first."""
    worse = frame[checked_wins(frame) == 0]
    return worse.sort_values(["base_exact", "tuned_unsupported"], ascending=False, kind="stable")


def side_by_side(frame: pd.DataFrame, clip: int = 400) -> str:
    """An HTML table of the prompts in `frame` with both replies and their lengths.

    Replies to questions on a text stand beside it, each marked right or wrong by the checker.
    """
    # On each cell, because JupyterLab's own style aligns cells of tables to the right.
    cell = "<td style='text-align:left;vertical-align:top'>"
    lines = []
    for _, row in frame.iterrows():
        asked = f"<b>{html.escape(row.get('question') or row['prompt'])}</b>"
        if "passage" in row:
            asked = f"{html.escape(row['passage'])}<br>{asked}"
        line = f"{cell}{asked}</td>"
        for who in ("base", "tuned"):
            text = row[who] if len(row[who]) <= clip else row[who][:clip] + " …"
            note = f"{row[f'{who}_length']} tokens" + ", cut off" * (not row[f"{who}_finished"])
            if f"{who}_exact" in row:
                note = f"{'✓ right' if row[f'{who}_exact'] else '✗ not right'}, {note}"
            line += f"{cell}{html.escape(text)}<br><i>{note}</i></td>"
        lines.append(f"<tr>{line}</tr>")
    head = "".join(
        f"<th style='text-align:left;width:{width}%'>{name}</th>"
        for name, width in (("prompt", 40), ("before", 30), ("after", 30))
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
