"""Find the data that a run names and read its rows by split: files, folders, URLs, the hub."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from scripts.base import InputError, RecipeError, local_path
from scripts.pairs.download import download, is_url
from scripts.pairs.files import READ, SHEETS, DataError, Row, kind_of, read_file

# A file of a folder belongs to the split that its name has a word of, as on the hub.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class Source:
    """Preference data to read: where it is, and how its rows become pairs."""

    name: str  # a file, a folder, an http(s) address, or a dataset on the hub
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str = "test"
    needs_test: bool = False  # `test` was asked for by name: nothing else will do
    format: str = "auto"  # or a key of `formats.FORMATS`
    columns: Mapping[str, str] = field(default_factory=dict)  # {their name: ours}
    score_margin: float = 0.0
    held_out: float | str = "auto"  # share of the prompts, where there is no test split
    seed: int = 0


def read_source(source: Source) -> tuple[list[Row], list[Row] | None]:
    """All rows of the training split and of the test split (None: there is none).

    A folder's data card may name its splits. A single file is the training split. What is on this
    machine, or looks like a path, is never looked for on the hub. Without a `test` split, a
    `validation` split is the held-out one.

    Raises:
        DataError: there is no such data, or it cannot be read at all.
        InputError: it has no split of that name.
    """
    name = source.name
    if not name:
        raise DataError("dataset_name is not set: name a file, a folder or a hub dataset")
    local = download(name) if is_url(name) else local_path(name)
    if local is None and looks_like_a_path(name):
        raise DataError(f"there is no file or folder {name}; check dataset_name")
    try:
        splits = _read_local(local, source) if local else _read_hub(source)
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
    test = _held_out_split(list(splits), source)
    return splits[source.train], splits.get(test)


def _held_out_split(splits: list[str], source: Source) -> str:
    """The split to hold out, of those that the data has; `validation` stands in for `test`.

    Raises:
        InputError: the data has no such training split, or not the test split asked for.
    """
    asked = {"dataset_train_split": source.train}
    asked |= {"dataset_test_split": source.test} if source.needs_test else {}
    for key, split in asked.items():
        if split not in splits:
            near = difflib.get_close_matches(split, splits, n=1, cutoff=0.0)[0]
            raise InputError(
                f"`{key}`: {source.name} has no split {split!r}, only {', '.join(splits)}; did "
                f"you mean {near!r}?"
            )
    others = [split for split in splits if split not in (source.train, source.test)]
    if source.test in splits:
        if others:
            print(f"Splits that are not used: {', '.join(others)} (dataset_train_split names one).")
        return source.test
    test = next((s for s in others if s in SPLIT_WORDS["validation"]), source.test)
    if test != source.test:
        print(f"The split {test!r} is held out, as there is no 'test'.")
    return test


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be meant for a dataset on the hub, `NAME` or `OWNER/NAME`."""
    known = kind_of(name) in (*READ, *SHEETS) or Path(name.lower()).suffix in (".gz", ".zip")
    return known or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _read_local(path: Path, source: Source) -> dict[str, list[Row]]:
    if path.is_dir() and any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _by_split(load_from_disk(str(path)), source.train)  # `save_to_disk`
    files = {source.train: [path]} if path.is_file() else _files(path, source)
    return {split: list(_rows_of(some, path)) for split, some in files.items()}


def _rows_of(files: list[Path], folder: Path) -> Iterator[Row]:
    """The rows of `files`; two of one name in different folders are told apart by their places."""
    for file in files:
        above = file.relative_to(folder).parent if file.is_relative_to(folder) else Path()
        for where, row, problem in read_file(file):
            yield str(above / where), row, problem


def _read_hub(source: Source) -> dict[str, list[Row]]:
    data = load_dataset(source.name, source.config, revision=source.revision)
    return _by_split(data, source.train)


def _by_split(data: Dataset | DatasetDict, train: str) -> dict[str, list[Row]]:
    """The rows of what `datasets` loaded; a dataset without splits is the training split."""
    splits = data if isinstance(data, DatasetDict) else {train: data}
    return {str(split): list(_numbered(rows, split)) for split, rows in splits.items()}


def _numbered(rows: Dataset, split: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{split}:{number}", row, ""


def _files(folder: Path, source: Source) -> dict[str, list[Path]]:
    """The files behind each split of a folder: as its data card says, or by their names. Files
    beside them that look like data are told."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.MULTILINE):
        splits = load_dataset_builder(str(folder), source.config).config.data_files or {}
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
    splits = splits or {source.train: usable}
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
