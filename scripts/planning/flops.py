"""Floating-point operations of a DPO step, counted from the architecture."""

from __future__ import annotations

import numpy as np
from transformers import PretrainedConfig


def step_flops(config: PretrainedConfig, lengths: np.ndarray, lora: int) -> float:
    """Floating-point operations that a DPO step on these pairs cannot do without.

    `lengths` is (pairs, 3), tokens of prompt, chosen and rejected; `lora` the adapter's parameters.
    A product of (m, k) with (k, n) is 2 m k n. Each token of prompt, chosen and rejected counts
    once, in three passes: policy forward, gradients of the activations, reference forward; the
    adapter in forward and two backward products; attention over visible pairs of tokens only, its
    backward twice its forward; the head on answer tokens, in the same three passes.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or width // config.num_attention_heads
    inner = config.num_attention_heads * head_size
    keys = config.num_key_value_heads * head_size
    body = layers * (2 * width * inner + 2 * width * keys + 3 * width * config.intermediate_size)
    prompt, chosen, rejected = lengths.astype(float).T
    tokens, answers = (prompt + chosen + rejected).sum(), (chosen + rejected).sum()
    first = prompt + chosen
    visible = (first * (first + 1) / 2 + rejected * prompt + rejected * (rejected + 1) / 2).sum()
    return (
        3 * 2 * (body + lora) * tokens
        + 4 * layers * 4 * inner * visible
        + 3 * 2 * width * config.vocab_size * answers
    )
