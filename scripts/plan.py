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

from scripts.config import ROOT, Config, config_from_args
from scripts.monitoring.quiet import quiet
from scripts.planning.hardware import gpus, memory_table, on_gpu, time_table
from scripts.planning.lengths import parse_case, worst_lengths
from scripts.planning.memory import architecture, shape


def report(cfg: Config, pairs: int, lengths: tuple[int, int, int] | None = None) -> str:
    """The whole plan as text; memory is for the worst lengths, time for `lengths` if given."""
    config = architecture(cfg)
    s = shape(cfg, config)
    cuda = on_gpu(cfg)
    total = s.quantized + s.other + s.lora
    prompt, chosen, rejected = worst = worst_lengths(cfg)
    size = cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps
    steps = cfg.dpo.max_steps
    if steps <= 0:
        steps = -(-pairs * int(cfg.dpo.num_train_epochs) // size)
    tokens = steps * size * sum(lengths or worst)
    lines = [
        f"model: {cfg.model.model_name_or_path}",
        f"parameters: {total:,}, trained {s.lora:,} ({s.lora / total:.2%})",
        f"steps: {steps:,} of {size} pairs, {tokens / 1e6:,.1f} million tokens (prompts once)",
        f"\nmemory in GB on {'a GPU' if cuda else 'this CPU (resident memory)'}, pairs of "
        f"{prompt}/{chosen}/{rejected} tokens (prompt/chosen/rejected,\n"
        "as long as max_length allows):",
        memory_table(cfg, s).round(2).to_string(na_rep=""),
    ]
    if cuda:
        lines += [
            f"\ntraining alone, pairs of {'/'.join(map(str, lengths or worst))} tokens, at "
            f"{gpus()['utilisation']:.0%} of each GPU's dense 16-bit rate\n"
            "(an assumption, not a measurement; prices and rates: configs/hardware/gpus.yaml):",
            time_table(cfg, s, config, steps * size, lengths or worst).to_string(),
        ]
    return "\n".join(lines)


def known_pairs(cfg: Config) -> int:
    """How many training pairs the config's dataset has, where that is known without a download."""
    if cfg.script.dataset_name == "data":
        return sum(1 for _ in (ROOT / "data" / "train.jsonl").open())
    return gpus()["datasets"].get(cfg.script.dataset_name, 10_000)


def main(args: argparse.Namespace) -> None:
    quiet()
    if args.action == "validate":
        from scripts.planning.validate import validate  # which trains, and so loads more

        return validate()
    lengths = parse_case(f"{args.lengths}x1")[:3] if args.lengths else None
    cfg = config_from_args(args, may_lack_gpu=True)
    pairs = args.pairs or cfg.recipe.train_samples or known_pairs(cfg)
    print(report(cfg, pairs, lengths))


if __name__ == "__main__":
    cli.command(main, ARGS)
