"""The rows of one file, and where each stands in it.

JSON lines and CSV are read row by row, so that a bad row is reported by its number and the others
are used: `datasets` fails on the whole file, or (CSV) takes an unquoted comma in the first row for
an index and shifts all columns. Packed files (`.gz`, `.bz2`, `.xz`) are unpacked on the way.
"""

from __future__ import annotations

import csv
import io
import json
import re
from ast import literal_eval
from collections.abc import Iterator
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from scripts.base import RecipeError, one_line

Row = tuple[str, dict[str, Any] | None, str]  # where it stands; the row, or None and what is wrong
READ = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz")
LFS = b"version https://git-lfs.github.com/spec/"
PRINTED = re.compile(r"\s*\[\s*\{\s*[\"']")  # a list of objects
BETWEEN = re.compile(r"\}\s*\n\s*\{")  # two of them in numpy's arrays, which have no commas


class DataError(RecipeError):
    """The data cannot be read as preference pairs: what, where and how to fix it."""


def kind_of(name: str | Path) -> str:
    """The suffix that tells a file's format: `.jsonl` of `A.JSONL.gz`."""
    path = Path(str(name).lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def require_known(name: str) -> None:
    """Raise a `DataError` unless `name` ends like a file that is read."""
    if kind_of(name) not in READ:
        raise DataError(
            f"{name} is none of {', '.join(READ)}; save a spreadsheet as CSV, unpack an archive"
        )


def read_file(path: Path, name: str | None = None) -> Iterator[Row]:
    """The rows of a file; `where` is its `name` and the line, or the row of a table, from 1. Rows
    of a CSV file are numbered as in a spreadsheet, where the first one after the header is 2.

    Raises:
        DataError: it is of another format, damaged, or a Git-LFS pointer.
    """
    name = name or path.name
    require_known(name)
    kind = kind_of(name)
    try:
        if path.open("rb").read(len(LFS)) == LFS:
            raise DataError(f"{path} is a Git-LFS pointer, not the data; run `git lfs pull` there")
        if kind in (".parquet", ".arrow"):
            rows = _arrow_rows(path) if kind == ".arrow" else pq.read_table(path).to_pylist()
            yield from _numbered(name, rows)
            return
        packing = Path(name.lower()).suffix
        with fsspec.open(path, "rb", compression="infer" if packing in PACKED else None) as file:
            raw = file.read()
        encoding = json.detect_encoding(raw)  # UTF-16 and UTF-32 too
        if not encoding.startswith("utf-8"):
            raw = raw.decode(encoding).encode("utf-8")
    except Exception as error:  # zlib, lzma, pyarrow and the codecs have errors of their own
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or cannot be read: {one_line(error)}") from None
    if kind in (".csv", ".tsv"):
        yield from _table(name, raw, "\t" if kind == ".tsv" else ",")
    elif (rows := _whole(name, raw)) is not None:
        yield from _numbered(name, rows)
    else:
        yield from _lines(name, raw)


def _numbered(name: str, rows: list) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield _object(f"{name}:{number}", row)


def _object(where: str, row: Any) -> Row:
    if isinstance(row, dict):
        return where, row, ""
    return where, None, f"not an object of fields but {type(row).__name__}"


def _arrow_rows(path: Path) -> list[dict]:
    """The rows of a stream, as `datasets` writes it, or of Arrow's file format (Feather)."""
    if path.open("rb").read(6) == b"ARROW1":
        return pa.ipc.open_file(path).read_all().to_pylist()
    return Dataset.from_file(str(path)).to_list()


def _loaded(text: str | bytes) -> Any:
    """`text` as JSON. NaN, which Python writes for an empty cell, becomes a null."""
    return json.loads(text, parse_constant=lambda _: None)


def _lines(name: str, raw: bytes) -> Iterator[Row]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = _loaded(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield where, None, f"not UTF-8: byte {line[error.start]:#04x} at {error.start}"
        except (ValueError, RecursionError) as error:
            yield where, None, f"not JSON: {error}"
        else:
            yield _object(where, row)


def _whole(name: str, raw: bytes) -> list | None:
    """The rows of a file that is one JSON value: an array, one row, `{"data": [...]}`, or columns
    as pandas' `to_json` writes them. None where each line is a value of its own.

    Raises:
        DataError: a `.json` file is neither.
    """
    try:
        whole = _loaded(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        several = b"}" in raw.strip().split(b"\n")[0]  # a whole object on the first line
        if kind_of(name) == ".json" and not several:
            raise DataError(f"{name} is not valid JSON: {error}") from None
        return None
    if not isinstance(whole, dict):
        return whole if isinstance(whole, list) else None
    columns = list(whole.values())
    if len(columns) > 1 and all(isinstance(column, dict) for column in columns):
        return pd.DataFrame(whole).to_dict("records")
    lists = [column for column in columns if column and isinstance(column, list)]
    if len(lists) == 1 and len(columns) == 1 and not _are_messages(lists[0]):
        return lists[0]
    if lists == columns and not any(isinstance(cell, dict) for column in lists for cell in column):
        return pd.DataFrame(whole).to_dict("records")
    if "train" in whole:
        raise DataError(
            f"{name} holds several splits; write each to its own file: train.jsonl, test.jsonl"
        )
    return [whole]


def _table(name: str, raw: bytes, usual: str) -> Iterator[Row]:
    """The rows of a CSV file, all cells as text; what separates them shows in the header.

    Raises:
        DataError: it is not UTF-8, or has two columns of one name.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}); save it as "
            "UTF-8 (in Excel: CSV UTF-8)"
        ) from None
    header = text.lstrip().split("\n", 1)[0]
    separator = max((usual, *",;\t|"), key=lambda s: len(next(csv.reader([header], delimiter=s))))
    csv.field_size_limit(2**31 - 1)
    # Strict: else a quote that is never closed takes in the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns: list[str] = []
    for number in count(1):
        where = f"{name}:{number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield where, None, f"not CSV: {error}"
            continue
        if not columns:
            columns = cells
            if twice := next((c for c in columns if c and columns.count(c) > 1), None):
                raise DataError(f"{name} has two columns {twice!r}; rename or remove one")
        elif any(cells[len(columns) :]):
            yield where, None, f"{len(cells)} cells in {len(columns)} columns"
        elif cells:
            yield where, dict(zip_longest(columns, map(_cell, cells[: len(columns)]))), ""


def _cell(value: str) -> Any:
    """A CSV cell; messages that pandas printed into it, or JSON, are read as messages."""
    if not PRINTED.match(value):
        return value
    for read in (json.loads, literal_eval, lambda text: literal_eval(BETWEEN.sub("}, {", text))):
        try:
            parsed = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if _are_messages(parsed):
            return parsed
    return value


def _are_messages(values: Any) -> bool:
    return all(isinstance(m, dict) and {"role", "from"} & set(m) for m in values)
