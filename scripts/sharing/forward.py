"""A model's forward that packs TRL's batch of pairs into one row. Shapes: `sharing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import MethodType

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from scripts.sharing.attention import FLEX_BLOCK, NAME, attention_arguments
from scripts.sharing.head import AnswerLogps, TokenScores
from scripts.sharing.row import SharedRow, fill_up, pack
from scripts.sharing.support import refuse_unsupported

# Scales of the logits that some families have; TRL's own head knows what to do with each.
LOGIT_SCALES = (
    "final_logit_softcapping", "logit_scale", "lm_head_multiplier", "output_multiplier",
    "logits_scaling",
)  # fmt: skip
_log_probs_only: ContextVar[bool] = ContextVar("log_probs_only", default=False)


@contextmanager
def log_probs_only() -> Iterator[None]:
    """Leave out entropy and the like while the reference is scored: they are logged nowhere."""
    token = _log_probs_only.set(True)
    try:
        yield
    finally:
        _log_probs_only.reset(token)


def share_prefixes(model: PreTrainedModel, attention: str = "segments") -> Callable[[], None]:
    """Give `model`, which has TRL's fused head, the forward that packs pairs into one row.

    `attention` is `segments` (pair by pair), `mask` (SDPA with a dense mask) or `flex`
    (FlexAttention). Any other use of the model, such as `generate`, goes the way it went before.

    Returns:
        A function that undoes it.

    Raises:
        PrefixSharingError: the model is of a kind for which this is known to be wrong.
    """
    refuse_unsupported(model, NAME)
    attention_before, forward_before = model.config._attn_implementation, model.forward
    model.set_attn_implementation(NAME)
    scaled = any(getattr(model.config.get_text_config(), name, None) not in (None, 1.0)
                 for name in LOGIT_SCALES)  # fmt: skip

    @wraps(forward_before)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or "shift_labels" in kwargs or len(labels) % 2:
            return forward_before(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        row = pack(kwargs["input_ids"], kwargs["attention_mask"], labels)
        if attention == "flex":
            row = fill_up(row, FLEX_BLOCK)
        inputs = {"input_ids": row.input_ids_1T, "position_ids": row.position_ids_1T}
        inputs |= {"use_cache": False} | attention_arguments(row, attention)
        head = self.get_output_embeddings()
        if scaled or head.weight.requires_grad or head.weight.device.type != "cpu":
            scores = _scores_of_trls_head(forward_before, inputs, row)
        else:
            hidden_ND = self.base_model(**inputs).last_hidden_state[0, row.sources_N]
            metrics = not _log_probs_only.get()
            scores = TokenScores(
                *AnswerLogps.apply(hidden_ND, head.weight, head.bias, row.targets_N, metrics)
            )
        return _in_trls_layout(scores, row, labels[:, 1:] != -100)

    model.forward = MethodType(forward, model)

    def undo() -> None:
        model.forward = forward_before
        model.set_attn_implementation(attention_before)

    return undo


def _scores_of_trls_head(forward: Callable, inputs: dict, row: SharedRow) -> TokenScores:
    """TRL's head over the row: on a GPU a Triton kernel over labelled tokens; it trains a head."""
    labels_1T = torch.full_like(row.input_ids_1T, -100)
    labels_1T[0, row.sources_N] = row.targets_N
    out = forward(**inputs, shift_labels=labels_1T, fused_lm_head=True)
    fields = (getattr(out, name) for name in TokenScores._fields)
    return TokenScores(*(None if x is None else x[0, row.sources_N] for x in fields))


def _in_trls_layout(
    scores: TokenScores, row: SharedRow, answer_2BL: torch.Tensor
) -> FusedCausalLMOutput:
    """Scores of (N,) tokens where TRL expects them, (2 B, L - 1), and 0 elsewhere."""
    fields = {
        name: None if x is None
        else x.new_zeros(answer_2BL.numel()).index_put((row.places_N,), x).view(answer_2BL.shape)
        for name, x in scores._asdict().items()
    }  # fmt: skip
    loss = -fields["log_probs"].sum() / answer_2BL.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, label_mask=answer_2BL, **fields)
