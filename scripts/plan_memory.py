"""Memory of a run by phase and part, counted from its config: nothing is loaded.

Each term is a function that says where its numbers come from. In the derivations, of one layer of a
Llama: d is the width of the model, a that of all heads, k that of the key-value heads, f that of
the feed-forward; r is the adapter's rank, V the vocabulary, T the tokens of a micro-batch.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import get_peft_config

from scripts.base import ROOT, RecipeError, existing, one_line
from scripts.config import Config
from scripts.memory import GB
from scripts.sharing.attention import BLOCK
from scripts.sharing.head import CACHED, CHUNK

CONTEXT = 0.6 * GB  # CUDA's context and libraries on a GPU: an assumption
SPARE = 0.1  # of a GPU, for what the plan does not count: fragments, and its own error
# Code and constants of the libraries that come into memory once they are used, and the tokenizer:
# the mean of what eight measured steps held beyond the other terms (0.07 to 0.24 GB).
IN_USE = 0.15 * GB
# Over batches of varying length a CPU's heap, which keeps what is freed, comes to hold up to so
# many times a step's peak.
HELD = 1.5
PAGED = "optimiser, paged"  # in CUDA's managed memory, which torch does not count
PAGED_FROM = 100_000  # bitsandbytes pages the state of tensors with at least so many numbers
# The projections of a layer by what they read. Those that read the same share its 16 bits.
READERS = {
    "attention": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "feed-forward": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS = tuple(name for names in READERS.values() for name in names)
COVERED = 0.95  # of the pairs fit whole into a `max_length` that is chosen from the data
MULTIPLE = 32  # of which such a `max_length` is


class RoomError(RecipeError):
    """Memory or disk is short for what was asked."""


class Lengths(NamedTuple):
    """Tokens of a pair's prompt, chosen and rejected."""

    prompt: int
    chosen: int
    rejected: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


def worst_lengths(cfg: Config) -> Lengths:
    """A pair that fills `max_length`, a quarter of it by the prompt."""
    length = cfg.dpo.max_length or 1024
    prompt = max(1, length // 4)
    return Lengths(prompt, length - prompt, length - prompt)


def row_tokens(cfg: Config, lengths: Lengths, pairs: int) -> tuple[int, int]:
    """Tokens that the model, and that the head, goes through for `pairs` pairs of `lengths`."""
    prompt, chosen, rejected = lengths
    if cfg.recipe.prefix_sharing:
        return pairs * (prompt + chosen + rejected), pairs * (chosen + rejected)
    both = 2 * pairs * (prompt + max(chosen, rejected))  # two rows a pair, padded to the longest
    return both, both


# What the model is made of.


@dataclass(frozen=True)
class ModelSizes:
    """What the memory of a run follows from: parameters and widths of model and adapter."""

    linear: int  # parameters of the linear layers of all blocks, which 4 bits are for
    other: int  # embeddings, norms and head
    trained: int  # of the adapter; of everything where there is none
    trained_large: int  # of these, in tensors that a paged optimiser pages
    rank: int  # of the adapter; 0 where there is none
    width: int
    attention_width: int  # heads x head size
    key_width: int  # key-value heads x head size
    mlp_width: int
    layers: int
    heads: int
    vocabulary: int
    # In which share of the layers each projection is trained, itself or by its adapter.
    adapted: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PROJECTIONS, 1.0))

    @property
    def base(self) -> int:
        """Parameters without the adapter."""
        return self.linear + self.other


def architecture(cfg: Config) -> PretrainedConfig:
    """The model's config, without its weights.

    Raises:
        RecipeError: the project does not ship it, it is no folder, and the hub does not give it.
    """
    name = cfg.model.model_name_or_path
    shipped = ROOT / "configs" / "architectures" / f"{name.split('/')[-1]}.json"
    if not Path(name).is_dir() and shipped.is_file():
        values = json.loads(shipped.read_text())
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(name, revision=cfg.model.model_revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"no architecture of {name}: {one_line(error)}") from None


def model_sizes(cfg: Config, config: PretrainedConfig | None = None) -> ModelSizes:
    """Count the parameters on the meta device, with and without the adapter."""
    config = config or architecture(cfg)
    lora = get_peft_config(cfg.model)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config)
        total = model.num_parameters()
        head = model.get_output_embeddings()
        linear = sum(
            m.weight.numel() for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        )  # fmt: skip
        model = get_peft_model(model, lora) if lora else model
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSizes(
        linear=linear,
        other=total - linear,
        trained=sum(trained),
        trained_large=sum(n for n in trained if n >= PAGED_FROM),
        rank=lora.r if lora else 0,
        width=config.hidden_size,
        attention_width=head_size * heads,
        key_width=head_size * (getattr(config, "num_key_value_heads", None) or heads),
        mlp_width=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        vocabulary=config.vocab_size,
        adapted=adapted_share(model, config.num_hidden_layers),
    )


def adapted_share(model: torch.nn.Module, layers: int) -> dict[str, float]:
    """In which share of the layers each of `PROJECTIONS` has an adapter; all of them everywhere
    if there is no adapter, or if the family gives its projections other names."""
    found = Counter(
        name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, LoraLayer)
    )
    if not found or not found.keys() <= set(PROJECTIONS):
        return dict.fromkeys(PROJECTIONS, 1.0)
    return {name: found[name] / layers for name in PROJECTIONS}


# What stays in memory all through training.


def word_bytes(cfg: Config) -> int:
    """Bytes of a weight that is not in 4 or 8 bits."""
    return 4 if str(cfg.model.dtype) in ("float32", "torch.float32") else 2


def trained_word(cfg: Config, sizes: ModelSizes) -> int:
    """Bytes of a trained number: an adapter is float32, whole weights keep their own type."""
    return 4 if sizes.rank else word_bytes(cfg)


def linear_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """The linear layers of all blocks, as they are held.

    NF4 takes half a byte a weight, and a scale of 4 bytes for every 64; with double quantization
    the scale is one byte, and 4 more for every 256 scales: 4.127 bits a weight (QLoRA paper).
    """
    if cfg.model.load_in_4bit:
        scale = 1 + 4 / 256 if cfg.model.use_bnb_nested_quant else 4
        return sizes.linear * (1 / 2 + scale / 64)
    return sizes.linear * (1 if cfg.model.load_in_8bit else word_bytes(cfg))


def optimiser_bytes(cfg: Config, sizes: ModelSizes, cuda: bool) -> tuple[float, float]:
    """AdamW's state, in ordinary and in paged memory; other optimisers count as AdamW.

    It has two moments a trained number. torch keeps them in the number's type, bitsandbytes in 4
    bytes, or in one and a scale of 4 for every 256. Only large tensors are paged, and only on a
    GPU.
    """
    name = str(getattr(cfg.dpo.optim, "value", cfg.dpo.optim))
    moment = trained_word(cfg, sizes)
    if "8bit" in name:
        moment = 1 + 4 / 256
    elif "32bit" in name:
        moment = 4
    paged = sizes.trained_large if cuda and name.startswith("paged") else 0
    return 2 * moment * (sizes.trained - paged), 2 * moment * paged


def stored(cfg: Config, sizes: ModelSizes, cuda: bool = True) -> dict[str, float]:
    """Bytes of all that stays in memory all through training, by part.

    Embeddings, norms and head stay in 16 bits. Without an adapter to switch off, the reference is
    the model a second time.
    """
    word = word_bytes(cfg)
    trained = sizes.trained * trained_word(cfg, sizes)
    plain, paged = optimiser_bytes(cfg, sizes, cuda)
    return {
        "weights": linear_bytes(cfg, sizes) + sizes.other * word,
        "reference model": 0 if sizes.rank else sizes.base * word,
        "adapter": trained if sizes.rank else 0,
        "gradients": trained,
        "optimiser": plain,
        PAGED: paged,
    }


# What a step adds.


def autocast(cfg: Config) -> bool:
    """Whether products run in 16 bits, whatever their operands are."""
    return bool(cfg.dpo.bf16 or cfg.dpo.fp16)


def computed_word(cfg: Config) -> int:
    """Bytes of a number that a layer computes: 16 bits under autocast, else as the weights are."""
    return 2 if autocast(cfg) else word_bytes(cfg)


def input_word(cfg: Config, sizes: ModelSizes) -> int:
    """Bytes of a number that goes into the adapter: float32 as the adapter is, or 16 bits under
    autocast."""
    return 4 if sizes.rank and not autocast(cfg) else computed_word(cfg)


def checkpointing(cfg: Config) -> bool:
    """Whether the activations of all layers but one are computed again in the backward pass."""
    return bool(cfg.dpo.activation_checkpointing or cfg.dpo.gradient_checkpointing)


def input_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """What a token leaves in one layer as the input of the trained projections.

    Under autocast an adapter reads what the layer reads, in 16 bits; queries, keys and values read
    the same, and so do gate and up. So it is in a float32 layer. In a 16-bit layer without autocast
    each adapter has a float32 copy of its own. Each adapter also keeps its r numbers between A and
    B.
    """
    widths = {"attention": sizes.width, "output": sizes.attention_width,
              "feed-forward": sizes.width, "down": sizes.mlp_width}  # fmt: skip
    word = input_word(cfg, sizes)
    copies = sum if word > computed_word(cfg) else max
    own = sum(widths[of] * copies(sizes.adapted[name] for name in names)
              for of, names in READERS.items())  # fmt: skip
    return word * (own + sizes.rank * sum(sizes.adapted.values()))


def cpu_attention_bytes(sizes: ModelSizes, lengths: Lengths, pairs: int, word: int) -> float:
    """What attention keeps in one layer on a CPU, besides queries, keys and values.

    The probabilities: `word` bytes for each head, query and visible key, in blocks of `BLOCK`
    queries; and the prompt's keys and values written out once more beside those of rejected.
    """
    prompt, chosen, rejected = lengths
    shared = 2 * word * sizes.attention_width * (prompt + rejected)
    seen = 0
    for queries, keys in ((prompt + chosen, prompt + chosen), (rejected, prompt + rejected)):
        for start in range(0, queries, BLOCK):
            size = min(BLOCK, queries - start)
            seen += size * (keys - queries + start + size)
    return pairs * (word * sizes.heads * seen + shared)


def layer_bytes(cfg: Config, sizes: ModelSizes, lengths: Lengths, cuda: bool) -> float:
    """What one layer's forward pass keeps for its backward, for a micro-batch.

    In bytes for 16 bits, of which `word` makes 32 where the layer computes in float32: a token
    leaves the inputs of its two norms in float32 (8 d; where the norms are trained also their
    results, 4 d); gate, its activation and up (6 f); the inputs of what is trained; and in
    attention:
    - on a CPU: queries, keys and values of every head (6 a), and `cpu_attention_bytes`;
    - on a GPU with prefix sharing: queries and the result (4 a), keys and values (4 k), and those
      of the prompt and of rejected once more, side by side (4 k each);
    - on a GPU TRL's way: queries, keys, values and the result, all as wide as the heads (8 a),
      where the adapter of the output reads the result as it lies; and the mask.
    """
    pairs, word = cfg.dpo.per_device_train_batch_size, computed_word(cfg)
    tokens, _ = row_tokens(cfg, lengths, pairs)
    inner, keys = sizes.attention_width, sizes.key_width
    norms = (8 if sizes.rank else 8 + 2 * word) * sizes.width
    kept = tokens * (norms + 3 * word * sizes.mlp_width + input_bytes(cfg, sizes))
    if not cuda:
        return kept + tokens * 3 * word * inner + cpu_attention_bytes(sizes, lengths, pairs, word)
    if cfg.recipe.prefix_sharing:
        again = pairs * 2 * word * keys * (lengths.prompt + lengths.rejected)
        return kept + tokens * 2 * word * (inner + keys) + again
    if input_word(cfg, sizes) == word:
        kept -= tokens * word * inner * sizes.adapted["o_proj"]
    return kept + tokens * 4 * word * inner + word * tokens * tokens / (2 * pairs)


def cpu_head_bytes(sizes: ModelSizes, answers: int, word: int) -> float:
    """Logits that exist at once on a CPU (at most `CHUNK`, and `CACHED` in float32), and for each
    answer token three hidden states, of `word` bytes."""
    logits = sizes.vocabulary * answers
    at_once = word * min(CHUNK, logits) + 3 * 4 * min(CACHED, logits)
    return at_once + 3 * word * sizes.width * answers


def gpu_head_bytes(sizes: ModelSizes, tokens: int, answers: int) -> float:
    """TRL's head on a GPU: two float32 tiles of 4,096 tokens by 8,192 words, and 8 d an answer
    token. Where all weights are trained: the head's gradient in float32 and as it is kept (6 V d),
    and the last norm's (6 d a token)."""
    head = min(answers, 4096) * 65_536 + 8 * sizes.width * answers
    if not sizes.rank:
        head += 6 * sizes.vocabulary * sizes.width + 6 * sizes.width * tokens
    return head


def layer_in_passing(sizes: ModelSizes, tokens: int, word: int) -> float:
    """One layer at a time while `tokens` go through it: gate, its activation and up, four hidden
    states, and one matrix, in numbers of `word` bytes."""
    states = tokens * (3 * sizes.mlp_width + 4 * sizes.width)
    return word * (states + sizes.width * sizes.mlp_width)


def gpu_backward(cfg: Config, sizes: ModelSizes, tokens: int, answers: int) -> float:
    """The most that a backward pass has in the air on a GPU: in one feed-forward or in the head.

    In a feed-forward: the gradients of gate, up and their product, of which one takes the place of
    down's input where that was kept for an adapter; a hidden state; without autocast four in
    float32; and the larger of a further result and a matrix in 16 bits. If nothing is computed
    again, the last norm's backward can be more (20 d).
    """
    width, mlp = sizes.width, sizes.mlp_width
    fresh = 2 * mlp * (1 - sizes.adapted["down_proj"]) + 2 * mlp + 2 * width
    if input_word(cfg, sizes) == 4:
        fresh += 8 * width
    most = tokens * fresh + max(2 * mlp * tokens, 2 * width * mlp)
    if not checkpointing(cfg):
        most = max(most, 20 * width * tokens)
    return max(most, gpu_head_bytes(sizes, tokens, answers))


def step_bytes(cfg: Config, sizes: ModelSizes, lengths: Lengths, cuda: bool) -> dict[str, float]:
    """What a micro-batch takes besides what is stored: kept activations, and what is in the air.

    Autocast keeps a 16-bit copy of the whole adapter. With checkpointing each layer keeps its input
    (d numbers a token), and the peak is either in the backward pass, where one layer's activations
    are there again, or at the end of the forward pass, which has copied every A.
    """
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_train_batch_size)
    layer = layer_bytes(cfg, sizes, lengths, cuda)
    word = computed_word(cfg)
    inputs = sizes.layers * tokens * word * sizes.width
    copies = 2 * sizes.trained if sizes.rank and autocast(cfg) else 0
    if not cuda:
        kept = inputs + layer if checkpointing(cfg) else sizes.layers * layer
        return {"activations": kept + copies, "passing": layer_in_passing(sizes, tokens, word),
                "logits": cpu_head_bytes(sizes, answers, word)}  # fmt: skip
    backward = gpu_backward(cfg, sizes, tokens, answers)
    if not checkpointing(cfg):
        return {"activations": sizes.layers * layer + copies, "passing": backward}
    again = layer + backward + copies / sizes.layers
    return {
        "activations": inputs,
        "passing": max(again, layer_in_passing(sizes, tokens, word) + copies / 2),
    }


def reference_bytes(
    cfg: Config, sizes: ModelSizes, lengths: Lengths, cuda: bool
) -> dict[str, float]:
    """What scoring the reference takes besides the weights, from the second micro-batch on: one
    forward pass beside gradients and optimiser. TRL scores it between the policy's forward and
    backward, beside the activations that the policy keeps."""
    kept, word = stored(cfg, sizes, cuda), computed_word(cfg)
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_train_batch_size)
    if not cuda:
        return {"adapter": kept["adapter"], "passing": layer_in_passing(sizes, tokens, word),
                "logits": cpu_head_bytes(sizes, answers, word)}  # fmt: skip
    parts = {name: kept[name] for name in ("adapter", "gradients", "optimiser", PAGED)}
    parts["passing"] = layer_in_passing(sizes, tokens, word)
    if not cfg.recipe.prefix_sharing:
        parts["activations"] = step_bytes(cfg, sizes, lengths, cuda)["activations"]
    return parts


# What comes after the steps.


def cache_bytes(sizes: ModelSizes, sequences: int, tokens: int, word: int) -> float:
    """Keys and values of `sequences` of `tokens` each, `word` bytes a number. The cache grows by
    copying one layer's keys or values, so one of them is there twice."""
    return sequences * tokens * sizes.key_width * word * (2 * sizes.layers + 1)


def evaluation_bytes(cfg: Config, sizes: ModelSizes, lengths: Lengths) -> dict[str, float]:
    """What evaluating takes besides what is stored. Replies are generated, then pairs are scored;
    the larger counts.

    A prompt can be as long as a pair, and `max_new_tokens` come after it. PEFT takes a layer's
    input and gives its output in the adapter's float32 (4 d + 8 f). Generating takes the logits of
    the last token only, once more in float32.
    """
    replies, word = cfg.recipe.generation_batch_size, word_bytes(cfg)
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_eval_batch_size)
    longest = lengths.prompt + max(lengths.chosen, lengths.rejected)
    generating = layer_in_passing(sizes, replies * longest, word)
    if sizes.rank:
        generating += 4 * replies * longest * (sizes.width + 2 * sizes.mlp_width)
    last = replies * sizes.vocabulary * (word + 4)
    return {
        "KV cache": cache_bytes(sizes, replies, longest + cfg.recipe.max_new_tokens, word),
        "activations": max(generating, layer_in_passing(sizes, tokens, word)),
        "logits": max(last, cpu_head_bytes(sizes, answers, word)),
    }


def merged_bytes(cfg: Config, sizes: ModelSizes) -> int:
    """The merged model, in memory and on disk."""
    return (4 if cfg.recipe.merge_dtype == "float32" else 2) * sizes.base


def merge_bytes(cfg: Config, sizes: ModelSizes, cuda: bool) -> dict[str, float]:
    """What merging takes: the model in 16 bits; the adapter, and its file, which PEFT reads onto
    the device; the update of the largest matrix in float32 and what `safe_merge` makes of it
    (8 d f). Merging into the dequantized weights also holds the 4-bit ones, and on a CPU the
    blocks that scoring the policy left behind."""
    parts = {"merged model": merged_bytes(cfg, sizes), "adapter": 2 * stored(cfg, sizes)["adapter"]}
    if sizes.rank:
        parts["passing"] = 8 * sizes.width * sizes.mlp_width
    low_bit = cfg.model.load_in_4bit or cfg.model.load_in_8bit
    if low_bit and cfg.recipe.merge_into == "dequantized":
        parts["weights"] = linear_bytes(cfg, sizes) + (0 if cuda else 2 * sizes.base)
    return parts


# The phases of a run.


def phases(
    cfg: Config, sizes: ModelSizes, lengths: Lengths, cuda: bool, runtime: float
) -> dict[str, dict[str, float]]:
    """Bytes by phase of a run and by part.

    `runtime` is what is there before the model: the CUDA context, or the process with its imports.
    On a CPU the pages of the file that the weights were read from count as the process's own, as
    long as weights lie there as they are used; the system takes them back when it needs them. To
    float32 a file is converted, and closed.
    """
    kept = stored(cfg, sizes, cuda)
    first = {"runtime": runtime}
    libraries = {} if cuda else {"libraries in use": IN_USE}
    mapped = {} if cuda else {"model file, mapped": 2 * sizes.base}
    file = libraries | (mapped if word_bytes(cfg) == 2 else {})
    weights = {k: kept[k] for k in ("weights", "reference model")} | file
    optimiser = {k: kept[k] for k in ("adapter", "optimiser", PAGED)}
    return {
        "load": first | weights | mapped | {"passing": 4 * sizes.vocabulary * sizes.width},
        "reference": first | weights | reference_bytes(cfg, sizes, lengths, cuda),
        "step": first | kept | file | step_bytes(cfg, sizes, lengths, cuda),
        "evaluate": first | weights | optimiser | evaluation_bytes(cfg, sizes, lengths),
        "merge": first | libraries | mapped | merge_bytes(cfg, sizes, cuda),
    }


def on_gpu(cfg: Config) -> bool:
    """Whether the config means a GPU, be there one here or not."""
    return not cfg.given.get("use_cpu", False)


def process_gb() -> float:
    """What this process holds now: Python with torch, transformers, TRL and the rest."""
    return psutil.Process().memory_info().rss / GB


def peak(parts: dict[str, float]) -> float:
    """GB of a phase."""
    return sum(parts.values()) / GB


def needs(cfg: Config, sizes: ModelSizes | None = None) -> dict[str, dict[str, float]]:
    """`phases` for the worst lengths, on what the config means: a GPU, or this process.

    Call it before a model is loaded: on a CPU what the process holds by then counts as runtime.
    """
    runtime = CONTEXT if on_gpu(cfg) else process_gb() * GB
    return phases(cfg, sizes or model_sizes(cfg), worst_lengths(cfg), on_gpu(cfg), runtime)


def memory_table(cfg: Config, sizes: ModelSizes | None = None) -> pd.DataFrame:
    """GB by part and phase, with the sum of each phase as the last row, `peak`."""
    by_phase = needs(cfg, sizes)
    order = list(dict.fromkeys(part for parts in by_phase.values() for part in parts))
    frame = pd.DataFrame(by_phase).div(GB).reindex(index=order, columns=list(by_phase))
    frame = frame[(frame.fillna(0) > 0).any(axis=1)]
    return pd.concat([frame, frame.sum().to_frame("peak").T])


def changed(cfg: Config, changes: dict) -> Config:
    """A copy of `cfg` with some of TRL's arguments changed. They are copied, since building them
    again resets accelerate's state."""
    trial = replace(cfg, dpo=copy(cfg.dpo))
    for name, value in changes.items():
        setattr(trial.dpo, name, value)
    return trial


# What the plan decides: how long pairs may be, and whether there is room.


def settle_max_length(cfg: Config, lengths: np.ndarray) -> None:
    """Put the chosen `max_length` into `cfg`, and print it.

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
    """The length that leaves 95% of the pairs whole, or the longest that model and memory allow;
    and a sentence that says so. `lengths` is (pairs, 3), as `settle_max_length` has them."""
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    wanted = MULTIPLE * max(
        1, int(np.ceil(np.quantile(longest, COVERED, method="higher") / MULTIPLE))
    )
    try:
        config = architecture(cfg)
        sizes = model_sizes(cfg, config)
    except RecipeError as error:
        return wanted, f"max_length: {wanted}, from the data; its memory is unknown ({error})"
    context = getattr(config, "max_position_embeddings", None) or wanted
    room, where = memory_room(cfg)
    fitting = (n for n in range(wanted, 0, -MULTIPLE) if planned_gb(cfg, sizes, n) <= room)
    length = min(next(fitting, wanted), context)
    needed = planned_gb(cfg, sizes, length)
    said = (
        f"max_length: {length}, chosen from the data: {(longest <= length).mean():.0%} of the pairs"
        f" fit whole (median {np.median(longest):.0f} tokens, longest {longest.max():.0f}). Planned"
        f" memory {needed:.1f} GB{where}."
    )
    if needed > room:
        said += " WARNING: by the plan that does not fit."
    elif length < min(wanted, context):
        said += (
            f" {wanted} tokens would cover {COVERED:.0%} but do not fit; a smaller "
            "per_device_train_batch_size or activation_checkpointing: true makes room."
        )
    return length, said


def planned_gb(cfg: Config, sizes: ModelSizes, length: int) -> float:
    """GB of the largest phase before the merge, for pairs that fill `length`. Replies can be
    generated one at a time, so the evaluation does not decide how long the pairs may be."""
    one = replace(cfg, recipe=replace(cfg.recipe, generation_batch_size=1))
    by_phase = needs(changed(one, {"max_length": length}), sizes)
    return max(peak(parts) for name, parts in by_phase.items() if name != "merge")


def memory_room(cfg: Config) -> tuple[float, str]:
    """GB that a plan may take here, and how much that is of what, in words."""
    if not on_gpu(cfg):
        there = psutil.virtual_memory().available / GB + process_gb()
        words = f" of {there:.1f} GB there (a long run comes to hold half as much again)"
        return there / HELD, words
    if not torch.cuda.is_available():
        return np.inf, "; no GPU here to fit it to (python -m scripts.plan names those it fits)"
    there = torch.cuda.mem_get_info()[1] / GB
    return there * (1 - SPARE), f" of the GPU's {there:.1f}"


def require_room(cfg: Config) -> None:
    """Refuse the merge before it begins, if memory, GPU or disk is short.

    On a GPU the merged model comes through main memory when it is saved.

    Raises:
        RoomError: all that is short, each with what there is.
    """
    sizes, cuda = model_sizes(cfg), on_gpu(cfg)
    held, merged = sum(merge_bytes(cfg, sizes, cuda).values()), merged_bytes(cfg, sizes)
    free = {
        "of main memory": (merged if cuda else held, psutil.virtual_memory().available),
        f"on the disk of {cfg.run_dir}": (merged, shutil.disk_usage(existing(cfg.run_dir)).free),
    }
    if cuda and torch.cuda.is_available():
        there = "on the GPU (--set use_cpu=true takes main memory)"
        free = {there: (held, torch.cuda.mem_get_info()[0])} | free
    short = [
        f"{need / GB:.1f} GB {where}, {there / GB:.1f} are free"
        for where, (need, there) in free.items()
        if need > there
    ]
    if short:
        raise RoomError(f"the merge needs {'; and '.join(short)}. Nothing was begun")
