"""What a run is, as far as its result depends on it: config, data and model, to be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset

from scripts.base import RecipeError
from scripts.checkpoints.store import manifest
from scripts.config import Config, is_harmless

# What these name is compared itself, by a digest: they may have moved.
DATA_KEYS = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
    "dataset_streaming", "dataset_format", "dataset_columns", "test_split_size", "train_samples",
    "datasets",
}  # fmt: skip
MODEL_KEYS = {"model_name_or_path", "model_revision"}
LENGTH_KEYS = {"max_steps", "num_train_epochs"}


def settings(cfg: Config) -> dict[str, Any]:
    """The resolved arguments that the result depends on, as JSON has them; no token is among them.

    `max_steps` and `num_train_epochs` are left out under a constant learning rate: a longer run
    then begins exactly like a shorter one, and may go on from it.
    """
    values = vars(cfg.recipe) | vars(cfg.script) | vars(cfg.model) | cfg.dpo.to_dict()
    values = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and not is_harmless(key)
    }
    if values["lr_scheduler_type"] == "constant":
        values = {key: value for key, value in values.items() if key not in LENGTH_KEYS}
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def data_digest(dataset: Dataset | IterableDataset) -> str | None:
    """Digest of every pair's tokens, in order; None for a stream, which has no end to wait for."""
    if isinstance(dataset, IterableDataset):
        return None
    digest = hashlib.sha256()
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            rows = table.column(name).combine_chunks()
            for numbers in (rows.value_lengths(), rows.flatten()):
                digest.update(np.asarray(numbers.cast(pa.int64())).tobytes())
    return digest.hexdigest()[:32]


def model_digest(model: torch.nn.Module, entries: int = 1024) -> str:
    """Digest of a model before training: each tensor's name, type, shape and up to `entries` of
    its numbers, evenly spaced; adapters aside. Another model differs in nearly all of them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" in name or not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta or tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // entries)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def differences(theirs: dict, ours: dict, *, may_have_moved: bool = False) -> list[str]:
    """The keys in which two runs differ, each with both values, and data and model if they do.

    Either may lack `data` and `model`, before these are loaded; then the keys that name them count,
    unless both `may_have_moved`.
    """
    there, here = theirs.get("config", {}), ours.get("config", {})
    unknown = object()
    found = []
    known = {part: theirs.get(part) and ours.get(part) for part in ("data", "model")}
    for key in sorted({*there, *here}):
        if key in DATA_KEYS and (known["data"] or may_have_moved):
            continue
        if key in MODEL_KEYS and (known["model"] or may_have_moved):
            continue
        one, two = there.get(key, unknown), here.get(key, unknown)
        if one != two and (one is unknown or two is unknown):
            found.append(f"`{key}` is in one of them only")
        elif one != two:
            found.append(f"`{key}` was {one!r} and is {two!r}")
    for part, keys in (("data", DATA_KEYS), ("model", MODEL_KEYS)):
        if known[part] and theirs[part] != ours[part]:
            named = [key for key in sorted(keys) if there.get(key) != here.get(key)]
            why = ", ".join(f"`{k}` was {there.get(k)!r} and is {here.get(k)!r}" for k in named)
            what = "the training pairs" if part == "data" else "the model's weights"
            found.append(f"{what} are others" + (f" ({why})" if why else ""))
    return found


def refuse_another(checkpoint: Path, ours: dict, *, may_have_moved: bool = False) -> None:
    """Go on only from a checkpoint of the same run; `may_have_moved` as in `differences`.

    Raises:
        RecipeError: config, data or model differ; the message names the keys.
    """
    if found := differences(manifest(checkpoint)["run"], ours, may_have_moved=may_have_moved):
        more = f", and {len(found) - 6} more" * (len(found) > 6)
        raise RecipeError(
            f"{checkpoint} is another run's: {'; '.join(found[:6])}{more}. Give the settings that "
            f"it was made with (they stand in config.yaml beside it), another --output-dir, or "
            "--overwrite to begin anew (what is there is set aside)"
        )
