"""What a run will need, from its config alone: memory by part and phase, fit, time and cost.

    python -m scripts.plan --config configs/llama3-8b-a100.yaml
    python -m scripts.plan validate      # predicted against measured peaks, on this CPU

Nothing is loaded: parameters are counted on the meta device, from the architectures that the
project ships, a folder, or the hub's few-kilobyte config. `plan --help` tells the options.
"""

from __future__ import annotations

import json
import sys
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import get_peft_config

from scripts.benchmark import parse_case, step_flops
from scripts.config import ROOT, Config, RecipeError, argument_parser, command, config_from_args
from scripts.prefix_sharing import BLOCK, CACHED, CHUNK
from scripts.quiet import quiet

GB = 1024**3
GPUS = ROOT / "configs" / "hardware" / "gpus.yaml"
# Bytes an optimiser keeps for each trained parameter: two moments, in the parameter's own type
# (0 here) unless it says otherwise.
MOMENTS = {"paged_adamw_32bit": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}


@dataclass(frozen=True)
class Shape:
    """What the memory of a step follows from."""

    quantized: int  # parameters of the linear layers of all blocks
    other: int  # embeddings, norms and head
    lora: int
    lora_rank: int
    width: int
    inner: int  # heads x head size
    ffn: int
    layers: int
    heads: int
    vocabulary: int


def architecture(cfg: Config) -> PretrainedConfig:
    """The model's config, without its weights.

    Raises:
        RecipeError: it is none that the project ships, no folder, and not to be had from the hub.
    """
    name = cfg.model.model_name_or_path
    shipped = ROOT / "configs" / "architectures" / f"{name.split('/')[-1]}.json"
    if not Path(name).is_dir() and shipped.is_file():
        values = json.loads(shipped.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(name, revision=cfg.model.model_revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"no architecture of {name}: {reason}") from None


def shape(cfg: Config, config: PretrainedConfig | None = None) -> Shape:
    """Count the parameters on the meta device, with and without the adapter."""
    config = config or architecture(cfg)
    lora: PeftConfig | None = get_peft_config(cfg.model)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config)
        total = model.num_parameters()
        head = model.get_output_embeddings()
        linear = sum(
            m.weight.numel() for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        )  # fmt: skip
        trained = get_peft_model(model, lora).get_nb_trainable_parameters()[0] if lora else total
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        linear, total - linear, trained, lora.r if lora else 0, config.hidden_size,
        size * config.num_attention_heads, config.intermediate_size, config.num_hidden_layers,
        config.num_attention_heads, config.vocab_size,
    )  # fmt: skip


def worst_lengths(cfg: Config) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected of a pair that fills `max_length`: a quarter prompt."""
    length = cfg.dpo.max_length or 1024
    prompt = max(1, length // 4)
    return prompt, length - prompt, length - prompt


def stored(cfg: Config, s: Shape) -> dict[str, float]:
    """Bytes of what stays in memory all through training."""
    word = 4 if str(cfg.model.dtype) in ("float32", "torch.float32") else 2
    if cfg.model.load_in_4bit:
        # Half a byte a weight; a scale for every 64: 4 bytes, or 1 and 4 more for every 256 scales.
        scales = s.quantized / 64
        constants = scales * (1 + 4 / 256) if cfg.model.use_bnb_nested_quant else scales * 4
        linear, trained = s.quantized / 2 + constants, 2  # TRL casts the adapter to bfloat16
    else:
        linear, trained = s.quantized * word, 4  # PEFT keeps it in float32
    moments = MOMENTS.get(str(getattr(cfg.dpo.optim, "value", cfg.dpo.optim)), 2 * trained)
    return {
        "linear layers": linear,
        "embeddings, norms, head": s.other * word,
        "adapter": s.lora * trained,
        "gradients": s.lora * trained,
        "optimiser": s.lora * moments,
    }


def attention_bytes(s: Shape, lengths: tuple[int, int, int], pairs: int, cuda: bool) -> float:
    """Bytes that the attention of one layer keeps for its backward, besides queries and the like.

    On a CPU the probabilities, 2 bytes for each head, query and key in blocks of `BLOCK` queries,
    and the keys and values that chosen and rejected share, written out again for rejected.
    """
    prompt, chosen, rejected = lengths
    shared = 2 * 2 * s.inner * (prompt + rejected)
    if cuda:
        return pairs * shared
    seen = 0
    for queries, keys in ((prompt + chosen, prompt + chosen), (rejected, prompt + rejected)):
        for start in range(0, queries, BLOCK):
            size = min(BLOCK, queries - start)
            seen += size * (keys - queries + start + size)
    return pairs * (2 * s.heads * seen + shared)


def layer_bytes(s: Shape) -> float:
    """Bytes a token leaves in one layer for the backward pass, in 16 bits, attention's aside.

    Two norms keep their input in float32 (8 d) and their result as the adapters' input (4 d);
    queries, keys and values after rotation, one head's width each (6 i); the attention's result
    (2 i); gate, its activation, up and their product (8 f); the adapters' narrow activations.
    """
    return 12 * s.width + 8 * s.inner + 8 * s.ffn + 14 * s.lora_rank


def phases(
    cfg: Config, s: Shape, lengths: tuple[int, int, int], cuda: bool, runtime: float
) -> dict[str, dict[str, float]]:
    """Bytes by phase of a run and by part: load, reference pass, step, merge.

    `runtime` is what is there before the model: the CUDA context, or the process with its imports.
    """
    kept, pairs = stored(cfg, s), cfg.dpo.per_device_train_batch_size
    prompt, chosen, rejected = lengths
    tokens, answers = pairs * (prompt + chosen + rejected), pairs * (chosen + rejected)
    if not cfg.recipe.prefix_sharing:  # two rows a pair, each padded to the longest
        tokens = answers = 2 * pairs * (prompt + max(chosen, rejected))
    head = 2 * CHUNK + 3 * 4 * CACHED + 3 * 2 * s.width * answers
    dense = 2 * s.width * s.ffn  # one matrix of a layer, dequantized
    passing = tokens * (3 * 2 * s.ffn + 4 * 2 * s.width) + dense  # of one layer at a time
    sixteen = 2 * (s.quantized + s.other)
    # On a CPU the pages of the file that the weights were read from count as the process's own; the
    # system takes them back when it needs them.
    file = {} if cuda else {"model file, mapped": sixteen}
    weights = {k: kept[k] for k in ("linear layers", "embeddings, norms, head")} | file
    layer = tokens * layer_bytes(s) + attention_bytes(s, lengths, pairs, cuda)
    if cfg.dpo.activation_checkpointing or cfg.dpo.gradient_checkpointing:
        activations = s.layers * tokens * 2 * s.width + layer
    else:
        activations = s.layers * layer
    return {
        "load": {"runtime": runtime, **weights, "on the way": 4 * s.vocabulary * s.width},
        "reference": {"runtime": runtime, **weights, "adapter": kept["adapter"],
                      "activations": passing, "logits chunk": head},
        "step": {"runtime": runtime, **kept, **file, "activations": activations,
                 "passing": passing, "logits chunk": head},
        "merge": {"runtime": runtime, "16-bit model": sixteen, "adapter": 2 * kept["adapter"]},
    }  # fmt: skip


def peak(parts: dict[str, float]) -> float:
    """GB of a phase."""
    return sum(parts.values()) / GB


@lru_cache(maxsize=1)
def gpus() -> dict:
    """The editable table of GPUs, their prices and speeds."""
    return yaml.safe_load(GPUS.read_text())


def fit(cfg: Config, s: Shape, gpu: dict) -> tuple[bool, str]:
    """Whether the run fits on `gpu`, and if not the first change that would make it fit."""
    runtime, room = gpus()["context_gb"] * GB, gpu["memory_gb"]

    def top(c: Config) -> dict[str, float]:
        return {k: peak(v) for k, v in phases(c, s, worst_lengths(c), True, runtime).items()}

    if not gpu["bf16"] and cfg.dpo.bf16:
        return False, "no bfloat16: bf16: false, fp16: true, dtype: float16"
    needed = top(cfg)
    if max(needed.values()) <= room:
        return True, ""
    if max(v for k, v in needed.items() if k != "merge") <= room:
        return True, "merge in main memory: scripts.export --set use_cpu=true"
    changes, trial = {}, cfg
    steps = [("activation_checkpointing", True), ("per_device_train_batch_size", 1)]
    steps += [("max_length", n) for n in (1024, 768, 512, 256) if n < (cfg.dpo.max_length or 9999)]
    for name, value in steps:
        if getattr(cfg.dpo, name) == value:
            continue  # the config has it already
        # A copy, since building the arguments anew resets accelerate's state.
        trial = replace(trial, dpo=copy(trial.dpo))
        setattr(trial.dpo, name, value)
        changes[name] = str(value).lower()
        if max(v for k, v in top(trial).items() if k != "merge") <= room:
            return False, ", ".join(f"{k}: {v}" for k, v in changes.items())
    return False, "not by these means"


def on_gpu(cfg: Config) -> bool:
    """Whether the config means a GPU, be there one here or not."""
    return not cfg.given.get("use_cpu", False)


def needs(cfg: Config, s: Shape | None = None) -> dict[str, dict[str, float]]:
    """`phases` for the worst lengths, on what the config means: a GPU, or this process.

    Call it before a model is loaded: on a CPU what the process holds by then counts as runtime.
    """
    runtime = gpus()["context_gb"] if on_gpu(cfg) else process_gb()
    return phases(cfg, s or shape(cfg), worst_lengths(cfg), on_gpu(cfg), runtime * GB)


def memory_table(cfg: Config, s: Shape | None = None) -> pd.DataFrame:
    """GB by part and phase, with the sum of each phase as the last row, `peak`."""
    found = needs(cfg, s)
    frame = pd.DataFrame(found).div(GB).reindex(columns=list(found))
    order = list(dict.fromkeys(part for parts in found.values() for part in parts))
    return pd.concat([frame.reindex(order), frame.sum().to_frame("peak").T])


def process_gb() -> float:
    """What this process holds now: Python with torch, transformers, TRL and the rest."""
    return psutil.Process().memory_info().rss / GB


def time_table(
    cfg: Config, s: Shape, config: PretrainedConfig, pairs: int, lengths: tuple[int, int, int]
) -> pd.DataFrame:
    """Fit, time and cost on each GPU of the table, for `pairs` pairs of these lengths in all."""
    flops = step_flops(config, np.array([lengths]), s.lora) * pairs
    if cfg.dpo.activation_checkpointing or cfg.dpo.gradient_checkpointing:
        flops *= 4 / 3  # the policy's forward once more
    rows = {}
    for name, gpu in gpus()["gpus"].items():
        fits, change = fit(cfg, s, gpu)
        price = gpu["dollars_per_hour"]
        hours = flops / (gpu["tflops"] * 1e12 * gpus()["utilisation"]) / 3600
        rows[name] = {
            "memory GB": gpu["memory_gb"], "fits": "yes" if fits else "no",
            "hours": round(hours, 2), "cost $": round(hours * price, 2) if price else "",
            "change": change,
        }  # fmt: skip
    return pd.DataFrame(rows).T


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


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == ["validate"]:
        from scripts.plan_check import main as validate

        return validate(arguments[1:])
    parser = argument_parser(__doc__)
    parser.usage = "python -m scripts.plan [validate] [options]"
    parser.add_argument("--pairs", type=int, help="training pairs (default: train_samples)")
    parser.add_argument("--lengths", metavar="P/C/R", help="tokens of a usual pair, for the time")
    args = parser.parse_args(arguments)
    lengths = parse_case(f"{args.lengths}x1")[:3] if args.lengths else None
    quiet()
    cfg = config_from_args(args, elsewhere=True)
    pairs = args.pairs or cfg.recipe.train_samples or known_pairs(cfg)
    print(report(cfg, pairs, lengths))


def known_pairs(cfg: Config) -> int:
    """How many training pairs the config's dataset has, where that is known without a download."""
    if cfg.script.dataset_name == "data":
        return sum(1 for _ in (ROOT / "data" / "train.jsonl").open())
    return gpus()["datasets"].get(cfg.script.dataset_name, 10_000)


if __name__ == "__main__":
    command(main)
