"""What a mean over prompts is worth: its interval, whether it met an aim, and win rates."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
WIN_RATE_DRAWS = 1000  # each of them is a fit
RIDGE = 1e-2  # keeps the fit finite where every longer answer loses
# With fewer prompts no interval is trusted: a bootstrap of a handful of values, many of them
# equal, is too narrow, and of values that are all equal it has no width at all.
FEWEST_PROMPTS = 30
MET, MISSED, TOO_FEW = "met", "missed", "too few prompts to tell"


@dataclass(frozen=True)
class Aim:
    """Where a figure should lie: `at_least` or `at_most` a bound, in the figure's own unit."""

    figure: str
    text: str
    at_least: float = -np.inf
    at_most: float = np.inf

    def verdict(self, interval: dict) -> str:
        """`met` or `missed` if the whole 95% interval (of `bootstrap`) is on one side of the bound;
        otherwise, or with fewer than `FEWEST_PROMPTS`, the data cannot tell."""
        if interval["prompts"] < FEWEST_PROMPTS:
            return TOO_FEW
        if self.at_least <= interval["low"] and interval["high"] <= self.at_most:
            return MET
        if interval["high"] < self.at_least or interval["low"] > self.at_most:
            return MISSED
        return TOO_FEW


# Set before any run. Those that say "fall by no more than" are tests of non-inferiority: a change
# for the worse is allowed, up to the stated margin.
AIMS = (
    Aim("shorter", "replies at least 30% shorter", at_least=0.30),
    Aim("reward_accuracy", "implicit-reward accuracy at least 0.75", at_least=0.75),
    Aim("repeated", "repeated 4-grams rise by no more than 0.05", at_most=0.05),
    Aim("finished", "replies that finish fall by no more than 0.05", at_least=-0.05),
    Aim("facts", "key facts mentioned fall by no more than 0.05", at_least=-0.05),
)
# For questions on a given text, where right and wrong can be checked.
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


def aims_of(given: dict[str, dict[str, float]] | None, questions: bool) -> tuple[Aim, ...]:
    """The aims of a run: those in its config, else the ones set beforehand for its kind of data.

    `given` is `{figure: {"at_least": ...}}` or `{figure: {"at_most": ...}}`.
    """
    if given is None:
        return QUESTION_AIMS if questions else AIMS
    aims = []
    for figure, bounds in given.items():
        words = " and ".join(f"{bound.replace('_', ' ')} {v:g}" for bound, v in bounds.items())
        aims.append(Aim(figure, f"{figure} {words}", **bounds))
    return tuple(aims)


def bootstrap(
    values: Sequence[float],
    *,
    per: Sequence[float] | None = None,
    prompts: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, float | None]:
    """Mean of `values` with its bootstrap 95% interval (percentile method).

    Prompts are redrawn with replacement. `prompts` names the prompt, or passage, of each value:
    values of the same name are not independent and are drawn together (a cluster bootstrap). To
    compare two models, pass the differences prompt by prompt. With `per` (positive, one for each
    value) the figure is sum(values) / sum(per).

    Returns:
        `mean`, `low`, `high`, and the number of `prompts`. One prompt has no interval (`low` and
        `high` are None).

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


def length_controlled(
    wins: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable],
) -> dict[str, dict[str, float]]:
    """A model's win rate, and the same with the effect of length removed, with 95% intervals.

    AlpacaEval 2's model (arXiv 2404.04475, eq. 2) for one pair of models: a win has the log-odds
    theta + phi * tanh(d / std(d)), where d is the difference of the two lengths in tokens; the
    length-controlled win rate is sigmoid(theta), the rate at equal lengths. Intervals redraw
    `clusters`, such as passages, with all their prompts. `wins` are 1, 0.5 (a tie) or 0 for each
    prompt.

    Returns:
        `raw` and `length_controlled`, each with `mean`, `low` and `high`, between 0 and 1.
    """
    y, d = np.asarray(wins, float), np.subtract(lengths, other_lengths).astype(float)
    x = np.tanh(d / (d.std() or 1.0))
    _, of = np.unique(clusters, return_inverse=True)
    count, random = of.max() + 1, np.random.default_rng(0)
    draws = []
    for _ in range(WIN_RATE_DRAWS):
        weights = np.bincount(random.integers(count, size=count), minlength=count)[of].astype(float)
        draws.append([np.average(y, weights=weights), _at_equal_length(y, x, weights)])
    lows, highs = np.percentile(draws, [2.5, 97.5], axis=0)
    means = y.mean(), _at_equal_length(y, x, np.ones_like(y))
    return {
        name: {"mean": float(means[i]), "low": float(lows[i]), "high": float(highs[i])}
        for i, name in enumerate(("raw", "length_controlled"))
    }


def _at_equal_length(y: np.ndarray, x: np.ndarray, weights: np.ndarray) -> float:
    """sigmoid(theta) of the weighted logistic regression y ~ theta + phi * x (Newton's method)."""
    columns, theta = np.stack([np.ones_like(x), x], 1), np.zeros(2)
    for _ in range(25):
        p = 1 / (1 + np.exp(-columns @ theta))
        gradient = columns.T @ (weights * (y - p)) - RIDGE * theta
        curvature = (columns * (weights * p * (1 - p))[:, None]).T @ columns + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        theta += step
        if np.abs(step).max() < 1e-8:
            break
    return float(1 / (1 + np.exp(-theta[0])))
