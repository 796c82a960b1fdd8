"""What a run will need, from its config alone: memory by part and phase, fit, time and cost.

    python -m scripts.plan --config configs/llama3-8b-a100.yaml
    python -m scripts.plan validate      # predicted against measured peaks, on this CPU

Nothing is loaded: parameters are counted on the meta device, from the architectures that the
project ships, a folder, or the hub's few-kilobyte config. `plan --help` tells the options.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("plan")  # before the libraries load, so that --help is answered at once

import argparse
import math

from scripts.config import Config, config_from_args
from scripts.pairs.load import check_preferences
from scripts.planning.auto import estimate_max_length
from scripts.planning.dataset import (
    DatasetSize,
    dataset_size,
    estimated_lengths,
    global_batch,
    is_local,
    kept_checkpoints,
    trained_pairs,
    training_steps,
)
from scripts.planning.exports import exports_table
from scripts.planning.hardware import checkpoint_bytes, memory_table, on_gpu, time_table
from scripts.planning.lengths import Lengths, parse_case, worst_lengths
from scripts.planning.memory import (
    GB,
    HELD,
    PAGED,
    ModelSizes,
    architecture,
    model_sizes,
    weight_bytes,
)
from scripts.planning.table import table
from scripts.quiet import quiet


def report(cfg: Config, data: DatasetSize) -> str:
    """The whole plan as text: memory for pairs as long as `max_length` allows, time for those and
    for `data.usual` lengths."""
    config = architecture(cfg)
    sizes = model_sizes(cfg, config)
    cuda = on_gpu(cfg)
    total = sizes.base + (sizes.trained if sizes.rank else 0)
    steps, pairs = training_steps(cfg, data.pairs), trained_pairs(cfg, data.pairs)
    worst = worst_lengths(cfg)
    tokens = pairs * sum(data.usual or worst)
    memory = memory_table(cfg, sizes)
    lines = [
        f"model: {cfg.model.model_name_or_path}",
        f"parameters: {total:,}, trained {sizes.trained:,} ({sizes.trained / total:.2%})",
        f"data: {data.pairs:,} training pairs, usually of {data.usual or 'unknown'} tokens, "
        f"{worst} at most (prompt/chosen/rejected; {data.source})",
        f"steps: {steps:,} of {global_batch(cfg)} pairs, {tokens / 1e6:,.1f} million tokens "
        "(prompts once)",
        *_generation(cfg),
        *_checkpoints(cfg, checkpoint_bytes(cfg, sizes), kept_checkpoints(cfg, steps)),
        f"\nmemory in GB on {'a GPU' if cuda else 'this CPU (resident memory)'}, for pairs of "
        f"{worst} tokens:",
        memory.round(2).to_string(na_rep=""),
    ]
    if PAGED in memory.index:
        lines.append(
            f"({PAGED}: managed memory, which torch does not count, and which moves to main memory "
            "when the GPU is full)"
        )
    if not cuda:
        lines.append(
            "(over batches of varying length the process comes to hold up to half as much again as "
            f"a step takes, {HELD * memory.loc['peak', 'step']:.1f} GB, until the evaluation)"
        )
    if cuda and weight_bytes(cfg) == 4:
        lines.append("(WARNING: with dtype: float32 a step was not held against a simulation)")
    if cuda:
        lines += [
            f"\ntraining alone, at {table()['utilisation']:.0%} of each GPU's dense 16-bit rate\n"
            "(an assumption, not a measurement; prices and rates: configs/hardware/gpus.yaml):",
            time_table(cfg, sizes, config, pairs, data.usual).to_string(),
        ]
    return "\n".join(lines + _exports(cfg, sizes))


def _exports(cfg: Config, sizes: ModelSizes) -> list[str]:
    """What merging, converting and sending take once training is through."""
    rates = table()
    return [
        "\nwhat leaves, each from what the one before it left; minutes are those of a disk of "
        f"{rates['disk_mb_per_s']} MB/s\nand an upload of {rates['upload_mb_per_s']} MB/s "
        "(assumptions: configs/hardware/gpus.yaml), without arithmetic; file\npages are memory "
        "that the system can take back:",
        exports_table(cfg, sizes).round(2).to_string(),
    ]


def _generation(cfg: Config) -> list[str]:
    """How many steps the replies before and after take, if the number of prompts is known."""
    prompts, replies = cfg.recipe.eval_prompts, cfg.recipe.generation_batch_size
    if not prompts:
        return []
    steps = 2 * math.ceil(prompts / replies) * cfg.recipe.max_new_tokens
    return [f"before and after: up to {steps:,} decoding steps of {min(prompts, replies)} replies"]


def _checkpoints(cfg: Config, size: float, kept: int) -> list[str]:
    """What the checkpoints take on disk."""
    if not kept:
        return ["checkpoints: none"]
    return [
        f"checkpoints: {kept * size / GB:.1f} GB on disk, up to {kept} at a time of "
        f"{size / GB:.1f} GB (save_total_limit: {cfg.dpo.save_total_limit}, and one being written)"
    ]


def main(args: argparse.Namespace) -> None:
    quiet()
    if args.action == "validate":
        from scripts.planning.validate import validate  # which trains, and so loads more

        return validate()
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
    print(report(cfg, data))


if __name__ == "__main__":
    cli.command(main, ARGS)
