"""The trained adapter: saved into the run folder, found there, and put back into a model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from trl import DPOTrainer

from scripts.cli import RecipeError
from scripts.config import Config


def save_adapter(trainer: DPOTrainer, cfg: Config) -> Path:
    """Save adapter and tokenizer into the run's `adapter/`: all that training made."""
    target = cfg.run_dir / "adapter"
    if cfg.is_main_process:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(target)
        trainer.processing_class.save_pretrained(target)
    trainer.accelerator.wait_for_everyone()
    return target


def require_adapter(cfg: Config) -> Path:
    """The run's saved adapter.

    Raises:
        RecipeError: the run has none yet.
    """
    adapter = cfg.run_dir / "adapter"
    if not adapter.is_dir():
        raise RecipeError(
            f"no adapter in {cfg.run_dir}; train first, or give the run's config.yaml"
        )
    return adapter


def load_adapter(model: PeftModel, adapter: Path) -> None:
    """Put saved adapter weights into `model`'s own adapter, in place."""
    outcome = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    if outcome.unexpected_keys:
        raise RecipeError(f"{adapter} does not fit this model: {outcome.unexpected_keys[:3]}")
