"""Small measures of a reply's text, used to rank answers and to evaluate the tuned model."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence


def repeated_ngram_share(tokens: Sequence[Hashable], n: int = 4) -> float:
    """Share of `tokens`' n-grams that stood in it before: 0 is none, near 1 is a loop.

    This is 1 - distinct/total, the `seq-rep-n` of Welleck et al. 2019 (arXiv 1908.04319), eq. 11.
    A reply shorter than `n` tokens has no n-gram, and repeats nothing.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def are_facts(value: object) -> bool:
    """Whether `value` is a list of facts, each a list of spellings that are not empty."""
    return isinstance(value, list) and all(
        isinstance(fact, list) and fact and all(isinstance(s, str) and s.strip() for s in fact)
        for fact in value
    )


def fact_recall(text: str, facts: list[list[str]]) -> float:
    """Share of the key facts that `text` mentions, between 0 and 1.

    A fact is a list of spellings or word stems, any of which counts; it must start at a word
    boundary ("rotat" finds "rotates", "ice" does not find "nice"), and a number must stand alone.
    It is a check that content is still there, not that every sentence is true.
    """
    mentioned = [any(mentions(text, spelling) for spelling in fact) for fact in facts]
    return sum(mentioned) / len(mentioned) if mentioned else 1.0


def mentions(text: str, spelling: str) -> bool:
    """Whether `spelling` stands in `text`, from a word's beginning on; a number stands alone."""
    start = r"(?<!\d[.,:])" if spelling[0].isdigit() else ""
    end = r"(?![.,:]?\d)" if spelling[-1].isdigit() else ""
    return (
        re.search(rf"(?<![\w^]){start}{re.escape(spelling)}{end}", text, re.IGNORECASE) is not None
    )
