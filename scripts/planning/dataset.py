"""What is known of a config's dataset without its model: how many pairs, and how long."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from scripts.config import Config
from scripts.pairs.download import is_url
from scripts.pairs.load import check_preferences, held_out_count
from scripts.pairs.sources import local_path
from scripts.planning.lengths import Lengths
from scripts.planning.table import table

# Llama 3's and SmolLM2's tokenizers take about so many bytes of English prose a token, and their
# templates about so many tokens around a message.
BYTES_A_TOKEN, TOKENS_A_MESSAGE = 4.5, 6


class DatasetSize(NamedTuple):
    """Training pairs, the usual (mean) lengths, and where both are from."""

    pairs: int
    usual: Lengths | None
    source: str


def is_local(cfg: Config) -> bool:
    """Whether the dataset is a file or folder on this machine, or one file at an address."""
    name = cfg.script.dataset_name
    return bool(name) and (local_path(name) is not None or is_url(name))


def dataset_size(cfg: Config) -> DatasetSize:
    """How many pairs a run trains on, and how long they usually are.

    From the files of a dataset on this machine; else from the table of known datasets, less the
    share that is held out; else `train_samples`, or 10,000 as a guess.

    Raises:
        DataError: the dataset is on this machine and cannot be read.
    """
    name, limit = cfg.script.dataset_name, cfg.recipe.train_samples
    if is_local(cfg):
        train = check_preferences(cfg)[0]["train"]
        usual = mean_lengths(cfg, train) if len(train) else None
        return DatasetSize(min(len(train), limit or len(train)), usual, name)
    if known := table()["datasets"].get(name):
        pairs = known["pairs"] - held_out_count(cfg.recipe.test_split_size, known["pairs"])
        usual = cut(cfg, np.array([known["usual_lengths"]]))
        return DatasetSize(min(pairs, limit or pairs), usual, "gpus.yaml")
    return DatasetSize(limit or 10_000, None, "train_samples" if limit else "a guess: give --pairs")


def mean_lengths(cfg: Config, pairs: list[dict]) -> Lengths:
    """Mean tokens of prompt, chosen and rejected, estimated from the bytes of their text."""
    return cut(cfg, estimated_lengths(pairs))


def estimated_lengths(pairs: list[dict]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, (pairs, 3), from the bytes of their text."""

    def tokens(messages: list[dict]) -> float:
        text = sum(len(m["content"].encode()) for m in messages)
        return text / BYTES_A_TOKEN + TOKENS_A_MESSAGE * len(messages)

    sides = ("prompt", "chosen", "rejected")
    return np.array([[tokens(pair[side]) for side in sides] for pair in pairs])


def cut(cfg: Config, lengths: np.ndarray) -> Lengths:
    """The means of `lengths`, (pairs, 3), with answers cut where `max_length` cuts them."""
    room = np.maximum((cfg.dpo.max_length or np.inf) - lengths[:, :1], 0)
    answers = np.minimum(lengths[:, 1:], room)
    prompt, (chosen, rejected) = lengths[:, 0].mean(), answers.mean(axis=0)
    return Lengths(round(prompt), round(chosen), round(rejected))


def training_steps(cfg: Config, pairs: int) -> int:
    """Optimiser steps of a run over `pairs` pairs, as transformers' trainer counts them."""
    if cfg.dpo.max_steps > 0:
        return cfg.dpo.max_steps
    batches = math.ceil(pairs / cfg.dpo.per_device_train_batch_size)
    an_epoch = max(1, math.ceil(batches / cfg.dpo.gradient_accumulation_steps))
    return math.ceil(cfg.dpo.num_train_epochs * an_epoch)


def trained_pairs(cfg: Config, pairs: int) -> float:
    """How many pairs the steps go through, one that is seen twice counted twice."""
    if cfg.dpo.max_steps <= 0:
        return cfg.dpo.num_train_epochs * pairs
    return cfg.dpo.max_steps * global_batch(cfg)


def global_batch(cfg: Config) -> int:
    """Pairs of an optimiser step."""
    return cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps


def kept_checkpoints(cfg: Config, steps: int) -> int:
    """The most checkpoints that lie on disk at once during `steps` steps.

    A new one is written before the oldest goes, so one more than `save_total_limit`.
    """
    strategy = str(getattr(cfg.dpo.save_strategy, "value", cfg.dpo.save_strategy))
    every = cfg.dpo.save_steps if cfg.dpo.save_steps >= 1 else cfg.dpo.save_steps * steps
    saves = {
        "no": 0,
        "epoch": math.ceil(cfg.dpo.num_train_epochs),
        "steps": math.ceil(steps / max(every, 1)),  # the last step is saved, too
    }.get(strategy, 1)
    limit = cfg.dpo.save_total_limit
    return min(saves, limit + 1) if limit else saves
