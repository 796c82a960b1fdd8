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
from scripts.checkpoints import Checkpoints, resumable
from scripts.config import Config, config_from_args, refuse_changed
from scripts.data import load_preferences
from scripts.hub import hub_login
from scripts.model import find_model, load_model, load_tokenizer
from scripts.run_folder import settle, start_run
from scripts.run_log import RunLog
from scripts.sharing.compiler import use_torch_head_without_compiler
from scripts.sharing.trainer import PrefixSharedDPOTrainer
from scripts.tracking import finish_wandb, start_wandb

HAS_TRAINER = "_has_trainer"  # on a model that a trainer was built over


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
    path, commit, where = find_model(cfg)
    if cfg.is_main_process:
        print(where)
    tokenizer = load_tokenizer(path, commit)
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
    """TRL's trainer over `model` with a fresh LoRA adapter, as the notebook writes it out; with
    `prefix_sharing`, each prompt runs once. See https://huggingface.co/docs/trl/dpo_trainer.

    The plain model and the adapter's config go in apart, so TRL makes no second copy of anything:
    its reference log-probabilities come from this same model with the adapter switched off.

    Raises:
        RecipeError: another trainer was built over `model`.
    """
    refuse_second_trainer(model)
    Trainer = PrefixSharedDPOTrainer if cfg.recipe.prefix_sharing else DPOTrainer
    trainer = Trainer(
        model=model,
        ref_model=reference_model(cfg, model.config.name_or_path),
        args=cfg.dpo,
        processing_class=tokenizer,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        peft_config=get_peft_config(cfg.model),
        callbacks=[Checkpoints(cfg), RunLog(cfg.run_dir / "metrics.jsonl")],
    )
    prepare_trainer(trainer)
    return trainer


def reference_model(cfg: Config, path: str) -> PreTrainedModel | None:
    """The reference where it is a model of its own: without LoRA, and not scored beforehand.

    TRL's own copy would be of the hub's newest commit, whatever `model_revision` says.
    """
    apart = not (cfg.model.use_peft or cfg.dpo.precompute_ref_log_probs)
    return load_model(cfg, path) if apart else None


def refuse_stale_cells(
    cfg: Config, model: PreTrainedModel, config: str, overrides: dict, output_dir: str | None
) -> None:
    """In a notebook: refuse a trainer where a cell above was changed and not run again.

    Raises:
        RecipeError: the first cell asks for another run than `cfg`, or `model` has a trainer.
    """
    refuse_changed(cfg, config, overrides, output_dir)
    refuse_second_trainer(model)


def refuse_second_trainer(model: PreTrainedModel) -> None:
    """Raise a `RecipeError` if a trainer was built over `model`: it carries an adapter by now."""
    if getattr(model, HAS_TRAINER, False):
        raise RecipeError(
            "this model already belongs to a trainer, whose adapter it carries: load it again "
            "(section 5), then build the trainer"
        )


def prepare_trainer(trainer: DPOTrainer) -> None:
    """What is done to every trainer before it trains: the adapter in float32, `RunLog`'s lines in
    place of transformers' bar, no model card of TRL's beside the run (`export push` makes one), and
    on a GPU without a C compiler TRL's head in plain torch."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    setattr(model.get_base_model() if isinstance(model, PeftModel) else model, HAS_TRAINER, True)
    keep_adapter_in_float32(model)
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.create_model_card = lambda *args, **kwargs: None
    remark = use_torch_head_without_compiler(trainer.args.device)
    if remark and trainer.is_world_process_zero():
        print(remark)


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
    with resumable(run.trainer) as checkpoint:
        run.trainer.train(resume_from_checkpoint=checkpoint)
    adapter = save_adapter(run.trainer, cfg)
    if cfg.is_main_process:
        print(f"saved: {adapter}")
        finish_wandb()
