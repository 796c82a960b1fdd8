"""What 4 bits and low rank do, measured: one weight matrix, one learned update, one head's logits.

NF4 and double quantization: QLoRA (arXiv 2305.14314), section 3. Low rank: LoRA
(arXiv 2106.09685), section 4.1; what such updates look like: its section 7.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from bitsandbytes import functional as bnb
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.utils import cached_file

from scripts.base import ROOT, RecipeError

BLOCK = 64  # weights that share a scale
SCALES = 256  # first scales that share a second one, under double quantization
ONCE = 4 + 32 / BLOCK  # bits a weight, its share of the scale included
TWICE = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)  # the same under double quantization
GB = 1024**3


def nf4_levels() -> Tensor:
    """The 16 levels of NF4, (16,), from -1 to 1, as bitsandbytes has them."""
    return bnb.get_4bit_type("nf4", device="cpu")


def int4_levels() -> Tensor:
    """The 15 levels of a symmetric 4-bit integer, (15,), from -1 to 1."""
    return torch.arange(-7, 8) / 7


def read_weight(path: str, name: str, revision: str = "main") -> Tensor:
    """The weight `name` of the checkpoint at `path`, float32, without loading the model.

    Raises:
        RecipeError: the checkpoint has no such weight in safetensors.
    """
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(path, "model.safetensors.index.json", **options)
    shard = "model.safetensors"
    if index:
        with open(index) as file:
            shard = json.load(file)["weight_map"].get(name, shard)
    file = cached_file(path, shard, **options)
    if file is None:
        raise RecipeError(f"{path} has no {shard}; a checkpoint in safetensors is needed")
    with safe_open(file, framework="pt") as tensors:
        if name not in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            known = ", ".join(sorted(tensors.keys())[:3])
            raise RecipeError(f"{path} has no weight `{name}`; it has {known}, ...")
        return tensors.get_tensor(name).float()


def in_blocks(weight: Tensor) -> Tensor:
    """`weight` as (blocks, 64), each block divided by its largest absolute weight.

    Raises:
        RecipeError: the weights are no multiple of 64.
    """
    if weight.numel() % BLOCK:
        raise RecipeError(f"{weight.numel()} weights are no multiple of {BLOCK}")
    blocks = weight.reshape(-1, BLOCK)
    return blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)


def to_int4(weight: Tensor) -> Tensor:
    """`weight` rounded to 4-bit integers, a float32 scale a block of 64, and back."""
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
    return ((blocks / scale).round().clamp(-7, 7) * scale).reshape(weight.shape)


def to_nf4(weight: Tensor, double: bool) -> Tensor:
    """`weight` in bitsandbytes' NF4 and back; with `double`, its scales in 8 bits as well."""
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=double
    )
    return bnb.dequantize_4bit(packed, state).reshape(weight.shape)


def quantization_errors(weight: Tensor) -> dict[str, dict[str, float]]:
    """Relative error and bits a weight of three ways to hold `weight` in 4 bits.

    `error` is the root mean square of what rounding changes, over that of the weights. Bits count
    the scales: 32 for a block of 64; doubly quantized, 8, and 32 more for every 256 blocks
    (QLoRA, section 3, "Double Quantization").
    """
    ways = {
        "int4": (to_int4(weight), ONCE),
        "NF4": (to_nf4(weight, double=False), ONCE),
        "NF4, double quantization": (to_nf4(weight, double=True), TWICE),
    }
    size = weight.square().mean().sqrt()
    return {
        name: {"error": ((back - weight).square().mean().sqrt() / size).item(), "bits": bits}
        for name, (back, bits) in ways.items()
    }


def weights_gb(config: PretrainedConfig) -> dict[str, float]:
    """GB of a model's weights in 16 bits and in doubly quantized NF4, without reading them.

    Embeddings, norms and head stay in 16 bits, as bitsandbytes leaves them.
    """
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    packed = sum(m.weight.numel() for m in linear)
    kept = model.num_parameters() - packed
    full, four = 2 * (packed + kept) / GB, (packed * TWICE / 8 + 2 * kept) / GB
    embedded = kept / (packed + kept)
    return {"GB in 16 bits": full, "GB in NF4": four, "NF4 / 16 bits": four / full,
            "share not quantized": embedded}  # fmt: skip


def is_adapted(model: nn.Module, layer: str) -> bool:
    """Whether `model` has one LoRA layer of that name; another architecture calls it otherwise."""
    return len(_adapted(model, layer)) == 1


def _adapted(model: nn.Module, layer: str) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.endswith(layer) and hasattr(m, "lora_A")]


def update_spectrum(model: PeftModel, layer: str) -> Tensor:
    """Singular values of the update that LoRA learned for `layer`, largest first, (rank,).

    The update is scaling * B A, (out, in); with its thin factors' QR its singular values come from
    a matrix of rank x rank. `layer` is a name like `layers.0.self_attn.q_proj`.

    Raises:
        RecipeError: no adapted layer has that name.
    """
    found = _adapted(model, layer)
    if len(found) != 1:
        raise RecipeError(f"{len(found)} adapted layers are called `{layer}`; one is needed")
    adapted = found[0]
    a = adapted.lora_A["default"].weight.detach().float()  # (rank, in)
    b = adapted.lora_B["default"].weight.detach().float()  # (out, rank)
    thin = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    return torch.linalg.svdvals(adapted.scaling["default"] * thin)


def directions_for(values: Tensor, share: float = 0.9) -> int:
    """How many of the largest singular values hold `share` of the sum of all their squares."""
    energy = values.square().cumsum(0) / values.square().sum().clamp(min=1e-30)
    return int((energy < share).sum().item()) + 1


@dataclass(frozen=True)
class Head:
    """A language model's head and the answer tokens that it scores."""

    tokens: int = 512
    vocabulary: int = 128_256
    hidden: int = 576

    @property
    def logits_gb(self) -> float:
        """All logits at once, in float32."""
        return self.tokens * self.vocabulary * 4 / GB


# Run in a process of its own, so that its peak is the head's and nothing else's. The peak is read
# from /proc: that of getrusage begins with what the parent had.
_CHILD = """
import sys, torch
from scripts.sharing.head import AnswerLogps
way, tokens, vocabulary, hidden = sys.argv[1], *map(int, sys.argv[2:])
torch.manual_seed(0)
weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16).mul_(0.02)
states = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(vocabulary, (tokens,))
status = lambda: dict(line.split(":") for line in open("/proc/self/status"))
kilobytes = lambda name: int(status()[name].split()[0])
before = kilobytes("VmRSS")
if way == "all at once":
    logits = (states @ weight.T).float()
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
else:
    logps = AnswerLogps.apply(states, weight, None, targets, False)[0]
logps.sum().backward()
print((kilobytes("VmHWM") - before) / 1024**2)
"""


def head_memory(head: Head) -> dict[str, float]:
    """Peak memory in GB of scoring `head.tokens`, forward and backward, two ways; measured.

    `all at once` is the textbook's: logits, log-softmax, pick the targets. `a few rows at a time`
    is this project's head (`scripts/sharing/head.py`). Each runs in a process of its own on the
    CPU, and counts what the process grew by beyond weights and states.

    Raises:
        RecipeError: this is not Linux, or the process failed.
    """
    if not sys.platform.startswith("linux"):
        raise RecipeError("the head's memory is read from /proc, which only Linux has")
    peaks = {}
    for way in ("all at once", "a few rows at a time"):
        sizes = [str(n) for n in (head.tokens, head.vocabulary, head.hidden)]
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, way, *sizes], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise RecipeError(f"the head could not be measured: {reason}")
        peaks[way] = float(done.stdout.split()[-1])
    return peaks
