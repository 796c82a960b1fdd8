"""What a run will need, from its config alone: memory by part and phase, fit, time and cost.

    python -m scripts.plan --config configs/llama3-8b-a100.yaml

Nothing is loaded: parameters are counted on the meta device, from the architectures that the
project ships, a folder, or the hub's few-kilobyte config. `plan --help` tells the options.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("plan")

import argparse
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from transformers import PretrainedConfig

from scripts.base import ROOT, InputError, local_path
from scripts.config import Config, config_from_args
from scripts.data import check_preferences
from scripts.pairs.load import held_out_count
from scripts.pairs.sources import is_url
from scripts.plan_memory import (
    CONTEXT,
    GB,
    HELD,
    PAGED,
    SPARE,
    Lengths,
    ModelSizes,
    architecture,
    changed,
    checkpointing,
    estimate_max_length,
    memory_table,
    model_sizes,
    on_gpu,
    peak,
    phases,
    stored,
    word_bytes,
    worst_lengths,
)
from scripts.quiet import quiet

# Llama 3's and SmolLM2's tokenizers take about so many bytes of English prose a token, and their
# templates about so many tokens around a message.
BYTES_A_TOKEN, TOKENS_A_MESSAGE = 4.5, 6


@lru_cache(maxsize=1)
def hardware() -> dict:
    """`configs/hardware/gpus.yaml`, whose comments say what stands in it."""
    return yaml.safe_load((ROOT / "configs" / "hardware" / "gpus.yaml").read_text())


# The data: how many pairs, how long, how many steps.


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
        usual = mean_lengths(cfg, estimated_lengths(train)) if len(train) else None
        return DatasetSize(min(len(train), limit or len(train)), usual, name)
    if known := hardware()["datasets"].get(name):
        pairs = known["pairs"] - held_out_count(cfg.recipe.test_split_size, known["pairs"])
        usual = mean_lengths(cfg, np.array([known["usual_lengths"]]))
        return DatasetSize(min(pairs, limit or pairs), usual, "gpus.yaml")
    return DatasetSize(limit or 10_000, None, "train_samples" if limit else "a guess: give --pairs")


def estimated_lengths(pairs: list[dict]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected, (pairs, 3), from the bytes of their text."""

    def tokens(messages: list[dict]) -> float:
        text = sum(len(m["content"].encode()) for m in messages)
        return text / BYTES_A_TOKEN + TOKENS_A_MESSAGE * len(messages)

    sides = ("prompt", "chosen", "rejected")
    return np.array([[tokens(pair[side]) for side in sides] for pair in pairs])


def mean_lengths(cfg: Config, lengths: np.ndarray) -> Lengths:
    """The means of `lengths`, (pairs, 3), with answers cut where `max_length` cuts them."""
    room = np.maximum((cfg.dpo.max_length or np.inf) - lengths[:, :1], 0)
    answers = np.minimum(lengths[:, 1:], room)
    return Lengths(*map(round, (lengths[:, 0].mean(), *answers.mean(axis=0))))


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


def global_batch(cfg: Config) -> int:
    """Pairs of an optimiser step."""
    return cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps


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


def checkpoint_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """Bytes of one checkpoint: what is trained, and the optimiser's state, paged or not."""
    kept = stored(cfg, sizes)
    trained = kept["gradients"]  # as many numbers, of the same type, as what is trained
    return trained + (0 if cfg.dpo.save_only_model else kept["optimiser"] + kept[PAGED])


# On which GPU it fits, for how long, and at what price.


def step_flops(config: PretrainedConfig, lengths: np.ndarray, lora: int) -> float:
    """Floating-point operations that a DPO step on these pairs cannot do without.

    `lengths` is (pairs, 3), tokens of prompt, chosen and rejected; `lora` the adapter's parameters.
    A product of (m, k) with (k, n) is 2 m k n. Each token of prompt, chosen and rejected counts
    once, in three passes: policy forward, gradients of the activations, reference forward; the
    adapter in forward and two backward products; attention over visible pairs of tokens only, its
    backward twice its forward; the head on answer tokens, in the same three passes.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner = config.num_attention_heads * head_size
    keys = config.num_key_value_heads * head_size
    body = layers * (2 * width * inner + 2 * width * keys + 3 * width * config.intermediate_size)
    prompt, chosen, rejected = lengths.astype(float).T
    tokens, answers = (prompt + chosen + rejected).sum(), (chosen + rejected).sum()
    first = prompt + chosen
    visible = (first * (first + 1) / 2 + rejected * prompt + rejected * (rejected + 1) / 2).sum()
    return (
        3 * 2 * (body + lora) * tokens
        + 4 * layers * 4 * inner * visible
        + 3 * 2 * width * config.vocab_size * answers
    )


def smaller(cfg: Config) -> Iterator[dict[str, int | bool]]:
    """Changes that keep the pairs of a step and need less memory, from the fastest to the slowest.

    First fewer pairs at a time, since computing activations again costs a third more time; then
    that; then both.
    """
    batch, whole = cfg.dpo.per_device_train_batch_size, global_batch(cfg)
    fewer = [n for n in (batch // 2**i for i in range(1, 12)) if n and whole % n == 0]
    batches = [
        {"per_device_train_batch_size": n, "gradient_accumulation_steps": whole // n}
        for n in fewer
    ]  # fmt: skip
    yield from batches
    if not checkpointing(cfg):
        recomputed = {"activation_checkpointing": True}
        yield recomputed
        yield from (recomputed | change for change in batches)


def fit(cfg: Config, sizes: ModelSizes, gpu: dict) -> tuple[bool, str]:
    """Whether the run fits on `gpu` with `SPARE` to spare, and what to change or to know.

    The first of `smaller`'s changes that fits is named. If none does, paged optimiser memory is
    left out: it moves to main memory and back at each step. Replies that do not fit are generated
    fewer at a time by the run itself, so the evaluation does not count.
    """
    if not gpu["bf16"] and cfg.dpo.bf16:
        return False, "no bfloat16: bf16: false, fp16: true, dtype: float16"
    room = gpu["memory_gb"] * (1 - SPARE)
    for paged in (True, False):
        for changes in ({}, *smaller(cfg)):
            trial = changed(cfg, changes)
            by_phase = phases(trial, sizes, worst_lengths(trial), True, CONTEXT)
            left_out = 0 if paged else by_phase["step"][PAGED] / GB
            if max(peak(by_phase[p]) - left_out for p in ("load", "reference", "step")) > room:
                continue
            shown = [f"{name}: {str(value).lower()}" for name, value in changes.items()]
            if not paged:
                shown.append("the optimiser pages to main memory, slowly")
            if peak(by_phase["merge"]) > room:
                shown.append("merge in main memory: scripts.export --set use_cpu=true")
            return not changes and paged, ", ".join(shown)
    return False, "does not fit, even with smaller batches and activation_checkpointing"


def time_table(
    cfg: Config, sizes: ModelSizes, config: PretrainedConfig, pairs: float, usual: Lengths | None
) -> pd.DataFrame:
    """Fit, hours and cost on each GPU of the table, for `pairs` pairs in all.

    Hours for pairs of `usual` lengths, where they are known, and for the worst; the cost is that of
    the usual hours, or of the worst.
    """
    rows = {}
    for name, gpu in hardware()["gpus"].items():
        fits, change = fit(cfg, sizes, gpu)
        rate = 3600 * gpu["tflops"] * 1e12 * hardware()["utilisation"]
        again = 4 / 3 if checkpointing(cfg) else 1  # the policy's forward once more
        worst, hours = (
            again * pairs * step_flops(config, np.array([lengths]), sizes.trained) / rate
            for lengths in (worst_lengths(cfg), usual or worst_lengths(cfg))
        )
        price = gpu["dollars_per_hour"]
        rows[name] = {
            "memory GB": gpu["memory_gb"],
            "fits": "yes" if fits else "no",
            "hours usual": round(hours, 2) if usual else "",
            "hours worst": round(worst, 2),
            "cost $": round(hours * price, 2) if price else "",
            "change": change,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


# The command.


def plan_text(cfg: Config, data: DatasetSize) -> str:
    """The whole plan as text: memory for pairs as long as `max_length` allows, time for those and
    for `data.usual` lengths."""
    config = architecture(cfg)
    sizes = model_sizes(cfg, config)
    total = sizes.base + (sizes.trained if sizes.rank else 0)
    steps, pairs = training_steps(cfg, data.pairs), trained_pairs(cfg, data.pairs)
    worst, cuda = worst_lengths(cfg), on_gpu(cfg)
    tokens = pairs * sum(data.usual or worst)
    size, kept = checkpoint_bytes(cfg, sizes) / GB, kept_checkpoints(cfg, steps)
    memory = memory_table(cfg, sizes)
    lines = [
        f"model: {cfg.model.model_name_or_path}",
        f"parameters: {total:,}, trained {sizes.trained:,} ({sizes.trained / total:.2%})",
        f"data: {data.pairs:,} training pairs, usually of {data.usual or 'unknown'} tokens, "
        f"{worst} at most (prompt/chosen/rejected; {data.source})",
        f"steps: {steps:,} of {global_batch(cfg)} pairs, {tokens / 1e6:,.1f} million tokens "
        "(prompts once)",
        f"checkpoints: {kept * size:.1f} GB on disk, up to {kept} at a time of {size:.1f} GB",
        f"\nmemory in GB on {'a GPU' if cuda else 'this CPU (resident memory)'}, for pairs of "
        f"{worst} tokens:",
        memory.round(2).to_string(na_rep=""),
        *remarks(cfg, memory),
    ]
    if cuda:
        lines += [
            f"\ntraining alone, at {hardware()['utilisation']:.0%} of each GPU's dense 16-bit rate "
            "(an assumption;\nprices and rates: configs/hardware/gpus.yaml):",
            time_table(cfg, sizes, config, pairs, data.usual).to_string(),
        ]
    return "\n".join(lines)


def remarks(cfg: Config, memory: pd.DataFrame) -> Iterator[str]:
    """What to know about the table of memory."""
    optimiser = str(getattr(cfg.dpo.optim, "value", cfg.dpo.optim))
    if "adamw" not in optimiser:
        yield f"(optim: {optimiser} is counted as AdamW, which mostly needs more)"
    if not on_gpu(cfg):
        yield (
            "(over batches of varying length the process comes to hold up to half as much again, "
            f"{HELD * memory.loc['peak', 'step']:.1f} GB, until the evaluation)"
        )
        return
    if PAGED in memory.index:
        yield (
            f"({PAGED}: managed memory, which torch does not count; it moves to main memory when "
            "the GPU is full)"
        )
    if word_bytes(cfg) == 4 or cfg.model.load_in_8bit:
        setting = "load_in_8bit: true" if cfg.model.load_in_8bit else "dtype: float32"
        yield f"(WARNING: with {setting} the plan was not compared with a simulated step)"


def main(args: argparse.Namespace) -> None:
    quiet()
    cfg = config_from_args(args, may_lack_gpu=True)
    if cfg.length_is_open and is_local(cfg):
        train = check_preferences(cfg)[0]["train"]
        if len(train):
            estimate_max_length(cfg, estimated_lengths(train))
            print(f"max_length: auto, about {cfg.dpo.max_length} (an estimate from the text)")
    data = dataset_size(cfg)
    if args.pairs:
        data = data._replace(pairs=args.pairs, source="--pairs")
    if args.lengths:
        data = data._replace(usual=Lengths(*parse_case(f"{args.lengths}x1")[:3]))
    print(plan_text(cfg, data))
