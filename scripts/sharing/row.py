"""A batch of pairs as one row of tokens without padding, and the way back. Shapes: `sharing`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


class PairSpan(NamedTuple):
    """How many tokens one pair has in the row, part by part."""

    first: int  # prompt and chosen
    shared: int  # how many of these rejected attends to: its prompt, without the last token
    second: int  # the last prompt token again, and rejected


@dataclass
class SharedRow:
    """A batch of pairs as one row of T tokens, and where in TRL's layout each score belongs."""

    input_ids_1T: torch.Tensor
    position_ids_1T: torch.Tensor  # rejected goes on from where its prompt ends
    targets_N: torch.Tensor  # the answer tokens to score
    sources_N: torch.Tensor  # the place in the row from which each is predicted
    places_N: torch.Tensor  # its place in TRL's flattened (2 B, L - 1) output
    pairs: list[PairSpan]


def pack(
    input_ids_2BL: torch.Tensor, attention_mask_2BL: torch.Tensor, labels_2BL: torch.Tensor
) -> SharedRow:
    """TRL's padded batch, the B chosen rows first, as one row.

    The two rows of a pair share everything before their answers if it is the same. With `keep_end`
    truncation it may differ, and then they share nothing. The last token of an answer predicts
    nothing, so it is left out.
    """
    device, width = input_ids_2BL.device, input_ids_2BL.shape[1] - 1
    ids, labels = input_ids_2BL.cpu().numpy(), labels_2BL.cpu().numpy()
    sizes = attention_mask_2BL.sum(dim=1).tolist()
    half = len(sizes) // 2
    tokens, positions, targets, sources, places, pairs = [], [], [], [], [], []
    start = 0
    for i in range(half):
        shared = _shared_tokens(ids, labels, sizes, i, i + half)
        lengths = []
        for row, skip in ((i, 0), (i + half, shared)):
            end = max(sizes[row] - 1, skip)
            scored = np.flatnonzero(labels[row, skip + 1 : end + 1] != -100)
            tokens.append(ids[row, skip:end])
            positions.append(np.arange(skip, end))
            targets.append(labels[row, skip + 1 : end + 1][scored])
            sources.append(start + scored)
            places.append(row * width + skip + scored)
            lengths.append(end - skip)
            start += end - skip
        pairs.append(PairSpan(lengths[0], shared, lengths[1]))
    arrays = (tokens, positions, targets, sources, places)
    tensors = [torch.from_numpy(np.concatenate(a).astype(np.int64)).to(device) for a in arrays]
    return SharedRow(tensors[0][None], tensors[1][None], *tensors[2:], pairs)


def fill_up(row: SharedRow, multiple: int) -> SharedRow:
    """The row made as long as the next multiple of `multiple`.

    The added tokens are scored nowhere, and `may_attend` lets them see each other alone.
    """
    extra = (0, -row.input_ids_1T.shape[1] % multiple)
    ids, positions = (F.pad(t, extra) for t in (row.input_ids_1T, row.position_ids_1T))
    return replace(row, input_ids_1T=ids, position_ids_1T=positions)


def _shared_tokens(ids, labels, sizes, chosen: int, rejected: int) -> int:
    """How many tokens the two rows begin with alike and need only once; the last is kept twice."""
    begins = [int((labels[row] == -100)[: sizes[row]].argmin()) for row in (chosen, rejected)]
    shared = begins[0] - 1 if begins[0] == begins[1] else 0
    if shared < 0 or (ids[chosen, : shared + 1] != ids[rejected, : shared + 1]).any():
        return 0
    return shared
