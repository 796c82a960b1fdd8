"""A run over pairs of random tokens: what a step costs does not depend on what they say."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict
from trl import DPOTrainer

from scripts.base import RecipeError
from scripts.config import Config
from scripts.run_log import RunLog
from scripts.training import assemble


def trial_trainer(cfg: Config, sizes: tuple[int, int, int], count: int) -> DPOTrainer:
    """The trainer of `cfg` over `count` pairs of random tokens.

    `sizes` are the tokens of prompt, chosen and rejected.

    Raises:
        RecipeError: as `require_sharing`.
    """
    texts = {"prompt": "Is it so?", "chosen": "Yes, it is.", "rejected": "No, not at all."}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pair = {side: [{"role": roles[side], "content": text}] for side, text in texts.items()}
    # TRL tokenises text when it builds a trainer; what it trains on is replaced afterwards.
    text = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_list([pair])))
    run = assemble(cfg, text)
    run.trainer.remove_callback(RunLog)  # a trial leaves the log of a real run in its folder alone
    require_sharing(run.trainer, cfg)
    run.trainer.train_dataset = random_pairs(len(run.tokenizer), sizes, count)
    return run.trainer


def require_sharing(trainer: DPOTrainer, cfg: Config) -> None:
    """What is measured as prefix sharing must not have gone TRL's way.

    Raises:
        RecipeError: the config wants prefix sharing, and the trainer has refused it.
    """
    refusal = getattr(trainer, "refusal", None)
    if cfg.recipe.prefix_sharing and refusal:
        raise RecipeError(f"nothing is measured: {refusal}; set prefix_sharing=false")


def random_pairs(vocabulary: int, sizes: tuple[int, int, int], count: int) -> Dataset:
    """Pairs of random tokens, as TRL's trainer has them after tokenising."""
    random = np.random.default_rng(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {k: random.integers(0, vocabulary, n).tolist() for k, n in zip(names, sizes, strict=True)}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)
