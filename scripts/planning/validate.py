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
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.base import ROOT, RecipeError
from scripts.config import load_config
from scripts.memory import MemoryMonitor
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.planning.lengths import worst_lengths
from scripts.planning.memory import GB, model_sizes, peak, phases, process_gb
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


def measure(values: dict) -> dict[str, float]:
    """Train two steps in this process.

    Returns:
        GB of resident memory: `runtime`, before anything is loaded, and `peak`, the most while they
        ran.
    """
    cfg = load_config(CONFIG, values)
    runtime = process_gb()
    trainer = trial_trainer(cfg, worst_lengths(cfg), 2 * PAIRS)
    free_memory()  # what building took and gave back is no part of a step
    monitor = MemoryMonitor(interval=0.02)
    monitor.phase("step")
    trainer.train()
    monitor.stop()
    return {"runtime": runtime, "peak": float(monitor.table().loc["step", "peak GB"])}


def in_a_process(values: dict) -> dict[str, float]:
    """`measure(values)` in a process of its own.

    Raises:
        PlanError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "scripts.planning.validate", json.dumps(values)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise PlanError(f"measuring failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
    models: dict[str, str], ranks: Sequence[int] = RANKS, lengths: Sequence[int] = LENGTHS
) -> pd.DataFrame:
    """Predicted and measured GB for every model (name: folder), rank and length."""
    rows = {}
    for (name, folder), rank, length in product(models.items(), ranks, lengths):
        values = settings(folder, rank, length)
        cfg = load_config(CONFIG, values)
        measured = in_a_process(values)
        runtime = measured["runtime"] * GB
        step = phases(cfg, model_sizes(cfg), worst_lengths(cfg), False, runtime)["step"]
        off = peak(step) / measured["peak"] - 1
        case = f"{name}, rank {rank}, {length} tokens"
        rows[case] = {
            "predicted GB": peak(step), "measured GB": measured["peak"], "off": off,
            "activations GB": step["activations"] / GB,
        }  # fmt: skip
        numbers = f"predicted {peak(step):.2f}, measured {measured['peak']:.2f} GB ({off:+.1%})"
        print(f"{case}: {numbers}", flush=True)
    return pd.DataFrame.from_dict(rows, orient="index")


def judge(table: pd.DataFrame) -> float:
    """How far the furthest prediction of `compare` is off, as a share.

    Raises:
        PlanError: it is more than `ALLOWED`.
    """
    case = table["off"].abs().idxmax()
    worst = abs(table.loc[case, "off"])
    if worst > ALLOWED:
        raise PlanError(f"{case}: off by {worst:.0%}, more than {ALLOWED:.0%}")
    return worst


def validate() -> None:
    """Print predictions beside measurements.

    Raises:
        PlanError: one is further off than `ALLOWED`.
    """
    small, _ = resolve_model(load_config(CONFIG).model.model_name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        wide = str(other_model(Path(folder), load_tokenizer(small)))
        table = compare({"SmolLM2-135M": small, "12 x 1024": wide})
    shown = table.round(2).assign(off=table["off"].map("{:+.0%}".format))
    print(f"\n{torch.get_num_threads()} CPU threads, {PAIRS} pairs at a time\n{shown.to_string()}")
    print(f"furthest off: {judge(table):.0%}")


if __name__ == "__main__":  # one measurement, in a process of its own
    print(json.dumps(measure(json.loads(sys.argv[1]))))
