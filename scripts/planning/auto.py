"""Choose `max_length` from the data: what covers nearly all pairs and fits the memory."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import psutil
import torch
from accelerate.utils import broadcast_object_list

from scripts.base import RecipeError
from scripts.config import Config
from scripts.pairs.report import covering_length
from scripts.planning.flops import step_flops
from scripts.planning.hardware import SPARE, changed, needs, on_gpu, smaller
from scripts.planning.memory import GB, ModelSizes, architecture, model_sizes, peak, process_gb

HEAP = 1.5  # over many steps a CPU's heap comes to hold half as much again as a step is planned to
STEP = 32  # max_length is a multiple of this


def settle_max_length(cfg: Config, lengths: np.ndarray) -> None:
    """Put the chosen `max_length` into `cfg`, and print it with its price.

    `lengths` is (pairs, 3): tokens of prompt, chosen and rejected of pairs of the data. Several
    processes take what the first one chose.
    """
    length, said = choose_max_length(cfg, lengths) if cfg.is_main_process else (0, "")
    (length,) = broadcast_object_list([length])
    cfg.settle_max_length(length)
    if cfg.is_main_process:
        print(said)


def estimate_max_length(cfg: Config, lengths: np.ndarray) -> None:
    """Reckon with what `auto` will choose, and leave the choice open for the exact tokens."""
    cfg.dpo.max_length, _ = choose_max_length(cfg, lengths)


def choose_max_length(cfg: Config, lengths: np.ndarray) -> tuple[int, str]:
    """The length that covers 95% of the pairs, or the longest that the model and the memory plan
    allow; and a sentence that says so, with its price in memory and time."""
    wanted = covering_length(lengths)
    try:
        config = architecture(cfg)
        sizes = model_sizes(cfg, config)
    except RecipeError as error:
        return wanted, f"max_length: {wanted}, from the data; its memory is unknown ({error})"
    context = getattr(config, "max_position_embeddings", None) or wanted
    room, where = memory_room(cfg)
    length = wanted if planned(cfg, sizes, wanted) <= room else _longest(cfg, sizes, wanted, room)
    length = min(length or wanted, context)
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    needed = planned(cfg, sizes, length)
    said = (
        f"max_length: {length}, chosen from the data: {(longest <= length).mean():.0%} of the pairs"
        f" fit whole (median {np.median(longest):.0f} tokens, longest {longest.max():.0f}). Planned"
        f" memory {needed:.1f} GB{where}; {_price(cfg, config, sizes, lengths, length)}."
    )
    if needed > room:
        said += " WARNING: by the plan that does not fit."
    if length < min(wanted, context):
        said += f" {wanted} tokens would cover 95%, and do not fit"
        batches = (change for change in smaller(cfg) if "max_length" not in change)
        fitting = (c for c in batches if planned(changed(cfg, c), sizes, wanted) <= room)
        if change := next(fitting, None):
            said += ", but would with " + ", ".join(f"{k}: {v}".lower() for k, v in change.items())
        said += "."
    return length, said


def planned(cfg: Config, sizes: ModelSizes, length: int) -> float:
    """GB of the largest phase before the merge, for pairs that fill `length`. Replies can be had
    one at a time, so that the evaluation does not decide how long the pairs may be."""
    one = replace(cfg, recipe=replace(cfg.recipe, generation_batch_size=1))
    by_phase = needs(changed(one, {"max_length": length}), sizes)
    return max(peak(parts) for name, parts in by_phase.items() if name != "merge")


def memory_room(cfg: Config) -> tuple[float, str]:
    """GB that a plan may take here, and how much that is of what, in words."""
    if not on_gpu(cfg):
        there = psutil.virtual_memory().available / GB + process_gb()
        return (
            there / HEAP,
            f" of {there:.1f} GB there (a long run comes to hold half as much again)",
        )
    if not torch.cuda.is_available():
        return (
            np.inf,
            "; no GPU here to fit it to (python -m scripts.plan names those that it fits)",
        )
    there = torch.cuda.mem_get_info()[1] / GB
    return there * (1 - SPARE), f" of the GPU's {there:.1f}"


def _longest(cfg: Config, sizes: ModelSizes, wanted: int, room: float) -> int:
    """The longest multiple of `STEP` that takes `room` GB at most; 0 if none does."""
    low, high = 0, wanted // STEP
    while low + 1 < high:
        middle = (low + high) // 2
        fits = planned(cfg, sizes, middle * STEP) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low * STEP


def _price(cfg: Config, config, sizes: ModelSizes, lengths: np.ndarray, length: int) -> str:
    """The arithmetic of a usual pair, cut at `length`, and its time where it can be told."""
    room = np.maximum(length - lengths[:, :1], 0)
    cut = np.concatenate([lengths[:, :1], np.minimum(lengths[:, 1:], room)], axis=1)
    flops = step_flops(config, cut[(room > 0).all(axis=1)], sizes.trained) / len(lengths)
    text = f"a usual pair takes {flops / 1e12:.2g} TFLOP"
    if on_gpu(cfg):
        return text
    return f"{text}, on this CPU about {flops / (SHARE_OF_PRODUCT * product_rate()):.1f} s"


SHARE_OF_PRODUCT = 0.5  # of a large product's rate, what a step reaches (README, Performance)


def product_rate() -> float:
    """Operations a second of one large bfloat16 product on this CPU, the best of three."""
    size = 1024
    left, right = (torch.ones(size, size, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
