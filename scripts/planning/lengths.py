"""Pairs by their numbers of tokens: as given, as in a batch, or as long as the config allows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scripts.base import InputError
from scripts.config import Config


class Lengths(NamedTuple):
    """Tokens of a pair's prompt, chosen and rejected."""

    prompt: int
    chosen: int
    rejected: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def parse_case(case: str) -> tuple[int, int, int, int]:
    """`"512/128/256x2"` as tokens of prompt, chosen and rejected, and pairs at a time."""
    try:
        sizes, pairs = case.split("x")
        prompt, chosen, rejected = map(int, sizes.split("/"))
        found = prompt, chosen, rejected, int(pairs)
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(
            f"a case is prompt/chosen/rejectedxpairs, each at least 1, or data, got {case!r}"
        )
    return found


def lengths_of(batch: dict) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of a batch of TRL's collator, (pairs, 3)."""
    answers = batch["completion_mask"].sum(1).cpu().numpy()
    whole = batch["attention_mask"].sum(1).cpu().numpy()
    half = len(answers) // 2
    return np.stack([(whole - answers)[:half], answers[:half], answers[half:]], axis=1)


def worst_lengths(cfg: Config) -> Lengths:
    """A pair that fills `max_length`, a quarter of it by the prompt."""
    length = cfg.dpo.max_length or 1024
    prompt = max(1, length // 4)
    return Lengths(prompt, length - prompt, length - prompt)
