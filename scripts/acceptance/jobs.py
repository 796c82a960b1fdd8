"""The parts' work that needs the libraries, each in a process of its own: prints JSON last.

All that the acceptance run asks of the project's helpers, but for its commands, is here.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download

from scripts.config import load_config
from scripts.login import hub_state
from scripts.memory import MemoryMonitor
from scripts.planning.hardware import needs
from scripts.planning.lengths import worst_lengths
from scripts.planning.memory import GB, architecture
from scripts.planning.trial import trial_trainer
from scripts.run_folder import describe_machine

STEPS = {"max_steps": 2, "gradient_accumulation_steps": 2, "report_to": "none",
         "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}  # fmt: skip
TINY = {
    "vocab_size": 128_256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def facts() -> dict:
    """The machine, as a run's own `environment.json` tells it."""
    machine = describe_machine()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["GPU memory"] = f"{properties.total_memory / GB:.1f} GB"
    return machine | {"cuda": torch.cuda.is_available(), "CUDA build": torch.version.cuda or "no"}


def prepare(config: str, given: dict, folder: str, cuda: bool) -> dict:
    """Which model and data the parts take, as overrides of the config, and a word about each.

    On a GPU the config's own, where the hub gives them to this token; else the same architecture
    with random weights, and the project's pairs. On a CPU a tiny Llama with Llama 3's vocabulary.
    """
    cfg = load_config(config, given, may_lack_gpu=True)
    overrides, notes = {}, []
    name, revision = cfg.model.model_name_or_path, cfg.model.model_revision
    if not cuda:
        notes.append("a tiny random Llama")
        overrides["model_name_or_path"] = random_model(TINY, Path(folder), "cpu")
    elif hub_state(name, revision) in ("local", "open", "granted", "cached"):
        notes.append(name)
        if not Path(name).is_dir():  # now, since every part after this one counts its own time
            snapshot_download(name, revision=revision, ignore_patterns=["original/*"])
    else:
        notes.append(f"{name}'s architecture with random weights (no access)")
        shape = architecture(cfg).to_dict()
        shape = {key: shape[key] for key in TINY}
        overrides["model_name_or_path"] = random_model(shape, Path(folder), "cuda")
    data = cfg.script.dataset_name
    if cuda and not data.startswith("data/") and not reachable(data):
        notes.append("the project's own pairs")
        overrides |= {"dataset_name": "data/concise", "dataset_format": "auto"}
    return {"overrides": overrides, "note": ", ".join(notes)}


def reachable(dataset: str) -> bool:
    """Whether the hub answers about a dataset."""
    try:
        return HfApi().dataset_info(dataset, timeout=10) is not None
    except Exception:  # no network, no such dataset: either way it cannot be taken
        return False


def random_model(shape: dict, folder: Path, device: str) -> str:
    """Write a Llama of this shape with random weights and a tokenizer of Llama 3's format."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.conftest import BOT, EOT, llama3_tokenizer

    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        config = LlamaConfig(**shape, bos_token_id=BOT, eos_token_id=EOT, dtype=torch.bfloat16)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        llama3_tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)


def plan_against_measured(config: str, overrides: dict) -> dict:
    """Two steps of two micro-batches of the plan's worst lengths, in GB beside the plan's step.

    On a GPU: what torch allocated and the optimiser's paged memory, which torch does not count;
    the plan without the CUDA context. On a CPU: the whole process.
    """
    cfg = load_config(config, STEPS | overrides)
    parts = needs(cfg)["step"]
    monitor = MemoryMonitor(interval=0.02)
    monitor.phase("load")
    count = 4 * cfg.dpo.per_device_train_batch_size
    trainer = trial_trainer(cfg, worst_lengths(cfg), count)
    monitor.phase("step")
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    monitor.stop()
    cuda = trainer.accelerator.device.type == "cuda"
    states = trainer.optimizer.state.values()
    tensors = [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]
    paged = sum(t.nbytes for t in tensors if getattr(t, "is_paged", False)) / GB
    planned = sum(parts.values()) - (parts["runtime"] if cuda else 0)
    measured = float(monitor.table().loc["step", "peak GB"])
    return {
        "planned": planned / GB, "measured": measured + paged, "paged": paged, "seconds": seconds,
        "lengths": worst_lengths(cfg), "loss": trainer.state.log_history[0]["loss"],
    }  # fmt: skip


if __name__ == "__main__":
    name, *arguments = json.loads(sys.argv[1])
    print(json.dumps(globals()[name](*arguments)))
