"""Settings that are each good and together not: refused before anything is loaded.

Most of these TRL or transformers would refuse too, but only once the model is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import get_scheduler
from trl import DPOConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from scripts.values import F_DIVERGENCE_LOSSES

WANDB_FORBIDS = re.compile(r"[/\\#?%:\x00-\x1f]")  # in the name of a project


def contradictions(
    given: dict, recipe: object, script: ScriptArguments, model: ModelConfig, dpo: DPOConfig
) -> Iterator[str]:
    """One line for each thing that cannot be; `recipe` are the `RecipeArguments`, `given` what the
    config itself says."""
    yield from _data(recipe, script)
    yield from _model(model)
    yield from _loss(dpo, model)
    yield from _running(given, dpo)
    if len(recipe.wandb_project) > 128 or WANDB_FORBIDS.search(recipe.wandb_project):
        yield "`wandb_project` is at most 128 characters long, without / \\ # ? % and :"


def _data(recipe: object, script: ScriptArguments) -> Iterator[str]:
    if script.dataset_streaming:
        yield (
            "`dataset_streaming: true`: this recipe checks all of the data before it trains, so it "
            "reads all of it; leave the key out, and for a part of the data set train_samples"
        )
    if script.dataset_train_split == script.dataset_test_split:
        yield (
            f"dataset_train_split and dataset_test_split are both {script.dataset_train_split!r}: "
            "held-out pairs must not be trained on"
        )
    if any(not old or not new for old, new in (recipe.dataset_columns or {}).items()):
        yield "`dataset_columns` renames {the source's name: the format's}, and one name is empty"


def _model(model: ModelConfig) -> Iterator[str]:
    if not model.use_peft and (model.load_in_4bit or model.load_in_8bit):
        yield (
            "`use_peft: false` trains all of the weights, and weights of 4 or 8 bits cannot be "
            "trained; set load_in_4bit (and load_in_8bit) to false, or use_peft to true"
        )
    if model.dtype in ("auto", None) and model.load_in_4bit:
        yield f"`dtype: {model.dtype}` names no type to compute 4-bit weights in; set bfloat16"
    else:
        try:
            get_quantization_config(model)
        except (ValueError, AttributeError, TypeError) as error:
            yield f"the 4-bit settings: {error}"
    try:
        get_peft_config(model)
    except (ValueError, TypeError) as error:
        yield f"the LoRA settings: {error}"
    targets = model.lora_target_modules or []
    if model.use_peft and "lm_head" in ([targets] if isinstance(targets, str) else targets):
        yield "`lora_target_modules` names lm_head, which TRL's DPO does not train; leave it out"
    if model.lora_target_parameters and model.lora_dropout:
        yield "`lora_target_parameters` needs lora_dropout: 0.0 (PEFT has no dropout there)"


def _loss(dpo: DPOConfig, model: ModelConfig) -> Iterator[str]:
    losses = set(dpo.loss_type)
    if dpo.loss_weights is not None and not any(dpo.loss_weights):
        yield "`loss_weights` are all 0, so nothing would be learnt; set one of them above 0"
    if "exo_pair" in losses and dpo.label_smoothing == 0:
        yield "`loss_type: exo_pair` needs label_smoothing above 0; its paper recommends 0.001"
    if dpo.f_divergence_type != "reverse_kl" and not losses <= set(F_DIVERGENCE_LOSSES):
        yield (
            f"`f_divergence_type: {dpo.f_divergence_type}` goes with the losses "
            f"{', '.join(F_DIVERGENCE_LOSSES)}; set reverse_kl"
        )
    if dpo.use_weighting and losses & {"aot", "aot_unpaired"}:
        yield "`use_weighting` does not go with the aot losses, which sort the pairs; set it false"
    if dpo.sync_ref_model and (model.use_peft or dpo.precompute_ref_log_probs):
        yield (
            "`sync_ref_model` needs a reference of its own, so neither use_peft nor "
            "precompute_ref_log_probs; leave it out"
        )
    if dpo.padding_free:
        yield "`padding_free` is switched off in TRL; leave it out: prefix_sharing pads nothing"
    if dpo.use_liger_kernel and find_spec("liger_kernel") is None:
        yield "`use_liger_kernel` needs a package that is not installed: pip install liger-kernel"


def _running(given: dict, dpo: DPOConfig) -> Iterator[str]:
    if dpo.push_to_hub:
        yield (
            "`push_to_hub`: a run folder holds replies and logs, which are not to be published "
            "unseen; leave it out, and afterwards: hf upload NAME <run folder>/adapter"
        )
    if given.get("gradient_checkpointing") and not dpo.gradient_checkpointing:
        yield (
            "gradient_checkpointing: true is overruled by activation_checkpointing: false; set "
            "activation_checkpointing: true"
        )
    if dpo.fp16 and given.get("use_cpu"):
        yield "`fp16` needs a GPU; on a CPU (use_cpu) set bf16: true, or neither"
    if dpo.max_steps == 0:
        yield "`max_steps` is -1 (go by num_train_epochs) or at least 1, got 0; nearest: 1"
    for key in ("logging_steps", "eval_steps", "save_steps", "warmup_steps"):
        steps = getattr(dpo, key)
        if steps and steps > 1 and steps != int(steps):
            yield f"`{key}` is a whole number, or a share of all steps below 1, got {steps}"
    if dpo.load_best_model_at_end and dpo.eval_strategy.value == "no":
        yield "`load_best_model_at_end` needs held-out pairs on the way; set eval_strategy: steps"
    checkpoint = dpo.resume_from_checkpoint
    if checkpoint and not Path(checkpoint).is_dir():
        yield f"`resume_from_checkpoint`: there is no folder {checkpoint}"
    yield from _scheduler(dpo)


def _scheduler(dpo: DPOConfig) -> Iterator[str]:
    """What transformers' scheduler says of its own settings, tried on one number."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=dpo.learning_rate or 1)
    name, more = dpo.lr_scheduler_type, dpo.lr_scheduler_kwargs
    try:
        get_scheduler(name, optimiser, 1, 10, scheduler_specific_kwargs=dict(more or {}))
    except Exception as error:  # each scheduler checks in a way of its own, or not at all
        reason = " ".join(str(error).split())[:160]
        yield f"`lr_scheduler_type: {name.value}` with lr_scheduler_kwargs {more}: {reason}"
