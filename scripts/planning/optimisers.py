"""Bytes of optimiser state for each trained parameter, for every optimiser of transformers."""

from __future__ import annotations

from transformers.training_args import OptimizerNames

# What 8 bits a number, and a scale in float32 for every 256 numbers, take.
EIGHT_BITS = 1 + 4 / 256
FOUR_BITS = 1 / 2 + 4 / 256
# Of trained parameters in float32, with transformers' own arguments (no momentum for SGD and
# RMSprop, no first moment for Adafactor). Tests hold those that run on a CPU to their real state;
# the rest are as their sources have it: torchao's 4 and 8 bits, GrokAdamW's third average,
# schedule-free's z, and APOLLO and GaLore as if they did not project, which is the most they take.
STATE_BYTES: dict[str, float] = {
    "adamw_torch": 8, "adamw_torch_fused": 8, "adamw_torch_xla": 8, "adamw_torch_npu_fused": 8,
    "adamw_anyprecision": 8, "stable_adamw": 8, "grokadamw": 12, "adagrad": 4, "sgd": 0,
    "rmsprop": 4, "adamw_torch_4bit": 2 * FOUR_BITS, "adamw_torch_8bit": 2 * EIGHT_BITS,
    "adamw_bnb_8bit": 2 * EIGHT_BITS, "adamw_8bit": 2 * EIGHT_BITS,
    "paged_adamw_32bit": 8, "paged_adamw_8bit": 2 * EIGHT_BITS,
    "ademamix": 12, "paged_ademamix_32bit": 12,
    "ademamix_8bit": 3 * EIGHT_BITS, "paged_ademamix_8bit": 3 * EIGHT_BITS,
    "lion_32bit": 4, "paged_lion_32bit": 4,
    "lion_8bit": EIGHT_BITS, "paged_lion_8bit": EIGHT_BITS,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": EIGHT_BITS,
    "schedule_free_radam": 8, "schedule_free_adamw": 8, "schedule_free_sgd": 4, "lomo": 0,
    "galore_adamw": 8, "galore_adamw_layerwise": 8,
    "galore_adamw_8bit": 2 * EIGHT_BITS, "galore_adamw_8bit_layerwise": 2 * EIGHT_BITS,
    "apollo_adamw": 8, "apollo_adamw_layerwise": 8,
}  # fmt: skip
# One number for each row and each column of a matrix.
FACTORED = {"adafactor", "adalomo", "galore_adafactor", "galore_adafactor_layerwise"}
# bitsandbytes pages the state of tensors that have at least so many numbers.
PAGED_FROM = 100_000


def state_bytes(optimiser: str | OptimizerNames, trained: int, rows_and_columns: int) -> float:
    """Bytes of the state of `trained` float32 parameters.

    `rows_and_columns` is the sum of the sides of all trained matrices, for optimisers that keep a
    number for each row and column instead of each parameter.
    """
    name = OptimizerNames(optimiser).value
    return 4 * rows_and_columns if name in FACTORED else STATE_BYTES[name] * trained


def is_paged(optimiser: str | OptimizerNames) -> bool:
    """Whether the state lies in CUDA's managed memory, which moves out when the GPU is full."""
    return OptimizerNames(optimiser).value.startswith("paged_")
