"""Which models can share prefixes, and the proof, before training, that this one does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from scripts.cli import RecipeError


class PrefixSharingError(RecipeError):
    """This model or setting cannot share prefixes; `prefix_sharing: false` takes TRL's own way."""


def refuse_unsupported(model: PreTrainedModel, own_attention: str) -> None:
    """Refuse what is known beforehand to mix tokens other than by plain causal attention.

    What is not known beforehand `Scores` tells: a family may ignore the arguments of its attention,
    or carry a state from token to token.

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


def scores(model: torch.nn.Module, batch: dict, accelerator) -> Scores:
    """Score `batch` as TRL's trainer does, and differentiate chosen minus rejected.

    Of the trained parameters the first and the last sixteen are enough: the first see all that
    comes after them, and an adapter of rank 416 has 4 GB of gradients.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    picked = list(dict.fromkeys([*trained[:16], *trained[-16:]]))
    with accelerator.autocast():
        logps = _log_probs(model, batch)
    chosen, rejected = logps.sum(dim=1).chunk(2)
    gradients = torch.autograd.grad((chosen - rejected).sum(), picked, allow_unused=True)
    flat = [g.detach().float().flatten() for g in gradients if g is not None]
    return Scores(logps.detach(), torch.cat(flat) if flat else logps.new_zeros(1))


@torch.no_grad()
def leak(model: torch.nn.Module, batch: dict, accelerator) -> float:
    """How far rejected's log-probabilities move, in nats a token at most, when chosen is another.

    Both batches have the same shapes, so where nothing leaks the difference is exactly 0.
    """
    half = len(batch["input_ids"]) // 2
    other = {name: value.clone() for name, value in batch.items()}
    answer = other["completion_mask"][:half].bool()
    other["input_ids"][:half][answer] = other["input_ids"][:half][answer].flip(0)
    with accelerator.autocast():
        one, two = (_log_probs(model, b)[half:] for b in (batch, other))
    return (one - two).abs().max().item()


def _log_probs(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
        fused_lm_head=True, use_cache=False,
    ).log_probs  # fmt: skip


# How far both ways may differ: per token in nats at most and on average, and in the gradient's
# length. In 16 bits the order of a sum alone makes such a difference; a wrong mask makes nats.
LIMITS = {"float32": (2e-3, 5e-4, 1e-2), "16 bits": (1.0, 0.06, 0.25)}


def disagreement(stock: Scores, shared: Scores, leaked: float, sixteen_bits: bool) -> str | None:
    """What tells the two ways of scoring the same pairs apart, in words, or None."""
    most, mean, turned = LIMITS["16 bits" if sixteen_bits else "float32"]
    gap = (stock.logps - shared.logps).abs()
    answers = (stock.logps != 0).sum().clamp(min=1)
    if not gap.max() <= most or not gap.sum() / answers <= mean:
        return f"log-probabilities differ by up to {gap.max():.3g} nats a token"
    length = stock.gradient.norm().clamp(min=1e-12)
    distance = ((stock.gradient - shared.gradient).norm() / length).item()
    if not distance <= turned:
        return f"gradients differ by {distance:.0%}"
    if not leaked <= mean:
        return f"rejected sees chosen (its log-probabilities move by {leaked:.3g} nats)"
    return None
