"""Memory of a run by phase and part, counted from the config: nothing is loaded."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from accelerate import init_empty_weights
from peft import PeftConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from trl import get_peft_config

from scripts.base import ROOT, RecipeError
from scripts.config import Config
from scripts.planning.optimisers import PAGED_FROM, is_paged, state_bytes
from scripts.sharing.attention import BLOCK
from scripts.sharing.head import CACHED, CHUNK

GB = 1024**3
# Pages of the libraries' own code and constants that come into memory once they are used, and the
# tokenizer: by how much eight measured steps were larger than all else counted, on average
# (`python -m scripts.plan validate`; 0.07 to 0.24 GB).
IN_USE = 0.15 * GB
# Over a run with batches of varying length a CPU's heap, which keeps what is freed, comes to hold
# up to so many times a step's peak (4.2 GB in the default run).
HELD = 1.5
# Outside what torch counts on a GPU: `nvidia-smi` shows both, `max_memory_allocated` neither.
PAGED = "optimiser, paged"
OUTSIDE_TORCH = ("runtime", PAGED)
# The projections of a layer by what goes into them; those that read the same share its 16 bits.
READERS = {
    "attention": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "feed-forward": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS = tuple(name for names in READERS.values() for name in names)


@dataclass(frozen=True)
class ModelSizes:
    """What the memory of a run follows from: parameters and widths of model and adapter."""

    linear: int  # parameters of the linear layers of all blocks, which 4 bits are for
    other: int  # embeddings, norms and head
    trained: int  # of the adapter; of everything where there is none
    trained_large: int  # of these, in tensors that a paged optimiser pages
    trained_sides: int  # rows and columns of all trained matrices
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


def model_sizes(cfg: Config, config: PretrainedConfig | None = None) -> ModelSizes:
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
        model = get_peft_model(model, lora) if lora else model
    trained = [p for p in model.parameters() if p.requires_grad]
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return ModelSizes(
        linear=linear,
        other=total - linear,
        trained=sum(p.numel() for p in trained),
        trained_large=sum(p.numel() for p in trained if p.numel() >= PAGED_FROM),
        trained_sides=sum(sum(p.shape) for p in trained),
        rank=lora.r if lora else 0,
        width=config.hidden_size,
        attention_width=head_size * config.num_attention_heads,
        key_width=head_size
        * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        mlp_width=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        adapted=adapted_share(model, config.num_hidden_layers),
    )


def adapted_share(model: torch.nn.Module, layers: int) -> dict[str, float]:
    """In which share of the layers each of `PROJECTIONS` has an adapter; all of them everywhere
    where there is none, or where the family calls its projections otherwise."""
    names = (n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLayer))
    found = Counter(names)
    if not found or not found.keys() <= set(PROJECTIONS):
        return dict.fromkeys(PROJECTIONS, 1.0)
    return {name: found[name] / layers for name in PROJECTIONS}


def weight_bytes(cfg: Config) -> int:
    """Bytes of a weight that is not in 4 bits."""
    return 4 if str(cfg.model.dtype) in ("float32", "torch.float32") else 2


def autocast(cfg: Config) -> bool:
    """Whether products run in 16 bits, whatever their operands are."""
    return bool(cfg.dpo.bf16 or cfg.dpo.fp16)


def adapter_word(cfg: Config, sizes: ModelSizes) -> int:
    """Bytes of a number that goes into the adapter: in float32, as it is, but for autocast."""
    return 4 if sizes.rank and not autocast(cfg) else 2


def checkpointing(cfg: Config) -> bool:
    """Whether the activations of all layers but one are computed anew in the backward pass."""
    return bool(cfg.dpo.activation_checkpointing or cfg.dpo.gradient_checkpointing)


def stored(cfg: Config, sizes: ModelSizes, cuda: bool = True) -> dict[str, float]:
    """Bytes of what stays in memory all through training.

    The adapter is trained in float32, and so are its gradients and moments. Without an adapter the
    weights themselves are trained, and TRL holds a second copy of them as the reference. A paged
    optimiser pages large tensors only, and nothing on a CPU.
    """
    word = weight_bytes(cfg)
    if cfg.model.load_in_4bit:
        # Half a byte a weight; a scale for every 64: 4 bytes, or 1 and 4 more for every 256 scales.
        scales = sizes.linear / 64
        constants = scales * (1 + 4 / 256) if cfg.model.use_bnb_nested_quant else scales * 4
        linear = sizes.linear / 2 + constants
    elif cfg.model.load_in_8bit:
        linear = sizes.linear  # and a scale a row, which is nothing
    else:
        linear = sizes.linear * word
    trained_word = 4 if sizes.rank else word
    state = state_bytes(cfg.dpo.optim, sizes.trained, sizes.trained_sides)
    name = str(getattr(cfg.dpo.optim, "value", cfg.dpo.optim))
    if not any(mark in name for mark in ("bnb", "8bit", "32bit")):
        state *= trained_word / 4  # torch's own keep it in the weights' type, bitsandbytes does not
    paged = is_paged(cfg.dpo.optim) and cuda and sizes.trained > 0
    paged_state = state * sizes.trained_large / sizes.trained if paged else 0
    return {
        "linear layers": linear,
        "embeddings, norms, head": sizes.other * word,
        "adapter": sizes.trained * trained_word if sizes.rank else 0,
        "reference model": 0 if sizes.rank else sizes.base * word,
        "gradients": sizes.trained * trained_word,
        "optimiser": state - paged_state,
        PAGED: paged_state,
    }


def attention_bytes(sizes: ModelSizes, lengths: tuple[int, int, int], pairs: int) -> float:
    """Bytes that a layer's attention keeps on a CPU for its backward, besides queries and the like.

    The probabilities, 2 bytes for each head, query and key in blocks of `BLOCK` queries, and the
    keys and values that chosen and rejected share, written out again for rejected.
    """
    prompt, chosen, rejected = lengths
    shared = 2 * 2 * sizes.attention_width * (prompt + rejected)
    seen = 0
    for queries, keys in ((prompt + chosen, prompt + chosen), (rejected, prompt + rejected)):
        for start in range(0, queries, BLOCK):
            size = min(BLOCK, queries - start)
            seen += size * (keys - queries + start + size)
    return pairs * (2 * sizes.heads * seen + shared)


def read_bytes(sizes: ModelSizes) -> int:
    """Bytes a token has in one layer as the input of its linear layers, in 16 bits."""
    return 2 * (2 * sizes.width + sizes.attention_width + sizes.mlp_width)


def input_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """Bytes a token leaves in one layer as the input of what is trained there.

    Under autocast an adapter reads what the layer reads, in 16 bits, and queries, keys and values
    read the same, as gate and up do. Without it each adapter has a copy of its own in float32, as
    the adapter is. Its narrow activations are as wide as its input's numbers. bitsandbytes' layers
    of 8 bits keep what they read, adapter or not.
    """
    widths = {"attention": sizes.width, "output": sizes.attention_width,
              "feed-forward": sizes.width, "down": sizes.mlp_width}  # fmt: skip
    word = adapter_word(cfg, sizes)
    copies = sum if word == 4 else max
    own = sum(widths[of] * copies(sizes.adapted[name] for name in names)
              for of, names in READERS.items())  # fmt: skip
    kept = word * (own + sizes.rank * sum(sizes.adapted.values()))
    if not cfg.model.load_in_8bit:
        return kept
    return kept + read_bytes(sizes) - (2 * own if word == 2 else 0)


def layer_bytes(cfg: Config, sizes: ModelSizes) -> float:
    """Bytes a token leaves in one layer for the backward pass, attention's own aside.

    Two norms keep their input in float32 (8 d), and where they are trained their result in 16 bits
    (4 d); gate, its activation and up are kept in 16 bits (6 f); and the inputs of what is trained.
    """
    norms = (8 if sizes.rank else 12) * sizes.width
    return norms + 6 * sizes.mlp_width + input_bytes(cfg, sizes)


def kept_by_a_layer(
    cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int], cuda: bool
) -> float:
    """Bytes that one layer's forward pass keeps for its backward, for a micro-batch."""
    pairs = cfg.dpo.per_device_train_batch_size
    tokens, _ = row_tokens(cfg, lengths, pairs)
    inner, keys = sizes.attention_width, sizes.key_width
    kept = tokens * layer_bytes(cfg, sizes)
    if not cuda:  # every query, key and value head after rotation
        return kept + tokens * 6 * inner + attention_bytes(sizes, lengths, pairs)
    if not cfg.recipe.prefix_sharing:
        # Queries, keys and values of every head and the result, which the output's adapter reads
        # as it lies; and the mask in 16 bits.
        if adapter_word(cfg, sizes) == 2:
            kept -= tokens * 2 * inner * sizes.adapted["o_proj"]
        return kept + tokens * 8 * inner + 2 * tokens * tokens / (2 * pairs)
    # Queries after rotation and the result; keys and values, which are fewer; and those of the
    # prompt and of rejected once more, side by side.
    return kept + tokens * (4 * inner + 4 * keys) + pairs * 4 * keys * (lengths[0] + lengths[2])


@dataclass(frozen=True)
class GpuPass:
    """Bytes in the air at the peaks of a pass on a GPU, which is in one layer at a time."""

    forward: float  # the feed-forward's intermediate results, and a matrix in 16 bits
    backward: float


def gpu_pass(cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int]) -> GpuPass:
    """What a micro-batch has in the air on a GPU, as the simulated runs show it.

    The head comes after the last layer, when nothing else is in the air: its tiles (4,096 tokens
    by 8,192 words in float32, twice) and hidden states count only where they are the larger.
    """
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_train_batch_size)
    width, mlp = sizes.width, sizes.mlp_width
    widest = max(2 * mlp * tokens, 2 * width * mlp)
    head = min(answers, 4096) * 65_536 + 8 * width * answers
    if not sizes.rank:  # the head's gradient, in float32 and as it is kept, and the last norm
        head += 6 * sizes.vocabulary * width + 6 * width * tokens
    # The gradients of gate, up and their product; that of down's input takes its place.
    fresh = 2 * mlp * (1 - sizes.adapted["down_proj"]) + 2 * mlp + 2 * width
    if adapter_word(cfg, sizes) == 4:
        fresh += 8 * width  # in float32, as the adapters give them back
    backward = max(tokens * fresh + widest, head)
    if not checkpointing(cfg):
        backward = max(backward, 20 * width * tokens)  # the last norm's
    forward = tokens * (4 * mlp + 8 * width) + widest
    if cfg.model.load_in_8bit:  # sums in 32 bits, scaled in float16 and copied to bfloat16
        forward = tokens * (10 * mlp + 9 * width)
        backward = max(backward, tokens * (5 * mlp + 4 * width))  # down's input, read once more
    return GpuPass(forward, backward)


def passing_bytes(sizes: ModelSizes, tokens: int) -> float:
    """Bytes of one layer at a time while `tokens` go through it: its activations, and one of its
    matrices in 16 bits."""
    matrix = 2 * sizes.width * sizes.mlp_width
    return tokens * (3 * 2 * sizes.mlp_width + 4 * 2 * sizes.width) + matrix


def row_tokens(cfg: Config, lengths: tuple[int, int, int], pairs: int) -> tuple[int, int]:
    """Tokens that the model, and that the head, goes through for `pairs` pairs of `lengths`."""
    prompt, chosen, rejected = lengths
    if cfg.recipe.prefix_sharing:
        return pairs * (prompt + chosen + rejected), pairs * (chosen + rejected)
    both = 2 * pairs * (prompt + max(chosen, rejected))  # two rows a pair, padded to the longest
    return both, both


def head_bytes(sizes: ModelSizes, answers: int) -> float:
    """Bytes of the logits that exist at once, and of what the head keeps for `answers` tokens."""
    return 2 * CHUNK + 3 * 4 * CACHED + 3 * 2 * sizes.width * answers


def cache_bytes(sizes: ModelSizes, sequences: int, tokens: int, word: int) -> float:
    """Bytes of the keys and values of `sequences` of `tokens` each, in `word` bytes a number.

    The cache grows by copying one layer's keys or values, so that one of them is there twice.
    """
    return sequences * tokens * sizes.key_width * word * (2 * sizes.layers + 1)


def merged_bytes(cfg: Config, sizes: ModelSizes) -> int:
    """Bytes of the merged model, in memory and on disk."""
    return (4 if cfg.recipe.merge_dtype == "float32" else 2) * sizes.base


def phases(
    cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int], cuda: bool, runtime: float
) -> dict[str, dict[str, float]]:
    """Bytes by phase of a run and by part: load, reference pass, step, evaluate, merge.

    `lengths` are the tokens of prompt, chosen and rejected of each pair; `runtime` is what is there
    before the model: the CUDA context, or the process with its imports.
    """
    kept = stored(cfg, sizes, cuda)
    # On a CPU the pages of the file that the weights were read from count as the process's own; the
    # system takes them back when it needs them.
    file = {} if cuda else {"model file, mapped": 2 * sizes.base, "libraries in use": IN_USE}
    resident = ("linear layers", "embeddings, norms, head", "reference model")
    weights = {k: kept[k] for k in resident} | file
    optimiser = {k: kept[k] for k in ("optimiser", PAGED)}
    return {
        "load": {"runtime": runtime, **weights, "on the way": 4 * sizes.vocabulary * sizes.width},
        "reference": {"runtime": runtime, **weights, **_reference(cfg, sizes, lengths, cuda)},
        "step": {"runtime": runtime, **kept, **file, **_step(cfg, sizes, lengths, cuda)},
        "evaluate": {"runtime": runtime, **weights, "adapter": kept["adapter"], **optimiser,
                     **_evaluation(cfg, sizes, lengths)},
        # PEFT reads the adapter's file onto the device before it fills the adapter.
        "merge": {"runtime": runtime, "merged model": merged_bytes(cfg, sizes),
                  "adapter": 2 * kept["adapter"]},
    }  # fmt: skip


def _copies(cfg: Config, sizes: ModelSizes) -> float:
    """Bytes of autocast's 16-bit copies of the whole adapter, which is trained in float32."""
    return 2 * sizes.trained if sizes.rank and autocast(cfg) else 0


def _step(
    cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int], cuda: bool
) -> dict[str, float]:
    """What a step takes besides what is stored: kept activations, and what is in the air."""
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_train_batch_size)
    layer = kept_by_a_layer(cfg, sizes, lengths, cuda)
    inputs = sizes.layers * tokens * 2 * sizes.width  # of every layer
    copies = _copies(cfg, sizes)
    if not cuda:
        kept = inputs + layer if checkpointing(cfg) else sizes.layers * layer
        return {"activations": kept + copies, "passing": passing_bytes(sizes, tokens),
                "logits chunk": head_bytes(sizes, answers)}  # fmt: skip
    gpu = gpu_pass(cfg, sizes, lengths)
    if not checkpointing(cfg):
        return {"activations": sizes.layers * layer + copies, "passing": gpu.backward}
    # Either the backward pass, in which one layer's activations are there anew, or the end of the
    # forward pass, which has kept the copies of every A.
    again = max(layer + gpu.backward + copies / sizes.layers, gpu.forward + copies / 2)
    if cfg.model.load_in_8bit:  # bitsandbytes keeps these where checkpointing does not see them
        inputs += sizes.layers * tokens * read_bytes(sizes)
    return {"activations": inputs, "passing": again}


def _reference(
    cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int], cuda: bool
) -> dict[str, float]:
    """What scoring the reference takes besides the weights, from the second micro-batch on."""
    kept = stored(cfg, sizes, cuda)
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_train_batch_size)
    if not cuda:
        return {"adapter": kept["adapter"], "passing": passing_bytes(sizes, tokens),
                "logits chunk": head_bytes(sizes, answers)}  # fmt: skip
    parts = {name: kept[name] for name in ("adapter", "gradients", "optimiser", PAGED)}
    parts["passing"] = gpu_pass(cfg, sizes, lengths).forward
    if not cfg.recipe.prefix_sharing:  # TRL scores it between the policy's forward and backward
        parts["activations"] = _step(cfg, sizes, lengths, cuda)["activations"]
    return parts


def _evaluation(cfg: Config, sizes: ModelSizes, lengths: tuple[int, int, int]) -> dict[str, float]:
    """Bytes that evaluating takes besides what is stored: replies are generated, pairs scored.

    Both go one after the other, so that the larger counts. Generating takes the logits of the last
    token only, once more in float32, and writes `max_new_tokens` after each prompt. A prompt can be
    as long as a pair: questions on texts are no pairs, and may have no answer to leave room for.
    """
    replies, word = cfg.recipe.generation_batch_size, weight_bytes(cfg)
    tokens, answers = row_tokens(cfg, lengths, cfg.dpo.per_device_eval_batch_size)
    longest = lengths[0] + max(lengths[1:])
    generating = passing_bytes(sizes, replies * longest)
    if sizes.rank:  # PEFT takes a layer's input, and gives its output, in the adapter's float32
        generating += 4 * replies * longest * (sizes.width + 2 * sizes.mlp_width)
    last = replies * sizes.vocabulary * (word + 4)
    return {
        "KV cache": cache_bytes(sizes, replies, longest + cfg.recipe.max_new_tokens, word),
        "activations": max(generating, passing_bytes(sizes, tokens)),
        "logits chunk": max(last, head_bytes(sizes, answers)),
    }


def peak(parts: dict[str, float]) -> float:
    """GB of a phase."""
    return sum(parts.values()) / GB


def process_gb() -> float:
    """What this process holds now: Python with torch, transformers, TRL and the rest."""
    return psutil.Process().memory_info().rss / GB
