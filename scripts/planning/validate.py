"""Predicted against measured peaks of a training step, on this CPU.

    python -m scripts.plan validate

Two models, two ranks, two lengths; each measured in a process of its own that trains two real steps
on pairs of the worst lengths. Exit code 1 if a prediction is off by more than a tenth.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.cli import ROOT, RecipeError
from scripts.config import load_config
from scripts.model import load_tokenizer, resolve_model
from scripts.monitoring.memory import MemoryMonitor
from scripts.planning.lengths import worst_lengths
from scripts.planning.memory import peak, phases, process_gb, shape
from scripts.planning.trial import trial_trainer

CONFIG = "configs/smollm2-135m-cpu.yaml"
RANKS, LENGTHS, PAIRS = (8, 64), (256, 640), 2
ALLOWED = 0.1


class PlanError(RecipeError):
    """A prediction is further off than it may be."""


def other_model(folder: Path, tokenizer) -> Path:
    """A wider, shallower Llama with random weights: memory does not ask what they are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: str, rank: int, length: int) -> dict:
    """The overrides of one configuration."""
    return {
        "model_name_or_path": model, "lora_r": rank, "max_length": length, "max_steps": 2,
        "per_device_train_batch_size": PAIRS, "report_to": "none", "logging_steps": 100,
        "output_dir": tempfile.gettempdir(),
    }  # fmt: skip


def measure(values: dict) -> float:
    """Train two steps in this process; the most resident memory while they ran, in GB."""
    cfg = load_config(CONFIG, values)
    trainer = trial_trainer(cfg, worst_lengths(cfg), 2 * PAIRS)
    monitor = MemoryMonitor(interval=0.02)
    monitor.phase("step")
    trainer.train()
    monitor.stop()
    return float(monitor.table().loc["step", "peak GB"])


def compare() -> pd.DataFrame:
    """Both numbers for every configuration, in GB, and how far the prediction is off."""
    rows = {}
    small, _ = resolve_model(load_config(CONFIG).model.model_name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        wide = str(other_model(Path(folder), load_tokenizer(small)))
        models = {"SmolLM2-135M": small, "12 x 1024": wide}
        runtime = process_gb() * 1024**3
        for (name, model), rank, length in product(models.items(), RANKS, LENGTHS):
            values = settings(model, rank, length)
            cfg = load_config(CONFIG, values)
            step = phases(cfg, shape(cfg), worst_lengths(cfg), False, runtime)["step"]
            done = subprocess.run(
                [sys.executable, "-m", "scripts.planning.validate", json.dumps(values)],
                cwd=ROOT, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise PlanError(f"measuring failed: {done.stderr.strip().splitlines()[-1]}")
            measured = float(done.stdout.strip().splitlines()[-1])
            off = peak(step) / measured - 1
            rows[f"{name}, rank {rank}, {length} tokens"] = {
                "predicted GB": round(peak(step), 2), "measured GB": measured, "off": f"{off:+.0%}",
                "activations GB": round(step["activations"] / 1024**3, 2),
            }  # fmt: skip
            print(f"{name}, rank {rank}, {length} tokens: predicted {peak(step):.2f}, "
                  f"measured {measured:.2f} GB ({off:+.1%})", flush=True)  # fmt: skip
    return pd.DataFrame(rows).T


def validate() -> None:
    """Print predictions beside measurements.

    Raises:
        PlanError: one is further off than `ALLOWED`.
    """
    table = compare()
    print(f"\n{torch.get_num_threads()} CPU threads, {PAIRS} pairs at a time\n{table.to_string()}")
    ratio = table["predicted GB"].astype(float) / table["measured GB"].astype(float)
    worst = (ratio - 1).abs().max()
    print(f"furthest off: {worst:.0%}")
    if worst > ALLOWED:
        raise PlanError(f"a prediction is off by {worst:.0%}, more than {ALLOWED:.0%}")


if __name__ == "__main__":  # one measurement, in a process of its own
    print(measure(json.loads(sys.argv[1])))
