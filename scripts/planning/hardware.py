"""On which GPU a run fits, for how long and at what price; what it needs here."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pandas as pd
import yaml
from transformers import PretrainedConfig

from scripts.cli import ROOT
from scripts.config import Config
from scripts.planning.flops import step_flops
from scripts.planning.lengths import worst_lengths
from scripts.planning.memory import GB, Shape, peak, phases, process_gb, shape

GPUS = ROOT / "configs" / "hardware" / "gpus.yaml"


@lru_cache(maxsize=1)
def gpus() -> dict:
    """The editable table of GPUs, their prices and speeds."""
    return yaml.safe_load(GPUS.read_text())


def on_gpu(cfg: Config) -> bool:
    """Whether the config means a GPU, be there one here or not."""
    return not cfg.given.get("use_cpu", False)


def needs(cfg: Config, s: Shape | None = None) -> dict[str, dict[str, float]]:
    """`phases` for the worst lengths, on what the config means: a GPU, or this process.

    Call it before a model is loaded: on a CPU what the process holds by then counts as runtime.
    """
    runtime = gpus()["context_gb"] if on_gpu(cfg) else process_gb()
    return phases(cfg, s or shape(cfg), worst_lengths(cfg), on_gpu(cfg), runtime * GB)


def memory_table(cfg: Config, s: Shape | None = None) -> pd.DataFrame:
    """GB by part and phase, with the sum of each phase as the last row, `peak`."""
    by_phase = needs(cfg, s)
    frame = pd.DataFrame(by_phase).div(GB).reindex(columns=list(by_phase))
    order = list(dict.fromkeys(part for parts in by_phase.values() for part in parts))
    return pd.concat([frame.reindex(order), frame.sum().to_frame("peak").T])


def fit(cfg: Config, s: Shape, gpu: dict) -> tuple[bool, str]:
    """Whether the run fits on `gpu`, and if not the first change that would make it fit."""
    runtime, room = gpus()["context_gb"] * GB, gpu["memory_gb"]

    def top(c: Config) -> dict[str, float]:
        return {k: peak(v) for k, v in phases(c, s, worst_lengths(c), True, runtime).items()}

    if not gpu["bf16"] and cfg.dpo.bf16:
        return False, "no bfloat16: bf16: false, fp16: true, dtype: float16"
    needed = top(cfg)
    if max(needed.values()) <= room:
        return True, ""
    if max(v for k, v in needed.items() if k != "merge") <= room:
        return True, "merge in main memory: scripts.export --set use_cpu=true"
    changes, trial = {}, cfg
    steps = [("activation_checkpointing", True), ("per_device_train_batch_size", 1)]
    steps += [("max_length", n) for n in (1024, 768, 512, 256) if n < (cfg.dpo.max_length or 9999)]
    for name, value in steps:
        if getattr(cfg.dpo, name) == value:
            continue  # the config has it already
        # A copy, since building the arguments anew resets accelerate's state.
        trial = replace(trial, dpo=copy(trial.dpo))
        setattr(trial.dpo, name, value)
        changes[name] = str(value).lower()
        if max(v for k, v in top(trial).items() if k != "merge") <= room:
            return False, ", ".join(f"{k}: {v}" for k, v in changes.items())
    return False, "not by these means"


def time_table(
    cfg: Config, s: Shape, config: PretrainedConfig, pairs: int, lengths: tuple[int, int, int]
) -> pd.DataFrame:
    """Fit, time and cost on each GPU of the table, for `pairs` pairs of these lengths in all."""
    flops = step_flops(config, np.array([lengths]), s.lora) * pairs
    if cfg.dpo.activation_checkpointing or cfg.dpo.gradient_checkpointing:
        flops *= 4 / 3  # the policy's forward once more
    rows = {}
    for name, gpu in gpus()["gpus"].items():
        fits, change = fit(cfg, s, gpu)
        price = gpu["dollars_per_hour"]
        hours = flops / (gpu["tflops"] * 1e12 * gpus()["utilisation"]) / 3600
        rows[name] = {
            "memory GB": gpu["memory_gb"], "fits": "yes" if fits else "no",
            "hours": round(hours, 2), "cost $": round(hours * price, 2) if price else "",
            "change": change,
        }  # fmt: skip
    return pd.DataFrame(rows).T
