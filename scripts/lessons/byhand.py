"""DPO on one pair, by hand: four log-probabilities, and all that is made of them.

Section 4 of the DPO paper (arXiv 2305.18290) in plain torch, without TRL and without this
project's own forward, to be held against both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel
from trl import DPOTrainer

from scripts.evaluate import reference

SIDES = ("chosen", "rejected")


@dataclass
class ByHand:
    """One pair's log-probabilities, token by token, and what DPO makes of them. In nats.

    `policy` and `reference` hold, by side, log p(token | all before it) of the answer's tokens: a
    float32 tensor (answer tokens,). `beta` is the price of straying.
    """

    policy: dict[str, Tensor]
    reference: dict[str, Tensor]
    beta: float

    def log_ratios(self, side: str) -> Tensor:
        """log pi(token) - log pi_ref(token) of each token of an answer, (answer tokens,)."""
        return self.policy[side] - self.reference[side]

    def reward(self, side: str) -> Tensor:
        """The implicit reward beta * log(pi(y|x) / pi_ref(y|x)), up to beta log Z(x); section 4."""
        return self.beta * self.log_ratios(side).sum()

    @property
    def margin(self) -> Tensor:
        """Reward of chosen minus reward of rejected; Z(x) has cancelled."""
        return self.reward("chosen") - self.reward("rejected")

    @property
    def loss(self) -> Tensor:
        """-log sigma(margin): eq. 7."""
        return -logsigmoid(self.margin)

    @property
    def weight(self) -> Tensor:
        """sigma(-margin), which the pair's gradient is scaled with; section 4, "What does the DPO
        update do?". 0.5 before training, near 0 for a pair that is learned."""
        return torch.sigmoid(-self.margin)

    @property
    def sft_loss(self) -> Tensor:
        """The chosen answer's mean loss a token, the term that `loss_type: sft` adds."""
        return -self.policy["chosen"].mean()

    def total(self, types: list[str], weights: list[float]) -> Tensor:
        """The weighted sum of the terms `sigmoid` and `sft`, as TRL adds them up."""
        terms = {"sigmoid": self.loss, "sft": self.sft_loss}
        return sum(w * terms[name] for name, w in zip(types, weights, strict=True))


def token_logps(model: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int]) -> Tensor:
    """log p of each of the answer's tokens, from the model's logits. (answer tokens,), float32.

    Logits at position t are about token t + 1; so the first of the answer's tokens is foretold at
    the prompt's last position.
    """
    ids = torch.tensor([prompt_ids + answer_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (tokens, vocabulary)
    foretold = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return foretold.gather(1, ids[0, len(prompt_ids) :, None])[:, 0]


def by_hand(trainer: DPOTrainer, row: dict, grad: bool = False) -> ByHand:
    """DPO by hand on one tokenised pair, with the model that `trainer` trains, as it now is.

    `row` has `prompt_ids`, `chosen_ids` and `rejected_ids`. With `grad`, the policy's part keeps
    its graph. Arithmetic is the trainer's: 16 bits under autocast where it trains so.
    """
    model, training = trainer.model, trainer.model.training
    model.train(getattr(model, "is_quantized", False))  # 4-bit layers on a CPU repack in eval mode

    def score(scored) -> dict[str, Tensor]:
        return {s: token_logps(scored, row["prompt_ids"], row[f"{s}_ids"]) for s in SIDES}

    try:
        with trainer.accelerator.autocast():
            with torch.no_grad(), reference(trainer) as ref_model:
                ref = score(ref_model)
            with torch.set_grad_enabled(grad):
                policy = score(model)
    finally:
        model.train(training)
    return ByHand(policy, ref, trainer.beta)


@contextmanager
def scratch_metrics(trainer: DPOTrainer) -> Iterator[dict[str, list[float]]]:
    """What TRL notes of a batch while it computes a loss, and nothing of it in the run's log."""
    kept = deepcopy(trainer._metrics), trainer._total_train_tokens
    trainer._metrics["train"].clear()
    try:
        yield trainer._metrics["train"]
    finally:
        trainer._metrics, trainer._total_train_tokens = kept


def by_trl(trainer: DPOTrainer, row: dict) -> dict[str, float]:
    """What TRL's trainer makes of the same pair: loss, rewards, margin, whole log-probabilities.

    `loss` is the whole one, an SFT term and its weight included.
    """
    batch = trainer.data_collator(
        [{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}]
    )
    batch = {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}
    model, training = trainer.model, trainer.model.training
    model.train()
    # Log-probabilities of the reference that the loss would read from the data set are computed
    # here, as without `precompute_ref_log_probs`.
    known, trainer.precompute_ref_logps = trainer.precompute_ref_logps, False
    try:
        with scratch_metrics(trainer) as metrics, torch.no_grad(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, batch).item()
            noted = {name: values[-1] for name, values in metrics.items()}
    finally:
        trainer.precompute_ref_logps = known
        model.train(training)
    return {
        "loss": loss,
        "chosen log-probability": noted["logps/chosen"],
        "rejected log-probability": noted["logps/rejected"],
        "chosen reward": noted["rewards/chosen"],
        "rejected reward": noted["rewards/rejected"],
        "margin": noted["rewards/margins"],
    }


def against_trl(
    hand: ByHand, trl: dict[str, float], types: list[str], weights: list[float]
) -> dict:
    """The same figures by hand and by TRL: {name: (by hand, TRL)}."""
    mine = {
        "chosen log-probability": hand.policy["chosen"].sum(),
        "rejected log-probability": hand.policy["rejected"].sum(),
        "chosen reward": hand.reward("chosen"),
        "rejected reward": hand.reward("rejected"),
        "margin": hand.margin,
        "loss": hand.total(types, weights),
    }
    told = {"loss": f"loss ({' + '.join(types)})"} if len(types) > 1 else {}
    return {told.get(name, name): (value.item(), trl[name]) for name, value in mine.items()}
