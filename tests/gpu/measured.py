"""Measurements that need the libraries, each in a process of its own: prints JSON last."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from scripts.base import ROOT, RecipeError
from scripts.benchmark import trial_trainer
from scripts.config import load_config
from scripts.memory import MemoryMonitor
from scripts.model import free_memory
from scripts.plan_memory import GB, PAGED, model_sizes, phases, process_gb, worst_lengths

# Two steps of two micro-batches: the second step runs beside the optimiser's state.
STEP = {"max_steps": 2, "gradient_accumulation_steps": 2, "report_to": "none",
        "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}  # fmt: skip


def plan_against_measured(config: str, values: dict) -> dict:
    """Two steps on pairs of the plan's worst lengths, in GB beside the plan's step.

    On a GPU: what torch allocated, and the optimiser's paged memory, which torch does not count;
    the plan without the CUDA context. On a CPU: the whole process.
    """
    cfg = load_config(config, values)
    runtime, lengths = process_gb() * GB, worst_lengths(cfg)
    trainer = trial_trainer(cfg, lengths, 4 * cfg.dpo.per_device_train_batch_size)
    cuda = trainer.accelerator.device.type == "cuda"
    free_memory()  # what building took and gave back is no part of a step
    monitor = MemoryMonitor(interval=0.02)
    monitor.phase("step")
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    monitor.stop()
    step = phases(cfg, model_sizes(cfg), lengths, cuda, 0 if cuda else runtime)["step"]
    states = [t for state in trainer.optimizer.state.values() for t in state.values()]
    paged = sum(t.nbytes for t in states if getattr(t, "is_paged", False)) / GB
    return {
        "planned": sum(step.values()) / GB, "planned paged": step[PAGED] / GB,
        "measured": float(monitor.table().loc["step", "peak GB"]) + paged, "paged": paged,
        "lengths": str(lengths), "seconds": seconds, "loss": trainer.state.log_history[0]["loss"],
    }  # fmt: skip


def in_a_process(name: str, *arguments) -> dict:
    """A function of this file, in a process of its own.

    Raises:
        RecipeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.measured", json.dumps([name, *arguments])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RecipeError(f"measuring failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    name, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[name](*arguments)))
