"""TRL's `DPOTrainer` over a forward that runs each prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftModel
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from scripts.sharing import reference_cache
from scripts.sharing.forward import log_probs_only, share_prefixes
from scripts.sharing.lora import fuse_adapter, unfuse_adapter
from scripts.sharing.support import (
    FLOAT32,
    SIXTEEN_BITS,
    PrefixSharingError,
    Scores,
    disagreement,
    leak,
    scores,
)
from scripts.sharing.terms import note_terms, policy_logps


class PartTokens(NamedTuple):
    """Tokens of a prompt and of each of its answers."""

    prompt: int
    answer: int


# How many pairs both ways are compared on, and at most how many tokens of each.
PROOF_PAIRS = 2
PROOF_TOKENS = PartTokens(prompt=24, answer=16)


@contextmanager
def checkpointing_paused(model: torch.nn.Module) -> Iterator[None]:
    """Keep TRL from switching activation checkpointing off and on around a reference pass.

    Switching it on again hooks the embeddings once more each time, and forgets or refuses
    `every_n_layers`. Here the layers' flags alone are put down and up again, and TRL, which then
    sees no checkpointing, has nothing to switch.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


# In place of TRL's own, for its trainer as well as for the one below.
dpo_trainer.disable_gradient_checkpointing = lambda model, *_: checkpointing_paused(model)


class PrefixSharedDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, each prompt run once and nothing padded.

    Before anything is trained, two short pairs of the data go both ways, TRL's and this one. If
    log-probabilities or gradients differ, or the model is of a kind that cannot share, training
    goes TRL's way, and a line says why; `refusal` holds the reason, or None.

    With `precompute_ref_log_probs` the reference's log-probabilities are kept on disk under a key
    of its weights and of the tokens, and later runs read them. See
    https://huggingface.co/docs/trl/dpo_trainer for everything else.
    """

    def __init__(self, *args, prefix_attention: str = "segments", **kwargs) -> None:
        self.prefix_attention, self.refusal = prefix_attention, None
        self._undo: list[Callable[[], None]] | None = None
        super().__init__(*args, **kwargs)
        self._share_if_equal()

    def _share_if_equal(self) -> None:
        """Share prefixes, unless the model cannot or gives other numbers that way."""
        if self._undo is not None:  # done already, before reference log-probabilities were computed
            return
        self._undo = []
        try:
            if self._is_vlm or self.aux_loss_enabled:
                kind = "vision" if self._is_vlm else "mixture-of-experts"
                raise PrefixSharingError(f"prefix_sharing: {kind} models are not supported")
            if self.args.torch_compile:
                raise PrefixSharingError("prefix_sharing: torch_compile is not supported")
            self._share_and_compare()
        except PrefixSharingError as error:
            self._unshare()
            self.refusal = str(error)
            if self.accelerator.is_main_process:
                print(f"{error}. Training goes TRL's own way, slower and in more memory.")

    def _share_and_compare(self) -> None:
        """Score a small batch TRL's way, then this way; raise if they differ."""
        model, proof = self.model, self._proof_batch()
        training = model.training
        # Without dropout, which would differ by itself; but 4-bit layers on a CPU repack their
        # weights outside training mode.
        model.train(getattr(model, "is_quantized", False))
        try:
            stock = scores(model, proof, self.accelerator)
            self._share()
            difference = self._difference(stock, proof)
        finally:
            model.train(training)
        if difference:
            name = type(self._base(model)).__name__
            raise PrefixSharingError(f"prefix_sharing fails for {name}: {difference}")

    def _difference(self, stock: Scores, proof: dict) -> str | None:
        """What tells this way of scoring from TRL's; a family that it breaks gives its error."""
        try:
            shared = scores(self.model, proof, self.accelerator)
            leaked = leak(self.model, proof, shared.logps, self.accelerator)
        except Exception as error:  # whatever a family's own code makes of the shared row
            message = (str(error).splitlines() or [""])[0]
            return f"it stops with {type(error).__name__}: {message[:200]}"
        sixteen_bits = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        return disagreement(stock, shared, leaked, SIXTEEN_BITS if sixteen_bits else FLOAT32)

    @staticmethod
    def _base(model):
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def _share(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        for one in (model, self.ref_model and self.accelerator.unwrap_model(self.ref_model)):
            if one is None:
                continue
            if any(c.is_prompt_learning for c in getattr(one, "peft_config", {}).values()):
                raise PrefixSharingError("prefix_sharing: prompt tuning is not supported; use LoRA")
            self._undo.append(share_prefixes(self._base(one), self.prefix_attention))
            fuse_adapter(one)
            self._undo.append(lambda one=one: unfuse_adapter(one))

    def _reference_model(self):
        return self.model if self.ref_model is None else self.ref_model

    def _unshare(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _proof_batch(self) -> dict:
        """Two short pairs of the data, or the only one, on the model's device.

        Raises:
            PrefixSharingError: the weights are spread over processes, so no one can score alone.
        """
        if any(p.is_meta or p.numel() == 0 for p in self.model.parameters()):
            raise PrefixSharingError("prefix_sharing: sharded weights are not supported")
        limit = self.args.max_length or sum(PROOF_TOKENS)
        answer = min(PROOF_TOKENS.answer, limit // 2)
        prompt = min(PROOF_TOKENS.prompt, limit - answer)
        rows = [
            {
                "prompt_ids": row["prompt_ids"][-prompt:],
                "chosen_ids": row["chosen_ids"][:answer],
                "rejected_ids": row["rejected_ids"][:answer],
            }
            for row in islice(self.train_dataset, PROOF_PAIRS)
        ]
        batch = self.data_collator(rows)
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """TRL's, which tokenises; pairs that have their tokens are taken as they are."""
        if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names or ()):
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def compute_ref_log_probs(self, model, inputs):
        """TRL's, log-probabilities only."""
        with log_probs_only():
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's, with the reference scored beforehand by the method above.

        The log gets `loss/dpo` and `loss/sft` where the loss has an SFT term, and its accuracy
        counts ties half (`sharing.terms`).
        """
        if self.precompute_ref_logps:
            return self._noted_loss(model, inputs, return_outputs)
        scored = self.compute_ref_log_probs(self._reference_model(), inputs)
        self.precompute_ref_logps = True
        try:
            known = dict(zip(reference_cache.COLUMNS, scored, strict=True))
            return self._noted_loss(model, {**inputs, **known}, return_outputs)
        finally:
            self.precompute_ref_logps = False

    def _noted_loss(self, model, inputs, return_outputs):
        """TRL's loss over known reference log-probabilities, and what TRL does not log of it."""
        if self.args.torch_compile:  # a hook would have the model compiled again at every step
            return super()._compute_loss(model, inputs, return_outputs)
        with policy_logps(self.model) as seen:
            result = super()._compute_loss(model, inputs, return_outputs)
        note_terms(self, result[0] if return_outputs else result, seen[0], inputs)
        return result

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's pass over the reference, longest pairs first; or what an earlier run has kept."""
        self._share_if_equal()  # TRL calls this while it is still being built
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        model = self.accelerator.unwrap_model(self._reference_model())
        file = (
            reference_cache.cache_folder()
            / f"{reference_cache.cache_key(model, dataset, self.args)}.npz"
        )
        if not file.exists():
            columns = reference_cache.token_columns(dataset)
            sizes = [sum(map(len, ids)) for ids in zip(*columns, strict=True)]
            order = np.argsort(sizes)[::-1]  # what does not fit in memory fails at once
            scored = super()._precompute_ref_logps(dataset.select(order), name, batch_size)
            if self.accelerator.is_main_process:
                kept = {k: np.empty(len(order), np.float32) for k in reference_cache.COLUMNS}
                for column, values in kept.items():
                    values[order] = scored[column]
                reference_cache.save_logps(file, kept)
            self.accelerator.wait_for_everyone()
        return concatenate_datasets([dataset, reference_cache.load_logps(file)], axis=1)
