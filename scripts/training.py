"""Put a run together from its config, train the adapter with TRL's DPOTrainer, and save it.

    python -m scripts.training --config configs/smollm2-135m-cpu.yaml

The same command goes on with a run that was stopped. Exit codes: 0, trained and saved; 75, stopped
by SIGTERM, a checkpoint is kept; 130, the same by Ctrl-C; 1 or 2, an error.

The notebook takes the same steps one by one, and then looks at what came of them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("training")

import argparse
from dataclasses import dataclass

import torch
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import DPOTrainer, get_peft_config

from scripts.adapter import save_adapter
from scripts.base import RecipeError
from scripts.checkpoints.identity import settings
from scripts.checkpoints.keeper import Keeper
from scripts.config import Config, config_from_args
from scripts.data import load_preferences
from scripts.hub import hub_login
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.run_folder import settle, start_run
from scripts.run_log import RunLog
from scripts.sharing.compiler import use_torch_head_without_compiler
from scripts.sharing.trainer import PrefixSharedDPOTrainer
from scripts.tracking import finish_wandb, start_wandb

HAS_TRAINER = "_has_trainer"  # on a model that a trainer was built over


class SharedKeeper(Keeper, PrefixSharedDPOTrainer):
    """Prefix sharing, and no finished step lost."""


@dataclass
class Run:
    """A run put together: where its model comes from, and its parts."""

    path: str  # what `from_pretrained` was given
    tokenizer: PreTrainedTokenizerBase
    pairs: DatasetDict
    trainer: DPOTrainer


def assemble(cfg: Config, pairs: DatasetDict | None = None) -> Run:
    """Model, tokenizer, pairs and trainer of `cfg`; `pairs`, if given, in place of the config's.

    Every command, the benchmark and the tests put a run together here; the notebook takes the same
    five steps one by one.

    Raises:
        RecipeError: a part cannot be had; the message says which, and what to do.
    """
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    if cfg.is_main_process:
        print(where)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    if pairs is None:
        pairs = load_preferences(cfg, tokenizer)
    trainer = build_trainer(cfg, load_model(cfg, path), tokenizer, pairs)
    return Run(path, tokenizer, pairs, trainer)


def build_trainer(
    cfg: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: DatasetDict,
) -> DPOTrainer:
    """TRL's trainer over `model` with a fresh LoRA adapter, which keeps what it has trained
    (`Keeper`); with `prefix_sharing`, each prompt runs once.

    The plain model and the adapter's config go in apart, so TRL makes no second copy of anything:
    its reference log-probabilities come from this same model with the adapter switched off.
    Without LoRA (`use_peft: false`) the reference is the model loaded a second time, here, because
    TRL's own copy would not be of `model_revision`; none if the pairs are scored beforehand.
    See https://huggingface.co/docs/trl/dpo_trainer.

    Raises:
        RecipeError: another trainer was built over `model`.
    """
    if getattr(model, HAS_TRAINER, False):
        raise RecipeError(
            "this model is a trainer's already, whose adapter and training it carries: load it "
            "again (load_model), and build the trainer from that"
        )
    second = not (cfg.model.use_peft or cfg.dpo.precompute_ref_log_probs)
    remark = use_torch_head_without_compiler(cfg.dpo.device)
    if remark and cfg.is_main_process:
        print(remark)
    kept = settings(cfg)  # before TRL completes the arguments in place
    make = SharedKeeper if cfg.recipe.prefix_sharing else Keeper
    trainer = make(
        model=model,
        ref_model=load_model(cfg, model.config.name_or_path) if second else None,
        args=cfg.dpo,
        processing_class=tokenizer,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        peft_config=get_peft_config(cfg.model),
    )
    setattr(model, HAS_TRAINER, True)
    trainer.settings = kept
    keep_adapter_in_float32(trainer.model)
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunLog(cfg.run_dir / "metrics.jsonl"))
    return trainer


def keep_adapter_in_float32(model: torch.nn.Module) -> None:
    """Hold the trained parameters of a LoRA model in float32, in place.

    Over a quantized model TRL makes them bfloat16, whose 8 bits round small updates of the
    optimiser away: at a learning rate of 1e-5 most entries of A would never change. Products still
    run in 16 bits under autocast. Call it before the optimiser is made.
    """
    if isinstance(model, PeftModel):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    if cfg.is_main_process:
        settle(cfg, resume=args.resume, overwrite=args.overwrite)
        hub_login(cfg.model.model_name_or_path, cfg.model.model_revision)
        start_run(cfg)
        print(start_wandb(cfg))
    (cfg.dpo.resume_from_checkpoint,) = broadcast_object_list([cfg.dpo.resume_from_checkpoint])
    run = assemble(cfg)
    run.trainer.train(resume_from_checkpoint=cfg.dpo.resume_from_checkpoint)
    adapter = save_adapter(run.trainer, cfg)
    if cfg.is_main_process:
        print(f"saved: {adapter}")
        finish_wandb()
