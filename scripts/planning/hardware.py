"""On which GPU a run fits, for how long and at what price; what it needs here."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
from transformers import PretrainedConfig

from scripts.config import Config
from scripts.planning.dataset import global_batch
from scripts.planning.flops import step_flops
from scripts.planning.lengths import Lengths, worst_lengths
from scripts.planning.memory import (
    GB,
    PAGED,
    ModelSizes,
    checkpointing,
    model_sizes,
    peak,
    phases,
    process_gb,
    stored,
)
from scripts.planning.table import table

# What is left of a GPU for what the plan does not count: fragments, and its own error.
SPARE = 0.1
SHORTER = (1024, 768, 512, 256)  # values of max_length that are tried


def gpus() -> dict:
    """The GPUs of the table, by name."""
    return table()["gpus"]


def on_gpu(cfg: Config) -> bool:
    """Whether the config means a GPU, be there one here or not."""
    return not cfg.given.get("use_cpu", False)


def needs(cfg: Config, sizes: ModelSizes | None = None) -> dict[str, dict[str, float]]:
    """`phases` for the worst lengths, on what the config means: a GPU, or this process.

    Call it before a model is loaded: on a CPU what the process holds by then counts as runtime.
    """
    runtime = table()["context_gb"] if on_gpu(cfg) else process_gb()
    sizes = sizes or model_sizes(cfg)
    return phases(cfg, sizes, worst_lengths(cfg), on_gpu(cfg), runtime * GB)


def memory_table(cfg: Config, sizes: ModelSizes | None = None) -> pd.DataFrame:
    """GB by part and phase, with the sum of each phase as the last row, `peak`.

    `memory.OUTSIDE_TORCH` names the parts that torch does not count as its own.
    """
    by_phase = needs(cfg, sizes)
    frame = pd.DataFrame(by_phase).div(GB).reindex(columns=list(by_phase))
    order = list(dict.fromkeys(part for parts in by_phase.values() for part in parts))
    frame = frame.reindex(order)
    frame = frame[(frame.fillna(0) > 0).any(axis=1)]
    return pd.concat([frame, frame.sum().to_frame("peak").T])


def checkpoint_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """Bytes of one checkpoint: what is trained, and the optimiser's state, paged or not."""
    kept = stored(cfg, sizes)
    trained = kept["gradients"]  # as many numbers, of the same type, as what is trained
    return trained + (0 if cfg.dpo.save_only_model else kept["optimiser"] + kept[PAGED])


def fit(cfg: Config, sizes: ModelSizes, gpu: dict) -> tuple[bool, str]:
    """Whether the run fits on `gpu` with `SPARE` to spare, and what to change or to know.

    Of the changes that keep the pairs of a step, the fastest that fits is named: first fewer pairs
    at a time, since computing activations anew costs a third more; then that; then shorter pairs.
    If none fits, paged optimiser memory is left out: it moves to main memory and back each step.
    """
    if not gpu["bf16"] and cfg.dpo.bf16:
        return False, "no bfloat16: bf16: false, fp16: true, dtype: float16"
    room = gpu["memory_gb"] * (1 - SPARE)
    tried = [(changes, paged) for paged in (True, False) for changes in ({}, *smaller(cfg))]
    for changes, paged in tried:
        trial = changed(cfg, changes)
        replies = _replies_that_fit(trial, sizes, room, paged)
        if _training_peak(trial, sizes, paged) > room or not replies:
            continue
        shown = [f"{name}: {str(value).lower()}" for name, value in changes.items()]
        if replies != cfg.recipe.generation_batch_size:
            shown.append(f"generation_batch_size: {replies}")
        fits = not shown
        if not paged:
            shown.append("the optimiser pages to main memory, slowly")
        if _peaks(trial, sizes)["merge"] > room:
            shown.append("merge in main memory: scripts.export --set use_cpu=true")
        return fits, ", ".join(shown)
    return False, "not by these means"


def smaller(cfg: Config) -> Iterator[dict[str, int | bool]]:
    """Changes that need less memory, from the fastest to the slowest, then those that cut pairs."""
    batch, whole = cfg.dpo.per_device_train_batch_size, global_batch(cfg)
    fewer = [n for n in (batch // 2**i for i in range(1, 12)) if n and whole % n == 0]
    batches = [
        {"per_device_train_batch_size": n, "gradient_accumulation_steps": whole // n}
        for n in fewer
    ]  # fmt: skip
    yield from batches
    recomputed = {} if checkpointing(cfg) else {"activation_checkpointing": True}
    if recomputed:
        yield recomputed
        yield from (recomputed | change for change in batches)
    least = recomputed | (batches[-1] if batches else {})
    for length in SHORTER:
        if length < (cfg.dpo.max_length or np.inf):
            yield least | {"max_length": length}


def changed(cfg: Config, changes: dict) -> Config:
    """A copy of `cfg` with some of TRL's arguments changed.

    A copy, since building the arguments anew resets accelerate's state.
    """
    trial = replace(cfg, dpo=copy(cfg.dpo))
    for name, value in changes.items():
        setattr(trial.dpo, name, value)
    return trial


def _peaks(cfg: Config, sizes: ModelSizes, paged: bool = True) -> dict[str, float]:
    """GB of each phase on a GPU, with or without what may move out."""
    by_phase = phases(cfg, sizes, worst_lengths(cfg), True, table()["context_gb"] * GB)
    return {
        name: peak({k: v for k, v in parts.items() if paged or k != PAGED})
        for name, parts in by_phase.items()
    }


def _training_peak(cfg: Config, sizes: ModelSizes, paged: bool = True) -> float:
    """GB of the largest phase up to the end of training."""
    peaks = _peaks(cfg, sizes, paged)
    return max(peaks[name] for name in ("load", "reference", "step"))


def _replies_that_fit(cfg: Config, sizes: ModelSizes, room: float, paged: bool) -> int:
    """The config's `generation_batch_size`, halved until the evaluation takes `room` GB at most;
    0 if it never does."""
    replies = cfg.recipe.generation_batch_size
    while replies:
        trial = replace(cfg, recipe=replace(cfg.recipe, generation_batch_size=replies))
        if _peaks(trial, sizes, paged)["evaluate"] <= room:
            break
        replies //= 2
    return replies


def training_hours(
    cfg: Config, sizes: ModelSizes, config: PretrainedConfig, pairs: float, lengths: Lengths,
    gpu: dict,
) -> float:  # fmt: skip
    """Hours that training on `pairs` pairs of these lengths takes on `gpu`, by its rate."""
    flops = step_flops(config, np.array([lengths]), sizes.trained) * pairs
    if checkpointing(cfg):
        flops *= 4 / 3  # the policy's forward once more
    return flops / (gpu["tflops"] * 1e12 * table()["utilisation"]) / 3600


def time_table(
    cfg: Config, sizes: ModelSizes, config: PretrainedConfig, pairs: float, usual: Lengths | None
) -> pd.DataFrame:
    """Fit, hours and cost on each GPU of the table, for `pairs` pairs in all.

    Hours for pairs of `usual` lengths, where they are known, and for the worst; the cost is that of
    the usual hours, or of the worst.
    """
    rows = {}
    for name, gpu in gpus().items():
        fits, change = fit(cfg, sizes, gpu)
        worst = training_hours(cfg, sizes, config, pairs, worst_lengths(cfg), gpu)
        hours = training_hours(cfg, sizes, config, pairs, usual, gpu) if usual else None
        price = gpu["dollars_per_hour"]
        rows[name] = {
            "memory GB": gpu["memory_gb"],
            "fits": "yes" if fits else "no",
            "hours usual": "" if hours is None else round(hours, 2),
            "hours worst": round(worst, 2),
            "cost $": round((worst if hours is None else hours) * price, 2) if price else "",
            "change": change,
        }
    return pd.DataFrame.from_dict(rows, orient="index")
