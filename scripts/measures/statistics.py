"""What a mean over prompts is worth."""

from __future__ import annotations

import numpy as np


def bootstrap(
    values: np.ndarray, other: np.ndarray | None = None, draws: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Mean of `values` (minus that of `other`, paired) with its bootstrap 95% interval.

    The percentile method: prompts are drawn again with replacement, both models' values together.
    """
    values = np.asarray(values, float) - (0 if other is None else np.asarray(other, float))
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
