"""Work of the GPU check that needs the libraries, each piece in a process of its own: prints JSON
last. On a GPU and on a CPU alike, so that the plan's tests use it too."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from scripts.base import ROOT, RecipeError
from scripts.benchmark import trial_trainer
from scripts.config import load_config
from scripts.memory import MemoryMonitor
from scripts.model import free_memory
from scripts.plan_memory import GB, architecture, model_sizes, phases, process_gb, worst_lengths

# Two steps of two micro-batches: the second step runs beside the optimiser's state.
STEP = {"max_steps": 2, "gradient_accumulation_steps": 2, "report_to": "none",
        "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def machine() -> dict:
    """What this is measured on."""
    if not torch.cuda.is_available():
        return {"cuda": False, "device": f"CPU, {torch.get_num_threads()} threads",
                "torch": torch.__version__}  # fmt: skip
    found = torch.cuda.get_device_properties(0)
    return {"cuda": True, "device": found.name, "GPU memory": f"{found.total_memory / GB:.1f} GB",
            "torch": torch.__version__}  # fmt: skip


def random_model(config: str, folder: str, cuda: bool) -> dict:
    """Write a Llama with random weights and a tokenizer of Llama 3's format: on a GPU with the
    shapes of the config's model (16 GB for an 8B), else a tiny one."""
    from tests.conftest import LLAMA3_WORDS as words
    from tests.conftest import llama3_tokenizer

    if not (Path(folder) / "config.json").is_file():
        shape = architecture(load_config(config, may_lack_gpu=True)).to_dict()
        shape = {key: shape[key] for key in TINY} if cuda else TINY
        torch.manual_seed(0)
        llama = LlamaConfig(**shape, vocab_size=128_256, bos_token_id=words, eos_token_id=words + 9)
        with torch.device("cuda" if cuda else "cpu"):
            model = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16)
        llama3_tokenizer(words).save_pretrained(folder)
        model.save_pretrained(folder)
    return {"model": folder}


def plan_against_measured(config: str, values: dict) -> dict:
    """Two steps on pairs of the plan's worst lengths, in GB beside the plan's step.

    On a GPU: what torch allocated, and the optimiser's paged memory, which torch does not count;
    the plan without the CUDA context. On a CPU: the whole process.
    """
    cfg = load_config(config, STEP | values)
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
    first = trainer.state.log_history[0]
    paged = sum(t.nbytes for t in states if getattr(t, "is_paged", False)) / GB
    return {
        "planned": sum(step.values()) / GB,
        "measured": float(monitor.table().loc["step", "peak GB"]) + paged,
        "lengths": str(lengths), "seconds": seconds,
        "loss": first.get("loss/dpo", first["loss"]),  # without the SFT term
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
