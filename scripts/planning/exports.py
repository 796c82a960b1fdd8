"""What becomes of a trained model, and what that takes: memory, disk and time of merging, of each
GGUF file, and of sending to the hub; counted from the parameters, before anything is loaded.

Assumed are the rates of disk and network in `configs/hardware/gpus.yaml`, and:
- the merge reads the base's file by mapping it, holds the model in 16 bits, and makes the update of
  one matrix at a time in float32;
- a GGUF file is written tensor by tensor by llama.cpp's converter (a process of its own) and
  quantizer; its types are llama.cpp's mixture for a Llama (`llama_tensor_get_type` there);
- a push maps what it sends, and hashes it on the way.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from scripts.base import RecipeError
from scripts.config import Config
from scripts.planning.hardware import on_gpu
from scripts.planning.memory import GB, ModelSizes, merged_bytes, process_gb, stored
from scripts.planning.table import table

F16, F32 = GGMLQuantizationType.F16, GGMLQuantizationType.F32
Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
Q5_0, Q8_0 = GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0
GGUF_KINDS = ("f16", "q8_0", "q4_k_m")
# What rows get that blocks of 256 do not divide.
NARROW = {Q4_K: Q5_0, Q6_K: Q8_0}
# A word of the vocabulary in a GGUF file: its text, score, type, and its part of the merges.
WORD_BYTES = 60
TOKENIZER = 20e6  # bytes of what goes along with weights: tokenizer, card, figures; at most


class RoomError(RecipeError):
    """Memory, disk or a package is short for what was asked."""


class Needs(NamedTuple):
    """Bytes that a way out of the run takes."""

    memory: float  # of the process, without pages of files that the system can take back
    mapped: float  # those pages
    gpu: float
    disk: float  # written and kept
    moved: float  # read and written on the disk
    sent: float  # over the network

    @property
    def minutes(self) -> float:
        """Minutes that disk and network take at the assumed rates."""
        rates = table()
        disk, network = rates["disk_mb_per_s"], rates["upload_mb_per_s"]
        return (self.moved / disk + self.sent / network) / 1e6 / 60


def gguf_bytes(sizes: ModelSizes, kind: str) -> float:
    """Bytes of a Llama's GGUF file of `kind`: f16, q8_0 or q4_k_m.

    All that is one-dimensional stays in float32. q4_k_m holds the head, and in half of the layers
    `v_proj` and `down_proj`, in six bits.
    """
    table_size = sizes.vocabulary * sizes.width
    tied = sizes.other < 2 * table_size
    norms = sizes.other - table_size * (1 if tied else 2)
    if kind != "q4_k_m":
        one = {"f16": F16, "q8_0": Q8_0}[kind]
        matrices = (sizes.base - norms) * _word(one, sizes.width)
    else:
        finer = sum(_finer(layer, sizes.layers) for layer in range(sizes.layers)) / sizes.layers
        value = sizes.layers * sizes.width * sizes.key_width
        down = sizes.layers * sizes.width * sizes.mlp_width
        matrices = sizes.linear * _word(Q4_K, sizes.width)
        # down_proj's rows are as long as the feed-forward is wide.
        matrices += down * (_word(Q4_K, sizes.mlp_width) - _word(Q4_K, sizes.width))
        for count, row in ((value, sizes.width), (down, sizes.mlp_width)):
            matrices += finer * count * (_word(Q6_K, row) - _word(Q4_K, row))
        head = table_size * _word(Q6_K, sizes.width)
        matrices += head + (0 if tied else table_size * _word(Q4_K, sizes.width))
    return matrices + 4 * norms + WORD_BYTES * sizes.vocabulary


def _word(kind: GGMLQuantizationType, row: int) -> float:
    """Bytes of a number in `kind`, in rows of `row` numbers."""
    block, size = GGML_QUANT_SIZES[kind]
    if row % block:
        block, size = GGML_QUANT_SIZES[NARROW[kind]]
    return size / block


def _finer(layer: int, layers: int) -> bool:
    """Whether llama.cpp gives this layer more bits (`use_more_bits`)."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def merge_needs(cfg: Config, sizes: ModelSizes, runtime: float | None = None) -> Needs:
    """What `python -m scripts.export` takes, where the config's run trains.

    `runtime` is what the process holds with its libraries, in bytes (None: this one does now). On a
    GPU the model is there, and comes through main memory as it is saved.
    """
    runtime = process_gb() * GB if runtime is None else runtime
    merged, file = merged_bytes(cfg, sizes), 2 * sizes.base
    kept = stored(cfg, sizes)
    adapter = kept["adapter"]
    # The update of the largest matrix in float32, and what `safe_merge` makes of it in 16 bits.
    update = 8 * sizes.width * sizes.mlp_width if sizes.rank else 0
    held = merged + 2 * adapter + update
    gpu = on_gpu(cfg)
    low_bit = cfg.model.load_in_4bit or cfg.model.load_in_8bit
    if low_bit and cfg.recipe.merge_into == "dequantized":
        held += kept["linear layers"]  # the 4-bit weights, until they are written out
        if not gpu:  # whose freed blocks are kept: what scoring the policy before left behind
            held += 2 * sizes.base
    return Needs(
        memory=runtime + (merged if gpu else held), mapped=max(file, merged),
        gpu=held if gpu else 0, disk=merged, moved=file + adapter + 2 * merged, sent=0,
    )  # fmt: skip


def gguf_needs(cfg: Config, sizes: ModelSizes, kind: str, runtime: float | None = None) -> Needs:
    """What a GGUF file of `kind` takes, from the merged model on; a quantized one is made of the
    16-bit file, which is written first and counted here, too."""
    runtime = process_gb() * GB if runtime is None else runtime
    merged, whole, size = (
        merged_bytes(cfg, sizes), gguf_bytes(sizes, "f16"), gguf_bytes(sizes, kind)
    )  # fmt: skip
    largest = sizes.vocabulary * sizes.width
    if kind == "f16":  # a second process, and its largest tensor in float32 and as it is written
        return Needs(memory=2 * runtime + 6 * largest, mapped=max(merged, size), gpu=0, disk=size,
                     moved=merged + 2 * size, sent=0)  # fmt: skip
    return Needs(memory=runtime + 8 * largest, mapped=max(whole, size), gpu=0, disk=whole + size,
                 moved=merged + 2 * (whole + size), sent=0)  # fmt: skip


def push_needs(cfg: Config, sizes: ModelSizes, what: str, runtime: float | None = None) -> Needs:
    """What sending the `adapter` or the `merged` model takes; nothing is copied first."""
    runtime = process_gb() * GB if runtime is None else runtime
    size = merged_bytes(cfg, sizes) if what == "merged" else stored(cfg, sizes)["adapter"]
    return Needs(memory=runtime, mapped=size, gpu=0, disk=TOKENIZER, moved=2 * size,
                 sent=size + TOKENIZER)  # fmt: skip


def ways(cfg: Config, sizes: ModelSizes, runtime: float | None = None) -> dict[str, Needs]:
    """Every way out of a run, with what it takes."""
    found = {"merge": merge_needs(cfg, sizes, runtime)}
    found |= {f"gguf {kind}": gguf_needs(cfg, sizes, kind, runtime) for kind in GGUF_KINDS}
    if sizes.rank:
        found["push adapter"] = push_needs(cfg, sizes, "adapter", runtime)
    return found | {"push merged": push_needs(cfg, sizes, "merged", runtime)}


def exports_table(cfg: Config, sizes: ModelSizes, runtime: float | None = None) -> pd.DataFrame:
    """`ways` in GB and minutes."""
    rows = {
        name: {
            "GPU GB": needs.gpu / GB,
            "memory GB": needs.memory / GB,
            "file pages GB": needs.mapped / GB,
            "disk GB": needs.disk / GB,
            "sent GB": needs.sent / GB,
            "minutes": needs.minutes,
        }
        for name, needs in ways(cfg, sizes, runtime).items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index")
    return frame if on_gpu(cfg) else frame.drop(columns="GPU GB")


def require_room(what: str, needs: Needs, folder: Path) -> None:
    """Refuse `what` before it begins, where memory or the disk of `folder` will not do.

    Raises:
        RoomError: all that is short, each with what there is.
    """
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    short = []
    if needs.gpu and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        if needs.gpu > free:
            short.append(f"{needs.gpu / GB:.1f} GB on the GPU, {free / GB:.1f} are free there "
                         "(--set use_cpu=true takes main memory)")  # fmt: skip
    fresh = needs.memory - psutil.Process().memory_info().rss  # this process holds a part already
    if fresh > (free := psutil.virtual_memory().available):
        short.append(f"{fresh / GB:.1f} GB of main memory, {free / GB:.1f} are free")
    if needs.disk > (free := shutil.disk_usage(there).free):
        short.append(f"{needs.disk / GB:.1f} GB on the disk of {folder}, {free / GB:.1f} are free")
    if short:
        raise RoomError(f"{what} needs {'; and '.join(short)}. Nothing was begun")
