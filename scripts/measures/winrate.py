"""How often one model's answers win, and how often they would if lengths were equal."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

DRAWS = 1000
RIDGE = 1e-2  # holds the fit finite where every longer answer loses


def length_controlled(
    wins: Sequence[float],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
    clusters: Sequence[Hashable],
) -> dict[str, dict[str, float]]:
    """The win rate as it is, and with the effect of length taken out, with 95% intervals.

    AlpacaEval 2's model (arXiv 2404.04475, eq. 2) for one pair of models: a win has the log-odds
    theta + phi * tanh(d / std(d)), d the difference of the two lengths; the length-controlled win
    rate is sigmoid(theta), what is left of it at equal lengths. A judge that reads answers in an
    order is asked in both, and a verdict that turns with the order is a tie, 0.5: that takes the
    position out before the fit. Intervals draw `clusters`, such as passages, with all prompts.

    Where one model is nearly always the shorter, few comparisons say what equal lengths would give,
    and the interval is wide.

    Args:
        wins: 1, 0.5 or 0 for each prompt.
        lengths: of the answers of the model whose wins these are, in tokens.
        other_lengths: of the other model's.

    Returns:
        `raw` and `length_controlled`, each with `mean`, `low` and `high`, between 0 and 1.
    """
    y, d = np.asarray(wins, float), np.subtract(lengths, other_lengths).astype(float)
    x = np.tanh(d / (d.std() or 1.0))
    _, of = np.unique(clusters, return_inverse=True)
    count, random = of.max() + 1, np.random.default_rng(0)
    raws, controlled = [], []
    for _ in range(DRAWS):
        weights = np.bincount(random.integers(count, size=count), minlength=count)[of].astype(float)
        raws.append(np.average(y, weights=weights))
        controlled.append(_at_equal_length(y, x, weights))
    best = {"raw": y.mean(), "length_controlled": _at_equal_length(y, x, np.ones_like(y))}
    return {
        name: {
            "mean": float(best[name]),
            "low": float(np.percentile(values, 2.5)),
            "high": float(np.percentile(values, 97.5)),
        }
        for name, values in (("raw", raws), ("length_controlled", controlled))
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
