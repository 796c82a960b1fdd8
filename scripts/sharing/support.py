"""Which models can share prefixes, and the proof, before training, that this one does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from scripts.base import RecipeError


class PrefixSharingError(RecipeError):
    """This model or setting cannot share prefixes; `prefix_sharing: false` takes TRL's own way."""


def refuse_unsupported(model: PreTrainedModel, own_attention: str) -> None:
    """Refuse what is known beforehand to mix tokens other than by plain causal attention.

    What is not known beforehand `disagreement` finds: a family may ignore the arguments of its
    attention, or carry a state from token to token.

    Raises:
        PrefixSharingError: it names what the model has.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise PrefixSharingError(f"prefix_sharing: sliding windows ({window}) are not supported")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise PrefixSharingError(f"prefix_sharing: {', '.join(sorted(kinds))} is not supported")
    # Rotations that follow the length of the whole input: the shared row has another length.
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation in ("dynamic", "longrope"):
        raise PrefixSharingError(f"prefix_sharing: {rotation} positions are not supported")
    if getattr(config, "attn_logit_softcapping", None):
        raise PrefixSharingError("prefix_sharing: capped attention scores are not supported")
    if config._attn_implementation not in ("sdpa", "eager", own_attention):
        raise PrefixSharingError(
            f"prefix_sharing needs attn_implementation: sdpa, not {config._attn_implementation}"
        )


class Scores(NamedTuple):
    """What one forward and backward give for a batch of pairs."""

    logps: torch.Tensor  # (2 B, L - 1), in nats, 0 outside the answers
    gradient: torch.Tensor  # of some trained parameters, in one row, float32


def scores(model: torch.nn.Module, batch: dict, accelerator: Accelerator) -> Scores:
    """Score `batch` as TRL's trainer does, and differentiate chosen less half of rejected, a token.

    The half keeps a gradient where both answers are the same. Of the trained parameters the first
    and the last sixteen are enough: the first see all that comes after them, and an adapter of
    rank 416 has 4 GB of gradients. A parameter without a gradient counts as zeros.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    picked = list(dict.fromkeys([*trained[:16], *trained[-16:]]))
    with accelerator.autocast():
        logps = _log_probs(model, batch)
    chosen, rejected = logps.sum(dim=1).chunk(2)
    loss = (chosen - rejected / 2).sum() / batch["completion_mask"].sum()
    found = torch.autograd.grad(loss, picked, allow_unused=True)
    gradients = [
        torch.zeros_like(p) if g is None else g for p, g in zip(picked, found, strict=True)
    ]
    return Scores(logps.detach(), torch.cat([g.float().flatten() for g in gradients]))


@torch.no_grad()
def leak(
    model: torch.nn.Module, batch: dict, logps_2BL: torch.Tensor, accelerator: Accelerator
) -> float:
    """How far rejected's `logps_2BL` move, in nats a token at most, when chosen is another.

    Both batches have the same shapes, so where nothing leaks the difference is exactly 0.
    """
    half = len(batch["input_ids"]) // 2
    ids = batch["input_ids"].clone()
    answer = batch["completion_mask"][:half].bool()
    ids[:half][answer] = (ids[:half][answer] + 1) % model.config.get_text_config().vocab_size
    with accelerator.autocast():
        changed_2BL = _log_probs(model, batch | {"input_ids": ids})
    return (changed_2BL - logps_2BL)[half:].abs().max().item()


def _log_probs(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
        fused_lm_head=True, use_cache=False,
    ).log_probs  # fmt: skip


class Limits(NamedTuple):
    """How far both ways of scoring may differ and still count as the same."""

    most: float  # nats a token, of the token that differs most
    mean: float  # nats a token
    gradient: float  # length of the difference, as a share of the gradient's length
    leaked: float  # nats a token; nothing but a leak moves it at all


# Set between what SmolLM2-135M measured over ten pairs of pairs and what a wrong mask does to it.
# In NF4 and bfloat16 the order of sums alone makes up to 0.45 nats, 0.045 on average and 14% of
# the gradient; in float32 2e-5, 2e-6 and 0.001%; it never made a leak. If rejected
# sees chosen, or nothing is masked: at least 3.3 nats, 0.59, 41% and a leak of 2.7.
FLOAT32 = Limits(most=2e-3, mean=5e-4, gradient=1e-2, leaked=1e-4)
SIXTEEN_BITS = Limits(most=2.5, mean=0.25, gradient=0.7, leaked=0.05)


def disagreement(stock: Scores, shared: Scores, leaked: float, limits: Limits) -> str | None:
    """What tells the two ways of scoring the same pairs apart, in words, or None."""
    # Each test is written so that it fails for a number that is none.
    gap = (stock.logps - shared.logps).abs()
    answers = (stock.logps != 0).sum().clamp(min=1)
    if not gap.max() <= limits.most or not gap.sum() / answers <= limits.mean:
        return f"log-probabilities differ by up to {gap.max():.3g} nats a token"
    length = stock.gradient.norm().clamp(min=1e-12)
    distance = ((stock.gradient - shared.gradient).norm() / length).item()
    if not distance <= limits.gradient:
        return f"gradients differ by {distance:.0%}"
    if not leaked <= limits.leaked:
        return f"rejected sees chosen (its log-probabilities move by {leaked:.3g} nats)"
    return None
