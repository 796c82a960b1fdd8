"""Whether the folders and files that a config names can serve, looked at before anything is loaded.

A model's folder is read as far as its headers: what is cut, empty or missing there would else show
after minutes, in a library's own words.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from scripts.base import ROOT, InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
DATA = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz")
CONVERT = (
    "this recipe reads safetensors only, since a pickle runs code as it is loaded; convert it: "
    "https://huggingface.co/docs/safetensors/convert-weights"
)


class PlaceError(InputError):
    """A folder or file cannot serve for what a config names it for."""


def refuse_pickles(name: str, files: list[str]) -> None:
    """Refuse a model whose weights are pickles.

    Raises:
        PlaceError: none of `files` is a `.safetensors`; it names what there is.
    """
    if any(file.endswith(".safetensors") for file in files):
        return
    pickles = [file for file in files if file.endswith(PICKLES) and file != "training_args.bin"]
    if pickles:
        raise PlaceError(f"{name} has its weights in {pickles[0]}: {CONVERT}")
    raise PlaceError(f"{name} has no weights: no .safetensors file among its {len(files)} files")


def check_model(name: str) -> None:
    """Refuse what is no model: a folder that is missing or damaged, an address, an empty name.

    A name of the hub is only looked at, not asked for.

    Raises:
        PlaceError: what is wrong with which file.
    """
    if "://" in name:
        raise PlaceError(
            "model_name_or_path is an address; give the hub's name alone, owner/model, or a folder"
        )
    folder = Path(name).expanduser()
    if folder.is_file():
        raise PlaceError(f"model_name_or_path: {name} is a file; give the folder that it is in")
    if not folder.is_dir():
        if name.startswith(("/", ".", "~")):
            raise PlaceError(f"there is no folder {name}; check model_name_or_path")
        if name.count("/") > 1 or not name.replace("/", "").replace("-", "").replace(
            ".", "").replace("_", "").isalnum():  # fmt: skip
            raise PlaceError(
                f"model_name_or_path: {name!r} is no folder here, nor a name that the hub could "
                "have (owner/model)"
            )
        return
    values = read_object(folder / "config.json")
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise PlaceError(f"{folder / 'config.json'}: transformers knows no model_type {kind!r}")
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    refuse_pickles(name, files)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = read_object(index).get("weight_map")
        if not isinstance(parts, dict):
            raise PlaceError(f"{index} has no weight_map; copy the model again")
        missing = sorted(set(map(str, parts.values())) - set(files))
        if missing:
            raise PlaceError(f"{name} lacks {missing[0]}, which {index.name} names; copy it again")
    for file in files:
        if file.endswith(".safetensors"):
            _read_header(folder / file)
    if not set(TOKENIZERS) & set(files):
        raise PlaceError(f"{name} has no tokenizer (none of {', '.join(TOKENIZERS)})")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if file in files:
            read_object(folder / file)


def read_object(path: Path) -> dict:
    """The JSON object in `path`.

    Raises:
        PlaceError: there is no such file, or something else is in it.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PlaceError(f"{path.parent} has no {path.name}: it is no model's folder") from None
    except OSError as error:
        raise PlaceError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PlaceError(f"{path} is not valid JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise PlaceError(f"{path} holds no JSON object; copy it again")
    return values


def _read_header(path: Path) -> None:
    """Refuse a file whose header is damaged, or whose size is not what the header says."""
    try:
        with safe_open(path, framework="numpy") as tensors:
            names = tensors.keys()
    except (SafetensorError, OSError) as error:
        what = "is empty" if path.stat().st_size == 0 else f"is cut or damaged ({error})"
        raise PlaceError(f"{path} {what}; copy or download it again") from None
    if not names:
        raise PlaceError(f"{path} holds no tensor; copy or download it again")


def check_run_folder(folder: Path, *others: str) -> None:
    """Refuse a run folder that cannot be written to, or that holds what is not the run's.

    It is tried by a folder that is made there and removed. `others` are the model and the dataset.

    Raises:
        PlaceError: why not.
    """
    try:
        whole = folder.absolute().resolve()
        if whole == ROOT or whole in ROOT.parents or whole == Path.home():
            raise PlaceError(f"output_dir: {folder} holds more than a run; name another")
        for other in others:
            for place in (Path(other).expanduser(), ROOT / other):
                read = place.resolve()
                if place.exists() and whole in (read, ROOT / "data"):
                    raise PlaceError(f"output_dir: {folder} is also read from; name another folder")
        there = next(p for p in (whole, *whole.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise PlaceError(f"output_dir: {there} is a file, so {folder} cannot be a folder")
        if max(len(os.fsencode(part)) for part in whole.parts) > 255:
            raise PlaceError(f"output_dir: a name of more than 255 bytes in {str(folder)[:60]}...")
        with tempfile.TemporaryDirectory(prefix=".try-", dir=there):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlaceError(f"output_dir: {folder} cannot be written to ({reason})") from None


def local_path(name: str) -> Path | None:
    """The file or folder that `name` is on this machine: from the home folder (`~`), the current
    one, or the project's; None if there is none."""
    path = Path(os.path.expanduser(name))  # Path's own raises for the home of an unknown user
    return next((p for p in (path, ROOT / path) if p.exists()), None)


def check_dataset(name: str) -> None:
    """Refuse a file or folder of data that is not there or has nothing in it.

    Raises:
        PlaceError: why not.
    """
    if name.lower().startswith(("http://", "https://")):  # fetched when it is read
        return
    if "://" in name:
        raise PlaceError("dataset_name: only http(s) addresses, files, folders and the hub's names")
    path = local_path(name)
    if path is None:
        if name.startswith(("/", ".", "~")) or _is_data(name) or name.count("/") > 1:
            raise PlaceError(f"dataset_name: there is no file or folder {name}")
        return
    if path.is_file():
        if not _is_data(path.name):
            raise PlaceError(
                f"dataset_name: {name} is none of {', '.join(DATA)} (save a spreadsheet's table "
                "as CSV, unpack an archive)"
            )
        if path.stat().st_size == 0:
            raise PlaceError(f"dataset_name: {name} is empty")
        if not os.access(path, os.R_OK):
            raise PlaceError(f"dataset_name: {name} may not be read (chmod)")
    elif not any(_is_data(file.name) for file in path.rglob("*")):
        raise PlaceError(f"dataset_name: no data ({', '.join(DATA)}) in the folder {name}")


def _is_data(name: str) -> bool:
    """Whether a file is of a format that is read, packed or not."""
    path = Path(name.lower())
    return (Path(path.stem).suffix if path.suffix in PACKED else path.suffix) in DATA
