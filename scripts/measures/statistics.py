"""What a mean over prompts is worth: its interval, and whether an aim was met."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
# Of fewer prompts no interval is trusted: drawn from a handful of values, many of them equal, it
# comes out too narrow, and of equal ones it has no width at all.
FEWEST_PROMPTS = 30
MET, MISSED, TOO_FEW = "met", "missed", "too few prompts to tell"


@dataclass(frozen=True)
class Aim:
    """Where a figure should lie: `at_least` or `at_most` so much, in the figure's own unit."""

    figure: str
    text: str
    at_least: float = -np.inf
    at_most: float = np.inf

    def verdict(self, interval: dict) -> str:
        """`met` or `missed` if the whole 95% interval is on one side of the bound.

        Otherwise, and with fewer than `FEWEST_PROMPTS`, the data cannot tell, and that is the
        verdict. So little data never meets an aim. `interval` is what `bootstrap` returns.
        """
        if interval["prompts"] < FEWEST_PROMPTS:
            return TOO_FEW
        if self.at_least <= interval["low"] and interval["high"] <= self.at_most:
            return MET
        if interval["high"] < self.at_least or interval["low"] > self.at_most:
            return MISSED
        return TOO_FEW


# Set beforehand. The last three are tests of non-inferiority: a change for the worse is allowed,
# but no more than the margin that is stated, five in a hundred.
AIMS = (
    Aim("shorter", "replies at least 30% shorter", at_least=0.30),
    Aim("reward_accuracy", "implicit-reward accuracy at least 0.75", at_least=0.75),
    Aim("repeated", "repeated 4-grams rise by no more than 0.05", at_most=0.05),
    Aim("finished", "replies that finish fall by no more than 0.05", at_least=-0.05),
    Aim("facts", "key facts mentioned fall by no more than 0.05", at_least=-0.05),
)


# Of questions on a given text, where right and wrong can be checked.
QUESTION_AIMS = (
    Aim("exact", "exact answers up by at least 0.20", at_least=0.20),
    Aim("first", "right in the first sentence up by at least 0.10", at_least=0.10),
    Aim("mentioned", "right answers mentioned fall by no more than 0.03", at_least=-0.03),
    Aim("shorter", "replies at least 50% shorter", at_least=0.50),
    Aim("tuned_finished", "at least 0.90 of the replies finish", at_least=0.90),
    Aim("reward_accuracy", "implicit-reward accuracy at least 0.75", at_least=0.75),
    Aim("plain questions: facts", "key facts of plain questions fall by no more than 0.10",
        at_least=-0.10),
    Aim("instructions: follows", "instructions followed fall by no more than 0.10",
        at_least=-0.10),
)  # fmt: skip


BOUNDS = {"at_least": "at least", "at_most": "at most"}


def aims_of(given: dict[str, dict[str, float]] | None, questions: bool) -> tuple[Aim, ...]:
    """The aims of a run: those its config gives, else the ones set beforehand for its data.

    `given` is `{figure: {"at_least": ...}}` or `{figure: {"at_most": ...}}`.
    """
    if given is None:
        return QUESTION_AIMS if questions else AIMS
    return tuple(
        Aim(figure, f"{figure} " + " and ".join(f"{BOUNDS[k]} {v:g}" for k, v in b.items()), **b)
        for figure, b in given.items()
    )


def bootstrap(
    values: Sequence[float],
    *,
    per: Sequence[float] | None = None,
    prompts: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, float | None]:
    """Mean of `values` with its bootstrap 95% interval, by the percentile method.

    What is drawn again with replacement is prompts. `prompts` names the prompt of each value;
    values of one prompt are not independent, and are drawn together (a cluster bootstrap). Without
    it each value is a prompt's own. For two models compare them prompt by prompt: hand in the
    differences. With `per`, positive and as long as `values`, the figure is sum(values) / sum(per).

    Returns:
        `mean`, `low`, `high`, and the number of `prompts`. Of one prompt there is no interval, and
        `low` and `high` are None; of values that are all equal it has no width, whatever their
        number.

    Raises:
        ValueError: there are no values.
    """
    tops = np.asarray(values, float)
    if not len(tops):
        raise ValueError("no values to take a mean of")
    bottoms = np.ones_like(tops) if per is None else np.asarray(per, float)
    if prompts is not None:
        _, of = np.unique(prompts, return_inverse=True)
        tops, bottoms = np.bincount(of, tops), np.bincount(of, bottoms)
    mean, count = float(tops.sum() / bottoms.sum()), len(tops)
    if count == 1:
        return {"mean": mean, "low": None, "high": None, "prompts": 1}
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    again = tops[picks].sum(axis=1) / bottoms[picks].sum(axis=1)
    low, high = np.percentile(again, [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high), "prompts": count}
