"""Log-probabilities of answer tokens under a frozen head, without the full logits.

Shapes: `sharing`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional as F

CHUNK = 2**24  # logits that exist at once: 32 MB in 16 bits
CACHED = 2**20  # of these in float32 at once: 4 MB, which stay in a CPU's cache


class TokenScores(NamedTuple):
    """What TRL logs of each answer token, (N,) each; all but `log_probs` may be left out.

    The names are those of TRL's `FusedCausalLMOutput`. Log-probability and entropy are in nats.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None

    def part(self, where: slice) -> TokenScores:
        """A view of some tokens' scores, to be written into."""
        return TokenScores(*(None if field is None else field[where] for field in self))


class AnswerLogps(torch.autograd.Function):
    """Log-probabilities of `targets_N` under a frozen head, a few tokens' logits at a time.

    d log p(t) / d h = (1 - p(t)) W[t] - sum over v != t of p(v) W[v] does not depend on what comes
    after, so it is taken while the logits are there: two products with the head where recomputing
    them needs three. The target is kept out of the sum, whose other terms are far smaller.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, metrics):
        """The fields of `TokenScores`, in float32; without `metrics` only the log-probabilities."""
        device, dtype = hidden_ND.device.type, hidden_ND.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight_VD = weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        size, few = max(16, CHUNK // len(weight_VD)), max(1, CACHED // len(weight_VD))
        scores = TokenScores(
            *(hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32) for _ in range(4)),
            torch.empty_like(targets_N, dtype=torch.bool),
        )
        slope_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden_ND), size):
                logits_NV = F.linear(hidden_ND[start : start + size].to(dtype), weight_VD, bias_V)
                for at in range(0, len(logits_NV), few):
                    tile_NV = logits_NV[at : at + few]
                    part = slice(start + at, start + at + len(tile_NV))
                    target_N1 = targets_N[part, None]
                    weights_NV, total_N1 = _score(tile_NV, target_N1, scores.part(part), metrics)
                    if slope_ND is not None:  # the logits give way to the other words' shares
                        tile_NV.copy_(weights_NV.div_(total_N1).scatter_(-1, target_N1, 0))
                if slope_ND is not None:
                    part = slice(start, start + size)
                    other_share_N1 = -torch.expm1(scores.log_probs[part, None])
                    own_ND = other_share_N1 * weight_VD[targets_N[part]]
                    slope_ND[part] = own_ND - logits_NV @ weight_VD
        ctx.save_for_backward(slope_ND)
        ctx.mark_non_differentiable(*scores[1:])
        return tuple(scores) if metrics else (scores.log_probs, *[None] * 4)

    @staticmethod
    def backward(ctx, gradient_N, *_):
        (slope_ND,) = ctx.saved_tensors
        return (gradient_N[:, None] * slope_ND).to(slope_ND.dtype), None, None, None, None


def _score(logits_NV, target_N1, scores: TokenScores, metrics: bool):
    """Write the scores of some tokens into `scores`.

    Returns:
        exp(logit - the largest) of every word, (n, V) in float32, and its sum over words, (n, 1):
        their quotient is the probability.
    """
    logits_NV = logits_NV.float()
    best_N1 = logits_NV.argmax(dim=-1, keepdim=True)
    if metrics:
        scores.is_top1.copy_((best_N1 == target_N1)[:, 0])
        scores.mean_logits.copy_(logits_NV.mean(dim=-1))
    logits_NV -= logits_NV.gather(-1, best_N1)
    weights_NV = logits_NV.exp()
    total_N1 = weights_NV.sum(dim=-1, keepdim=True)
    scores.log_probs.copy_((logits_NV.gather(-1, target_N1) - total_N1.log())[:, 0])
    if metrics:
        total_N = total_N1[:, 0]
        expected_N = torch.linalg.vecdot(weights_NV, logits_NV) / total_N
        scores.entropy.copy_(total_N.log() - expected_N)
        squares_N = torch.linalg.vecdot(weights_NV, weights_NV) / total_N**2
        scores.log_sum_sq_probs.copy_(squares_N.log())
    return weights_NV, total_N1
