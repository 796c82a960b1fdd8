"""All that the simulation asks of the project's helpers, in one place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import scripts.sharing.trainer
from scripts import plan_memory
from scripts.benchmark import random_pairs
from scripts.config import Config, load_config
from scripts.plan_memory import Lengths, architecture, worst_lengths
from scripts.quiet import quiet
from scripts.training import build_trainer
from tests import conftest

__all__ = ["architecture", "config", "plan", "trainer", "worst_lengths"]

# Two micro-batches a step and two steps: the last runs beside gradients and the optimiser's state.
SHORT = {
    "max_steps": 2, "gradient_accumulation_steps": 2, "report_to": "none", "logging_steps": 1000,
    "eval_strategy": "no", "save_strategy": "no", "dataloader_pin_memory": False,
}  # fmt: skip
# Comparisons of numbers, which a tensor without data has none of: (where, name, what to take).
CHECKS: list[tuple] = [(scripts.sharing.trainer, "disagreement", lambda *scores: None)]
OUTPUT = str(Path(tempfile.gettempdir()) / "gpu-simulation-run")


def config(name: str, overrides: dict) -> Config:
    """The config's own values but for how long it runs and what it writes."""
    quiet()
    cfg = load_config(name, SHORT | {"output_dir": OUTPUT} | overrides)
    if reason := unsimulated(cfg):
        raise SystemExit(f"not simulated: {reason}")
    return cfg


def unsimulated(cfg: Config) -> str | None:
    """What of a config cannot be shown on tensors without data, and what to take instead."""
    if cfg.dpo.precompute_ref_log_probs:
        return "precompute_ref_log_probs scores the reference before training; set it to false"
    return None


def trainer(cfg: Config, model, tokenizer, lengths: tuple[int, int, int], second: Callable):
    """The project's trainer over random pairs of these lengths; `second` makes the reference of a
    run without an adapter."""
    from datasets import Dataset, DatasetDict

    one = Dataset.from_list([conftest.explicit(*conftest.PAIRS[0])])
    with patch("scripts.training.load_model", second):
        made = build_trainer(cfg, model, tokenizer, DatasetDict({"train": one, "test": one}))
    if refusal := getattr(made, "refusal", None):
        raise SystemExit(f"not simulated: {refusal}; set prefix_sharing=false")
    count = cfg.dpo.per_device_train_batch_size * 4
    made.train_dataset = random_pairs(1000, lengths, count)
    return made


def plan(cfg: Config, lengths: Lengths) -> dict[str, float]:
    """The plan's GB by phase, without the CUDA context."""
    by_phase = plan_memory.phases(cfg, plan_memory.model_sizes(cfg), lengths, True, 0)
    return {name: plan_memory.peak(by_phase[name]) for name in ("reference", "step")}
