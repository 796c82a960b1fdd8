"""A run over pairs of random tokens: what a step costs does not depend on what they say."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict
from trl import DPOTrainer

from scripts.config import Config
from scripts.training import assemble


def trial_trainer(cfg: Config, sizes: tuple[int, int, int], count: int) -> DPOTrainer:
    """The trainer of `cfg` over `count` pairs of random tokens.

    `sizes` are the tokens of prompt, chosen and rejected.
    """
    turns = [[{"role": r, "content": "Hm."}] for r in ("user", "assistant", "assistant")]
    pair = dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))
    # TRL tokenises text when it builds a trainer; what it trains on is replaced afterwards.
    text = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_list([pair])))
    run = assemble(cfg, text)
    run.trainer.train_dataset = random_pairs(len(run.tokenizer), sizes, count)
    return run.trainer


def random_pairs(vocabulary: int, sizes: tuple[int, int, int], count: int) -> Dataset:
    """Pairs of random tokens, as TRL's trainer has them after tokenising."""
    random = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {k: random.integers(0, vocabulary, n).tolist() for k, n in zip(names, sizes, strict=True)}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)
