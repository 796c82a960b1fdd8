"""Attention in a shared row: each answer sees its prompt and itself. Shapes: `sharing`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from scripts.sharing.row import PairSpan, SharedRow

NAME = "prefix_shared"  # under which transformers knows the attention below
FLEX_BLOCK = 128  # FlexAttention's block: rows of whole blocks are few lengths to compile for
BLOCK = 256  # queries whose attention is computed at once on a CPU


def causal_blocks(
    query_1HQE: torch.Tensor, key_1KSE: torch.Tensor, value_1KSE: torch.Tensor, scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Causal attention on a CPU, where the last Q of the S keys are the queries' own: (1, H, Q, E).

    Plain products of 16-bit matrices, 256 queries at a time, take a third of the time of torch's
    fused CPU kernel, forward and backward. They keep the probabilities in 16 bits for the backward.
    """
    groups = query_1HQE.shape[1] // key_1KSE.shape[1]
    key_HSE, value_HSE = (repeat_kv(t, groups)[0] for t in (key_1KSE, value_1KSE))
    queries, keys = query_1HQE.shape[2], key_HSE.shape[1]
    outputs = []
    for start in range(0, queries, BLOCK):
        block_HQE = query_1HQE[0, :, start : start + BLOCK]
        size = block_HQE.shape[1]
        end = keys - queries + start + size
        future_QS = torch.full((size, end), -torch.inf, dtype=block_HQE.dtype)
        future_QS.triu_(diagonal=end - size + 1)
        scores = torch.baddbmm(future_QS, block_HQE, key_HSE[:, :end].transpose(1, 2), alpha=scale)
        shares = F.dropout(scores.softmax(dim=-1), dropout)
        outputs.append(torch.bmm(shares, value_HSE[:, :end]))
    return torch.cat(outputs, dim=1)[None]


def causal_fused(
    query_1HQE: torch.Tensor, key_1KSE: torch.Tensor, value_1KSE: torch.Tensor, scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """The same on a GPU, in torch's fused kernels.

    `causal_lower_right` says "causal, aligned at the end" without a mask, so that flash attention
    serves rejected, too, which has more keys than queries; a boolean mask would rule it out.
    Flash attention takes fewer key than query heads as they are.
    """
    how = {
        "scale": scale,
        "dropout_p": dropout,
        "enable_gqa": query_1HQE.shape[1] != key_1KSE.shape[1],
    }
    queries, keys = query_1HQE.shape[2], key_1KSE.shape[2]
    if queries == keys:
        how["is_causal"] = True
    else:
        how["attn_mask"] = causal_lower_right(queries, keys)
    return F.scaled_dot_product_attention(query_1HQE, key_1KSE, value_1KSE, **how)


def attend(
    query_1HTE: torch.Tensor, key_1KTE: torch.Tensor, value_1KTE: torch.Tensor, scale: float,
    pairs: list[PairSpan], dropout: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Attention within each pair, as (1, H, T, E), without a (T, T) mask."""
    causal = causal_blocks if query_1HTE.device.type == "cpu" else causal_fused
    outputs, start = [], 0
    for first, shared, second in pairs:
        middle, end = start + first, start + first + second
        own = (t[:, :, start:middle] for t in (query_1HTE, key_1KTE, value_1KTE))
        outputs.append(causal(*own, scale, dropout))
        if second:
            seen = [
                torch.cat([t[:, :, start : start + shared], t[:, :, middle:end]], dim=2)
                for t in (key_1KTE, value_1KTE)
            ]
            outputs.append(causal(query_1HTE[:, :, middle:end], *seen, scale, dropout))
        start = end
    return torch.cat(outputs, dim=2)


def prefix_shared_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, pairs=None, **kwargs
):  # fmt: skip
    """transformers' attention interface: `attend` where `pairs` come along, else plain SDPA or,
    under a block mask, FlexAttention."""
    if pairs is None:
        flex = attention_mask is not None and not isinstance(attention_mask, torch.Tensor)
        attention = flex_attention_forward if flex else sdpa_attention_forward
        return attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, scale, pairs, dropout).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefix_shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def may_attend(pairs: tuple[PairSpan, ...], size: int, device: torch.device) -> Callable:
    """The mask of a row of `size` tokens as a function of (batch, head, query, key), as
    FlexAttention has it.

    A query sees a key of its own pair that is no later than itself, if both are of the same answer
    or the key is of the shared prompt. What fills the row up behind the pairs sees itself.
    """
    pair, answer, shared, position = [], [], [], []
    for index, span in enumerate(pairs):
        pair += [index] * (span.first + span.second)
        answer += [0] * span.first + [1] * span.second
        shared += [span.shared] * (span.first + span.second)
        position += [*range(span.first), *range(span.shared, span.shared + span.second)]
    filling = size - len(pair)
    pair, answer, shared = (part + [-1] * filling for part in (pair, answer, shared))
    position += [0] * filling
    pair, answer, shared, position = (
        torch.tensor(values, device=device) for values in (pair, answer, shared, position)
    )

    def mask(batch, head, query, key):
        past = (pair[query] == pair[key]) & (position[key] <= position[query])
        prompt = (answer[key] == 0) & (position[key] < shared[key])
        return past & ((answer[query] == answer[key]) | prompt)

    return mask


def dense_mask(row: SharedRow) -> torch.Tensor:
    """`may_attend` written out, (1, 1, T, T): simple, and its cost grows with the square of T."""
    size, device = row.input_ids_1T.shape[1], row.input_ids_1T.device
    index = torch.arange(size, device=device)
    return may_attend(tuple(row.pairs), size, device)(0, 0, index[:, None], index[None, :])[
        None, None
    ]


@cache
def compiled_block_mask() -> Callable:
    """torch's `create_block_mask`, which compiled writes no (T, T) mask out; one kernel for all
    lengths of more than one block."""
    return torch.compile(create_block_mask, dynamic=True)


@lru_cache(maxsize=2)
def block_mask(pairs: tuple[PairSpan, ...], size: int, device: torch.device) -> BlockMask:
    """Which blocks of a row of `size` tokens see which, kept for the reference's and the policy's
    pass over the same pairs."""
    make = compiled_block_mask() if device.type == "cuda" else create_block_mask
    return make(may_attend(pairs, size, device), None, None, size, size, device)


def attention_arguments(row: SharedRow, kind: str) -> dict:
    """What the model's forward is given for the attention `kind`: segments, mask or flex."""
    if kind == "segments":
        # transformers passes a mask of four dimensions on as it is; `attend` does not read it.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids_1T.device)
        return {"attention_mask": unused, "pairs": row.pairs}
    if kind == "mask":
        return {"attention_mask": dense_mask(row)}
    size, device = row.input_ids_1T.shape[1], row.input_ids_1T.device
    return {"attention_mask": block_mask(tuple(row.pairs), size, device)}
