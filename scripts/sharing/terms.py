"""What TRL's log leaves out: the loss's terms apart, and ties in the accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from trl import DPOTrainer


@contextmanager
def policy_logps(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collect the log-probabilities, (2 pairs, tokens - 1), of every forward of `model`."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(
        lambda _module, _args, out: seen.append(out.log_probs.detach())
    )
    try:
        yield seen
    finally:
        hook.remove()


def note_terms(trainer: DPOTrainer, loss: Tensor, logps: Tensor, inputs: dict[str, Tensor]) -> None:
    """Add the terms of `loss` to the metrics that `trainer` is about to log; mend its accuracy.

    `loss/sft` is the chosen answers' mean loss a token, `loss/dpo` what else the loss is made of.
    Their weighted sum is `loss`; they are logged only where there are both. TRL calls a pair right
    whose chosen reward is the higher, and a tie wrong, so that an untrained policy would start at
    0; a tie tells nothing, as a coin does, and counts half.
    """
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    answer = inputs["completion_mask"][:, 1:].bool()
    logps = logps[:, -answer.size(1) :]
    gather = trainer.accelerator.gather_for_metrics
    if "sft" in trainer.loss_types and len(trainer.loss_types) > 1 and not trainer.use_weighting:
        sft = -logps.chunk(2)[0][answer.chunk(2)[0]].mean()
        weight = trainer.loss_weights[trainer.loss_types.index("sft")]
        dpo = loss.detach() - weight * sft
        metrics["loss/dpo"].append(gather(dpo).mean().item())
        metrics["loss/sft"].append(gather(sft).mean().item())
    chosen, rejected = logps.sum(1).chunk(2)
    chosen, rejected = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
    metrics["rewards/accuracies"][-1] += 0.5 * trainer.accelerator.gather(
        (chosen == rejected).float()
    ).mean().item()  # fmt: skip
