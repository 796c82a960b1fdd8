"""Find the data that a run names and read its rows by split: files, folders, URLs, the hub."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import requests
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from scripts.base import InputError, RecipeError, local_path, one_line
from scripts.pairs.files import READ, DataError, Row, kind_of, read_file, require_known

PATIENCE = (10, 60)  # seconds to connect, and for each piece to come
PAGES = (b"<!doctype html", b"<html")
VALIDATION = ("validation", "valid", "val", "dev")


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


def read_source(source: Source) -> dict[str, list[Row]]:
    """All rows of the split to train on, as `train`, and of the one to hold out, as `test`, if
    there is one.

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
    local = None if is_url(name) else local_path(name)
    if local is None and not is_url(name) and looks_like_a_path(name):
        raise DataError(f"there is no file or folder {name}; check dataset_name")
    try:
        if is_url(name):
            splits = {source.train: _read_url(name)}
        elif local:
            splits = _read_local(local, source)
        else:
            data = load_dataset(name, source.config, revision=source.revision)
            splits = _by_split(data, source.train)
    except RecipeError:
        raise
    except Exception as error:  # each of the many loaders raises errors of its own
        _, several, there = str(error).partition("available configs: ")
        if several:
            raise DataError(
                f"{name} has several configs; set dataset_config to one of {there.splitlines()[0]}"
            ) from None
        raise DataError(f"cannot load dataset {name!r}: {one_line(error)}") from error
    test = _held_out_split(list(splits), source)
    return {"train": splits[source.train]} | ({"test": splits[test]} if test else {})


def _held_out_split(splits: list[str], source: Source) -> str | None:
    """The split to hold out, of those that the data has, or None; `validation` stands in for
    `test`.

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
            print(f"Splits not used: {', '.join(others)} (dataset_train_split chooses).")
        return source.test
    test = next((s for s in others if s in VALIDATION), None)
    if test:
        print(f"The split {test!r} is held out, as there is no 'test'.")
    return test


def is_url(name: str) -> bool:
    """Whether `name` is an http or https address."""
    return name.lower().startswith(("http://", "https://"))


def looks_like_a_path(name: str) -> bool:
    """Whether `name` cannot be meant for a dataset on the hub, `NAME` or `OWNER/NAME`."""
    known = kind_of(name) in READ or Path(name.lower()).suffix in (".gz", ".zip", ".xlsx")
    return known or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _read_url(url: str) -> list[Row]:
    """The rows of the file at `url`, which is fetched anew each time."""
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name
    if parts.hostname == "huggingface.co" and "/resolve/" not in parts.path:
        dataset = "/".join(parts.path.split("/")[2:4])
        raise DataError(f"{url} is a page of the hub; set dataset_name={dataset}")
    require_known(name)
    try:
        response = requests.get(url, timeout=PATIENCE)
        response.raise_for_status()
    except (OSError, ValueError) as error:  # what those of requests derive from
        raise DataError(f"cannot download {url}: {one_line(error)}") from None
    if response.content[:200].lstrip().lower().startswith(PAGES):
        raise DataError(f"{url} is a web page, not a data file; give the raw file's address")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(response.content)
        return list(read_file(path))


def _read_local(path: Path, source: Source) -> dict[str, list[Row]]:
    if path.is_file():
        return {source.train: list(read_file(path))}
    if any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        return _by_split(load_from_disk(str(path)), source.train)  # of `save_to_disk`
    return {split: list(_rows_of(files, path)) for split, files in _files(path, source).items()}


def _rows_of(files: list[Path], folder: Path) -> Iterator[Row]:
    """The rows of `files`; two of one name in different folders are told apart by their places."""
    top = folder.resolve()
    for file in files:
        inside = file.resolve().is_relative_to(top)
        name = str(file.resolve().relative_to(top)) if inside else file.name
        yield from read_file(file, name)


def _by_split(data: Dataset | DatasetDict, train: str) -> dict[str, list[Row]]:
    """The rows of what `datasets` loaded; a dataset without splits is the training split."""
    splits = data if isinstance(data, DatasetDict) else {train: data}
    return {
        str(split): [(f"{split}:{n}", row, "") for n, row in enumerate(rows, start=1)]
        for split, rows in splits.items()
    }


def _files(folder: Path, source: Source) -> dict[str, list[Path]]:
    """The files behind each split of a folder, as `datasets` tells them: by its data card or by
    their names. Other data files in it are named in a line."""
    there = sorted(f for f in folder.rglob("*") if f.is_file() and kind_of(f) in READ)
    if not there:
        raise DataError(f"{folder} has no file of {', '.join(READ)}")
    found = load_dataset_builder(str(folder), source.config).config.data_files or {}
    splits = {str(s): [Path(f) for f in files if kind_of(f) in READ] for s, files in found.items()}
    used = {f.resolve() for files in splits.values() for f in files}
    unread = [f for f in there if f.resolve() not in used and f.name[0] not in "._"]
    if unread:
        names = ", ".join(str(f.relative_to(folder)) for f in unread[:5])
        print(f"{folder}: {len(used)} files read; NOT read: {names} (no split in the name).")
    return splits
