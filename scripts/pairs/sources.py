"""Read rows of preference data, and where each stands in its source.

JSON and CSV files of your own are read line by line, so that one bad line is reported with its
number instead of failing the whole file. Everything else (Parquet, Arrow, the hub) is read by
`datasets.load_dataset`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder

from scripts.config import ROOT, Config, ConfigError, RecipeError
from scripts.hub import patiently

Row = tuple[str, dict[str, Any] | None, str]  # where it stands; the row, or None and what is wrong
TEXT = {".jsonl", ".json", ".ndjson", ".csv", ".tsv"}


class DataError(RecipeError):
    """The data cannot be read as preference pairs: what, where and how to fix it."""


def read_source(cfg: Config) -> dict[str, list[Row]]:
    """All rows of the dataset of `cfg`, by split: a file, a folder, or a dataset on the hub.

    A folder's data card may name its splits. A single file is the training split.

    Raises:
        DataError: there is no such data, or it cannot be read at all.
    """
    args, name = cfg.script, cfg.script.dataset_name
    if name is None:
        raise DataError("dataset_name is not set: name a file, a folder or a hub dataset")
    local = next((p for p in (Path(name), ROOT / name) if p.exists()), None)
    try:
        files = _local_files(local, args.dataset_config) if local else {}
        if files and all(f.suffix in TEXT for paths in files.values() for f in paths):
            return {
                split: [row for path in paths for row in read_file(path)]
                for split, paths in files.items()
            }
        # A folder is read anew each time: the cache of `datasets` may not notice an edited file.
        fresh = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
        if local and local.is_file():
            kind = "parquet" if local.suffix == ".parquet" else local.suffix.lstrip(".")
            source = load_dataset(kind, data_files=str(local), **fresh)
        else:
            more = fresh if local else {"revision": cfg.recipe.dataset_revision}
            source = patiently(
                lambda: load_dataset(str(local or name), args.dataset_config, **more)
            )
    except RecipeError:
        raise
    except Exception as error:  # each of the many loaders raises errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot load dataset {name!r}: {reason}") from error
    return {split: list(_numbered(rows, split)) for split, rows in source.items()}


def require_splits(cfg: Config) -> None:
    """Refuse splits that the data on this machine does not have, before any row of it is read.

    Raises:
        ConfigError: it names the nearest split that there is.
    """
    name = cfg.script.dataset_name
    local = next((p for p in (Path(name), ROOT / name) if p.exists()), None)
    if local:
        named_splits(cfg, list(_local_files(local, cfg.script.dataset_config)))


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


def _local_files(path: Path, config: str | None) -> dict[str, list[Path]]:
    """The files behind each split of a local file or folder."""
    if path.is_file():
        return {"train": [path]}
    splits = load_dataset_builder(str(path), config).config.data_files or {}
    return {str(split): [Path(str(f)) for f in files] for split, files in splits.items()}


def _numbered(rows: Dataset, split: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"{split}:{number}", row, ""


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a JSON, JSON-lines, CSV or TSV file; `where` is its name and the line (of JSON,
    the row's) number, from 1."""
    raw = path.read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path.name} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if path.suffix in (".csv", ".tsv"):
        yield from _csv_rows(path, raw)
    elif path.suffix == ".json" and not _object_a_line(raw):
        yield from _json_rows(path, raw)
    else:
        yield from _json_lines(path, raw)


def _object_a_line(raw: bytes) -> bool:
    """Whether a `.json` file holds JSON lines, as many do, and not one array or object."""
    first, _, rest = raw.strip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _json_lines(path: Path, raw: bytes) -> Iterator[Row]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield where, None, f"not UTF-8: byte {line[error.start]:#04x} at {error.start}"
        except (ValueError, RecursionError) as error:
            yield where, None, f"not JSON: {error}"
        else:
            yield _object(where, row)


def _object(where: str, row: Any) -> Row:
    if isinstance(row, dict):
        return where, row, ""
    return where, None, f"not an object of fields but {type(row).__name__}"


def _json_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path.name} is not valid JSON: {error}") from None
    if isinstance(rows, dict):  # {"data": [...]}
        lists = [value for value in rows.values() if isinstance(value, list)]
        rows = lists[0] if len(lists) == 1 else [rows]
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path.name}:{number}", row)


def _csv_rows(path: Path, raw: bytes) -> Iterator[Row]:
    # Bytes that are not UTF-8 become U+FFFD, which the checks find in their row.
    text = io.StringIO(raw.decode("utf-8-sig", errors="replace"), newline="")
    csv.field_size_limit(2**31 - 1)
    # Strict: else a quote that is never closed takes in the rest of the file as one cell.
    reader = csv.reader(text, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    columns: list[str] = []
    while True:
        where = f"{path.name}:{reader.line_num + 1}"  # a row may span lines: where it begins
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield where, None, f"not CSV: {error}"
            continue
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if not columns:
            columns = cells
        elif len(cells) > len(columns):
            yield where, None, f"{len(cells) - len(columns)} cells more than there are columns"
        else:
            row = dict(zip_longest(columns, map(_cell, cells)))
            yield where, row, ""


def _cell(value: str | None) -> Any:
    """A CSV cell; one that holds messages as JSON is read as such."""
    if value and value.lstrip().startswith('[{"'):
        try:
            parsed = json.loads(value)
        except ValueError:
            return value
        if all(isinstance(m, dict) and {"role", "from"} & set(m) for m in parsed):
            return parsed
    return value
