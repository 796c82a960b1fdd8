"""Reference log-probabilities kept on disk, under a key of all that they come from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from trl import DPOConfig

COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Entries of a model's config that say where it comes from, not what it computes.
HARMLESS = {"_name_or_path", "transformers_version", "use_cache", "architectures"}
TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")


def cache_folder() -> Path:
    """The folder in which they are kept, beside the cache of `datasets`."""
    return Path(datasets.config.HF_CACHE_HOME) / "dpo_reference_logps"


def token_columns(dataset: Dataset) -> list[list[list[int]]]:
    """Prompt, chosen and rejected ids of every pair."""
    return [dataset[name][:] for name in TOKENS]


def cache_key(model: torch.nn.Module, dataset: Dataset, args: DPOConfig) -> str:
    """A digest of tokens, settings, architecture and weights: all that the numbers follow from."""
    digest = hashlib.sha256()
    settings = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16)
    digest.update(repr(settings).encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in HARMLESS}
    digest.update(
        json.dumps(config, sort_keys=True, default=str).encode()
    )  # such as the RoPE's base
    for column in token_columns(dataset):
        for ids in column:
            digest.update(np.asarray(ids, dtype=np.int32).tobytes() + b"|")
    own = ".ref." if "ref" in getattr(model, "peft_config", {}) else None
    for key, tensor in model.state_dict().items():
        if "lora_" in key and not (own and own in key):
            continue  # switched off in the reference
        digest.update(f"{key} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def save_logps(file: Path, columns: dict[str, np.ndarray]) -> None:
    """Write the columns, float32 of shape (pairs,), in one step: a kill leaves no half file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".part").open("wb") as part:
        np.savez(part, **columns)
    file.with_suffix(".part").rename(file)


def load_logps(file: Path) -> Dataset:
    """The columns of `file`, to be put beside the pairs."""
    kept = np.load(file)
    return Dataset.from_dict({column: kept[column] for column in COLUMNS})
