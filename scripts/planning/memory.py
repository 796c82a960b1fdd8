"""Memory of a run by phase and part, counted from the config: nothing is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import get_peft_config

from scripts.cli import ROOT, RecipeError
from scripts.config import Config
from scripts.sharing.attention import BLOCK
from scripts.sharing.head import CACHED, CHUNK

GB = 1024**3
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


def process_gb() -> float:
    """What this process holds now: Python with torch, transformers, TRL and the rest."""
    return psutil.Process().memory_info().rss / GB
