"""Find the data that a config names, and read its rows by split: files, folders, addresses, the
hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from trl import ScriptArguments

from scripts.base import RecipeError
from scripts.config import Config, ConfigError
from scripts.config import local_path as local_path  # which readers of data take from here
from scripts.hub import patiently
from scripts.pairs.download import download, is_url
from scripts.pairs.files import READ, SHEETS, DataError, Row, kind_of, read_file

# A file of a folder belongs to the split that its name has a word of, as on the hub.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def read_source(cfg: Config) -> dict[str, list[Row]]:
    """All rows of the dataset of `cfg`, by split: a file, a folder, an http(s) address of a file,
    or a dataset on the hub.

    A folder's data card may name its splits. A single file is the training split. What is on this
    machine, or has the form of a path, is never looked for on the hub. Without a `test` split, a
    `validation` split is the held-out one.

    Raises:
        DataError: there is no such data, or it cannot be read at all.
    """
    args, name = cfg.script, cfg.script.dataset_name
    if not name:
        raise DataError("dataset_name is not set: name a file, a folder or a hub dataset")
    local = download(name) if is_url(name) else local_path(name)
    if local is None and looks_like_a_path(name):
        raise DataError(f"there is no file or folder {name}; check dataset_name")
    try:
        splits = _read_local(local, args) if local else _read_hub(name, cfg)
    except RecipeError:
        raise
    except Exception as error:  # each of the many loaders raises errors of its own
        if "available configs: " in str(error):
            there = str(error).partition("available configs: ")[2].splitlines()[0]
            raise DataError(
                f"{name} has several configs; set dataset_config to one of {there}"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load dataset {name!r}: {reason}") from error
    return _with_held_out(splits, args)


def require_splits(cfg: Config) -> None:
    """Refuse splits that the data on this machine does not have, before any row of it is read.

    Raises:
        ConfigError: it names the nearest split that there is.
    """
    local = local_path(cfg.script.dataset_name)
    if local and local.is_dir():
        named_splits(cfg, list(_with_held_out(_files(local, cfg.script), cfg.script)))


def named_splits(cfg: Config, splits: list[str]) -> tuple[str, str | None]:
    """The training split of `splits`, and the test split: None if the data has none and the config
    asks for none.

    Raises:
        ConfigError: the config names another; a misspelt test split must not be made up for.
    """
    train, test = cfg.script.dataset_train_split, cfg.script.dataset_test_split
    asked = "dataset_test_split" in cfg.given
    for key, split in {"dataset_train_split": train, "dataset_test_split": test}.items():
        if split not in splits and (key == "dataset_train_split" or asked):
            near = difflib.get_close_matches(split, splits, n=1, cutoff=0.0)
            raise ConfigError(
                f"`{key}`: {cfg.script.dataset_name} has no split {split!r}, only "
                f"{', '.join(splits)}; did you mean {near[0] if near else 'other data'!r}?"
            )
    return train, test if test in splits else None


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be meant for a dataset on the hub, `NAME` or `OWNER/NAME`."""
    known = kind_of(name) in (*READ, *SHEETS) or Path(name.lower()).suffix in (".gz", ".zip")
    return known or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _read_local(path: Path, args: ScriptArguments) -> dict[str, list[Row]]:
    if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _by_split(load_from_disk(str(path)), args.dataset_train_split)  # `save_to_disk`
    files = {args.dataset_train_split: [path]} if path.is_file() else _files(path, args)
    return {split: list(_rows_of(some, path)) for split, some in files.items()}


def _rows_of(files: list[Path], folder: Path) -> Iterator[Row]:
    """The rows of `files`; two of one name in different folders are told apart by their places."""
    for file in files:
        above = file.relative_to(folder).parent if file.is_relative_to(folder) else Path()
        for where, row, problem in read_file(file):
            yield str(above / where), row, problem


def _read_hub(name: str, cfg: Config) -> dict[str, list[Row]]:
    config, revision = cfg.script.dataset_config, cfg.recipe.dataset_revision
    data = patiently(lambda: load_dataset(name, config, revision=revision))
    return _by_split(data, cfg.script.dataset_train_split)


def _by_split(data: Dataset | DatasetDict, train: str) -> dict[str, list[Row]]:
    """The rows of what `datasets` loaded; a dataset without splits is the training split."""
    splits = data if isinstance(data, DatasetDict) else {train: data}
    return {str(split): list(_numbered(rows, split)) for split, rows in splits.items()}


def _numbered(rows: Dataset, split: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{split}:{number}", row, ""


def _files(folder: Path, args: ScriptArguments) -> dict[str, list[Path]]:
    """The files behind each split of a folder: as its data card says, or by their names. Files
    beside them that look like data are told."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE):
        splits = load_dataset_builder(str(folder), args.dataset_config).config.data_files or {}
        return {str(split): [Path(str(f)) for f in files] for split, files in splits.items()}
    there = sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ABOUT)
    there = [f for f in there if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    usable = [f for f in there if kind_of(f) in READ]
    if not usable:
        names = ", ".join(f.name for f in there[:5]) or "nothing"
        raise DataError(f"{folder} has {names}, and no file of {', '.join(READ)}")
    splits = {
        split: [f for f in usable if words & _split_words(f.relative_to(folder))]
        for split, words in SPLIT_WORDS.items()
    }
    splits = {split: files for split, files in splits.items() if files}
    splits = splits or {args.dataset_train_split: usable}
    used = {f for files in splits.values() for f in files}
    unread = [f for f in there if f not in used and kind_of(f) in (*READ, *SHEETS)]
    if unread:
        names = ", ".join(str(f.relative_to(folder)) for f in unread[:5])
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        read = ", ".join(str(f.relative_to(folder)) for f in sorted(used)[:5])
        print(f"{folder}: read {read}; NOT read: {names}{more} (no split in the name, or no data).")
    return splits


def _split_words(path: Path) -> set[str]:
    """The words of a file's name that name a split, else those of its folders.

    Raises:
        DataError: they name several splits.
    """
    known = set().union(*SPLIT_WORDS.values())
    words = known & _words(Path(path.name)) or known & _words(path.parent)
    if sum(bool(words & some) for some in SPLIT_WORDS.values()) > 1:
        names = " and ".join(sorted(words))
        raise DataError(f"{path} has {names} in its name; rename it after one split, or neither")
    return words


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(path).lower()))


def _with_held_out(splits: dict[str, list[Row]], args: ScriptArguments) -> dict[str, list[Row]]:
    """`splits`, in which a `validation` split stands in for a missing `test`."""
    test = args.dataset_test_split
    if test in splits:
        unused = [split for split in splits if split not in (args.dataset_train_split, test)]
        if unused and args.dataset_train_split in splits:
            print(f"Splits that are not used: {', '.join(unused)} (dataset_train_split names one).")
        return splits
    if test != "test":  # it was asked for, and is refused by its name
        return splits
    name = next((s for s in splits if s in SPLIT_WORDS["validation"]), None)
    if name and name != args.dataset_train_split:
        print(f"The split {name!r} is held out, as there is no 'test'.")
        splits[test] = splits.pop(name)
    return splits
