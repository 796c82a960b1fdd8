"""A report on a dataset as tables and text: sizes, lengths, what truncation loses, length bias."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from scripts.pairs.checks import KINDS, SIDES, Finding, Report

# A rule that looks at nothing but length should not do much better than a coin.
MOSTLY_LENGTH = 0.7
Z, WIDTH = 1.96, 0.10  # a 95% interval that reaches so far to either side is enough to tell


def held_out_text(prompts: int) -> str:
    """What so many held-out prompts can show: the 95% interval of a share near one half, each
    prompt counted once however many pairs it has."""
    width = min(Z / 2 / math.sqrt(prompts), 0.5)
    text = f"{prompts:,} held-out prompts tell an accuracy near one half within ±{width:.2f} (95%)"
    if width > WIDTH + 0.005:
        text += (
            f"; ±{WIDTH:.2f} would take {math.ceil(Z**2 / 4 / WIDTH**2)}: add pairs, or hold out "
            "more (test_split_size)"
        )
    return text


def length_bias(lengths: np.ndarray) -> dict[str, float]:
    """How well length alone predicts which answer is chosen.

    Returns the shares of pairs whose chosen answer is the longer (`chosen_longer`) and the shorter
    (`chosen_shorter`), and the accuracy of the better of the two rules "the longer wins" and "the
    shorter wins" (`length_rule_accuracy`; ties count half).

    `lengths` is (pairs, 3): tokens of prompt, chosen and rejected.
    """
    difference = lengths[:, 1] - lengths[:, 2]
    longer, shorter = float((difference > 0).mean()), float((difference < 0).mean())
    rule = max(longer, shorter) + (1 - longer - shorter) / 2
    return {"chosen_longer": longer, "chosen_shorter": shorter, "length_rule_accuracy": rule}


def by_kind(report: Report) -> pd.DataFrame:
    """The findings by kind: whether they are bad, in how many rows, which first, how to fix it."""
    found = pd.DataFrame(report.findings, columns=Finding._fields)
    found = found.drop_duplicates(["kind", "split", "where"])
    rows = [
        {
            "kind": kind,
            "level": "bad" if about.bad else "remark",
            "what": about.what,
            "rows": len(where),
            "first at": ", ".join(where.head(3)),
            "fix": about.fix,
        }
        for kind, about in KINDS.items()
        if len(where := found["where"][found["kind"] == kind])
    ]
    return pd.DataFrame(rows, columns=["kind", "level", "what", "rows", "first at", "fix"])


def length_table(lengths: np.ndarray | pd.DataFrame) -> pd.DataFrame:
    """Median, 95th percentile and maximum of (pairs, 3) tokens of prompt, chosen and rejected."""
    table = pd.DataFrame(np.asarray(lengths), columns=SIDES).quantile([0.5, 0.95, 1.0]).T
    table = table.round().astype(int).set_axis(["median", "p95", "max"], axis=1)
    return table.rename_axis("tokens of")


def _lost(report: Report, split: str) -> pd.DataFrame:
    """How many chosen and rejected answers of a split are cut at `max_length`, and the share of
    tokens that is lost."""
    prompt, *answers = report.lengths[split].T
    rows = {}
    for side, tokens in zip(("chosen", "rejected"), answers, strict=True):
        over = np.clip(prompt + tokens - report.max_length, 0, None)
        rows[side] = {
            "rows cut": int((over > 0).sum()),
            "share": f"{(over > 0).mean():.1%}",
            "tokens lost": f"{over.sum() / (prompt + tokens).sum():.1%}",
        }
    return pd.DataFrame(rows).T


def report_text(report: Report) -> str:
    """The whole report as text: sizes, lengths, what truncation takes, length bias, findings."""
    parts = []
    for split, lengths in report.lengths.items():
        parts.append(
            f"{split}: {report.rows[split]:,} rows, {len(lengths):,} usable pairs "
            f"(format: {report.formats[split]})"
        )
        if len(lengths) == 0:
            continue
        parts.append(length_table(lengths).rename(columns={"median": "p50"}).to_string())
        if report.max_length:
            parts.append(f"cut at max_length {report.max_length} ({report.truncation}):")
            parts.append(_lost(report, split).to_string())
        parts.append(_bias_text(lengths))
        if split == "test":
            parts.append(held_out_text(report.prompts[split]))
        parts.append("")
    findings = by_kind(report)
    if findings.empty:
        return "\n".join([*parts, "Nothing found."])
    parts.append(findings.drop(columns="fix").to_string(index=False))
    parts += ["\nHow to fix it:"] + [f"  {r.kind}: {r.fix}" for r in findings.itertuples()]
    return "\n".join(parts)


def _bias_text(lengths: np.ndarray) -> str:
    """`length_bias` in words, with a warning from `MOSTLY_LENGTH` on if there are enough pairs."""
    bias = length_bias(lengths)
    rule = "longer" if bias["chosen_longer"] > bias["chosen_shorter"] else "shorter"
    text = (
        f"chosen is the longer in {bias['chosen_longer']:.0%}, the shorter in "
        f"{bias['chosen_shorter']:.0%}; the rule 'the {rule} wins' is right in "
        f"{bias['length_rule_accuracy']:.0%}"
    )
    if bias["length_rule_accuracy"] >= MOSTLY_LENGTH and len(lengths) >= 30:
        text += (
            "\nWARNING: the preference is mostly length, and that is what a model will learn. "
            "If it is not\nwhat you want, add pairs of like length, or use loss_type: sigmoid_norm."
        )
    return text
