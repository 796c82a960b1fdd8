"""Train the adapter with TRL's DPOTrainer, and show how it goes.

    python -m scripts.training --config configs/smollm2-135m-cpu.yaml

trains and saves the adapter; the notebook does the same step by step and then looks at it.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.notebook import NotebookProgressCallback
from trl import DPOTrainer, get_peft_config

from scripts.config import ROOT, Config, argument_parser, command, config_from_args
from scripts.prefix_sharing import PrefixSharedDPOTrainer

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def build_trainer(
    cfg: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: DatasetDict,
) -> DPOTrainer:
    """TRL's trainer over `model` with a fresh LoRA adapter; with `prefix_sharing`, our subclass.

    The plain model and the adapter's config go in apart, so TRL makes no second copy of anything:
    its reference log-probabilities come from this same model with the adapter switched off.
    See https://huggingface.co/docs/trl/dpo_trainer.
    """
    shared = {"prefix_attention": cfg.recipe.prefix_attention}
    make = partial(PrefixSharedDPOTrainer, **shared) if cfg.recipe.prefix_sharing else DPOTrainer
    trainer = make(
        model=model,
        args=cfg.dpo,
        processing_class=tokenizer,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        peft_config=get_peft_config(cfg.model),
    )
    for callback in (PrinterCallback, ProgressCallback, NotebookProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunLog(cfg.run_dir / "metrics.jsonl"))
    return trainer


class RunLog(TrainerCallback):
    """Write every log to `metrics.jsonl`, print it as one line, and redraw the live figure."""

    def __init__(self, path: Path, redraws: int = 12) -> None:
        self.path = path
        self.redraws = redraws
        self._figure = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if state.global_step == 0:  # a resumed run goes on with the file it has
                self.path.write_text("")
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" not in logs:
            return
        steps = state.global_step - self._first
        pace = (time.monotonic() - self._began) / max(steps, 1)
        left = pace * (state.max_steps - state.global_step) / 60
        print(
            f"step {state.global_step:>4}/{state.max_steps}"
            f"  loss {logs['loss']:.3f}"
            f"  margin {logs['rewards/margins']:+.3f}"
            f"  accuracy {logs['rewards/accuracies']:.2f}"
            f"  {pace:.1f} s/step  {left:.1f} min left",
            flush=True,
        )
        every = max(1, state.max_steps // self.redraws)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._redraw(history(state.log_history))

    def _redraw(self, frame: pd.DataFrame) -> None:
        """Show or refresh the curves under the running cell; outside a notebook, do nothing."""
        if "ipykernel" not in sys.modules or len(frame) < 2:
            return
        from IPython.display import display
        from matplotlib import pyplot as plt

        from scripts.plots import training_curves

        figure = training_curves(frame)
        if self._figure is None:
            self._figure = display(figure, display_id=True)
        else:
            self._figure.update(figure)
        plt.close(figure)


def history(log: list[dict] | Path) -> pd.DataFrame:
    """The training steps of a run, from `trainer.state.log_history` or a `metrics.jsonl`.

    Rewards, margins and the loss are in nats; accuracies are shares of pairs.
    """
    if isinstance(log, Path):
        log = [json.loads(line) for line in log.open()]
    rows = [row for row in log if "loss" in row]
    return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame()


def describe_machine() -> dict[str, str]:
    """Library versions, device and commit: what a reader needs to make sense of the numbers."""
    facts = {name: version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts["device"] = f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    facts["commit"] = commit.stdout.strip() or "not a git checkout"
    return facts


def start_run(cfg: Config) -> dict[str, str]:
    """Make the run folder with the resolved config and the machine's description in it."""
    cfg.save(cfg.run_dir / "config.yaml")
    facts = describe_machine()
    (cfg.run_dir / "environment.json").write_text(json.dumps(facts, indent=2))
    return facts


def main() -> None:
    from scripts.data import load_preferences
    from scripts.export import save_adapter
    from scripts.hub import hub_login
    from scripts.models import load_model, load_tokenizer, resolve_model
    from scripts.tracking import finish_wandb, start_wandb

    cfg = config_from_args(argument_parser(__doc__).parse_args())
    hub_login(cfg.model.model_name_or_path, cfg.model.model_revision)
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    pairs = load_preferences(cfg, tokenizer)
    start_run(cfg)
    print(start_wandb(cfg))
    trainer = build_trainer(cfg, load_model(cfg, path), tokenizer, pairs)
    trainer.train(resume_from_checkpoint=cfg.dpo.resume_from_checkpoint)
    print(f"adapter: {save_adapter(trainer, cfg)}")
    finish_wandb()


if __name__ == "__main__":
    command(main)
