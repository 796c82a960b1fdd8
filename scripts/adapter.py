"""What training made: saved into the run folder, found there, and put back into a model.

That is the adapter, in `adapter/`; or, in a run without one (`use_peft: false`), the whole model,
in `model/`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOTrainer

from scripts.base import RecipeError, one_line, put_in_place
from scripts.checkpoints import Checkpoints, differences, explained, run_settings
from scripts.config import Config, refuse_cut_weights
from scripts.pairs.provenance import weights_state
from scripts.run_folder import read_origins

# What of an adapter's own config changes what the model computes with the same weights, or which
# weights there are.
SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules",
            "rank_pattern", "alpha_pattern", "modules_to_save")  # fmt: skip


class AdapterError(RecipeError):
    """The saved adapter or model is not of the model that it is put into."""


def trained_folder(cfg: Config) -> Path:
    """Where the run's adapter is saved, or its whole model if it trains without one."""
    return cfg.run_dir / ("adapter" if cfg.model.use_peft else "model")


def refuse_stale(trainer: DPOTrainer, cfg: Config) -> None:
    """Raise an `AdapterError` if `trainer` was built from another config than `cfg`.

    In a notebook the config's cell may have been run again, with other values, after the trainer
    was built: its results would then go into the other run's folder.
    """
    if trainer.args is cfg.dpo:
        return
    keepers = (c for c in trainer.callback_handler.callbacks if isinstance(c, Checkpoints))
    then = next((keeper.settings for keeper in keepers), {})
    found = differences({"config": then}, {"config": run_settings(cfg)})
    if Path(trainer.args.output_dir) != cfg.run_dir:
        found.append(f"the run folder was {trainer.args.output_dir} and is {cfg.run_dir}")
    if found:
        raise AdapterError(
            f"the trainer was built from another config: {'; '.join(found[:4])}. Load the model "
            "and build the trainer again, or put the config back"
        )


def save_adapter(trainer: DPOTrainer, cfg: Config) -> Path:
    """Save what training made, and the tokenizer; call it as soon as training is through.

    Returns:
        The folder: `adapter/`, or `model/` with the whole model of a run without an adapter.

    Raises:
        AdapterError: `cfg` is not the config that was trained.
    """
    refuse_stale(trainer, cfg)
    target = trained_folder(cfg)
    if cfg.is_main_process:
        part = target.with_name(f".{target.name}.part")
        with explained(cfg.run_dir, f"saving {target} (training has finished; --resume saves it)"):
            shutil.rmtree(part, ignore_errors=True)
            try:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(part)
                trainer.processing_class.save_pretrained(part)
                put_in_place(part, target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return target


def require_adapter(cfg: Config) -> Path:
    """The run's saved adapter, or whole model, as `save_adapter` wrote it.

    Raises:
        ConfigError: its weights are cut or damaged.
        AdapterError: the run has none yet, or its settings cannot be read.
    """
    target = trained_folder(cfg)
    if not target.is_dir():
        raise AdapterError(
            f"no {target.name} in {cfg.run_dir}; train first, or give the run's config.yaml"
        )
    refuse_cut_weights(target)
    settings = target / ("adapter_config.json" if target.name == "adapter" else "config.json")
    try:
        json.loads(settings.read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{settings} is damaged ({one_line(error, 80)}): copy it again, or train again"
        ) from None
    return target


def copy_config(path: Path, target: Path, base: str) -> None:
    """Copy an adapter's, model's or tokenizer's config, with `base` in place of the folder that the
    base model was loaded from."""
    values = json.loads(path.read_bytes())
    for key in ("_name_or_path", "name_or_path"):
        values.pop(key, None)
    if "base_model_name_or_path" in values:
        values["base_model_name_or_path"] = base
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_adapter(model: PeftModel | PreTrainedModel, saved: Path) -> None:
    """Put what `save_adapter` wrote to `saved` into `model`, in place.

    Raises:
        AdapterError: it was trained on another model, tensors are missing, or an adapter setting
            differs: PEFT loads one with fewer modules, or with the same weights scaled otherwise,
            without a word.
    """
    if not isinstance(model, PeftModel):
        trained = AutoModelForCausalLM.from_pretrained(saved, dtype=model.dtype)
        model.load_state_dict(trained.state_dict())
        return
    refuse_other_base(saved, model.get_base_model().config.name_or_path)
    theirs, ours = PeftConfig.from_pretrained(str(saved)), model.peft_config["default"]
    different = []
    for name in SETTINGS:
        there, here = (getattr(config, name, None) for config in (theirs, ours))
        if there != here:
            there, here = (sorted(v) if isinstance(v, set) else v for v in (there, here))
            different.append(f"{name} is {there} there and {here} here")
    if different:
        raise AdapterError(
            f"{saved} does not fit this model: {'; '.join(different)}. Give the config that it was "
            f"trained with: --config {saved.parent / 'config.yaml'}"
        )
    loaded = set_peft_model_state_dict(model, load_peft_weights(str(saved), device="cpu"))
    lacking = [n for n in loaded.missing_keys if "lora_" in n or "modules_to_save" in n]
    if wrong := lacking + loaded.unexpected_keys:
        raise AdapterError(
            f"{saved} is damaged: {len(wrong)} tensors are missing or do not belong to this model, "
            f"{wrong[0]} for one. Copy it again, or train again"
        )


def refuse_other_base(saved: Path, base: str) -> None:
    """Raise an `AdapterError` if the adapter in `saved` was trained on another model than `base`.

    Two models of one architecture take each other's adapters in silence. Of folders the content
    counts, where the run noted it; else the last name, which a copy of the hub's model keeps.
    """
    theirs = PeftConfig.from_pretrained(str(saved)).base_model_name_or_path or ""
    content = read_origins(saved.parent).get("model", {}).get("content")
    if content and Path(base).is_dir():
        same = content == weights_state(base)
    else:
        there, here = (name.rstrip("/").split("/")[-1] for name in (theirs, base))
        same = there == here or not there or not here
    if not same:
        raise AdapterError(
            f"{saved} was trained on another model ({theirs}) than {base}: with the same shapes it "
            "would load, and answer at random. Give the config that it was trained with: "
            f"--config {saved.parent / 'config.yaml'}"
        )
