"""The rows of one file, and where each stands in it.

JSON lines and CSV are read row by row, so that a bad row is reported by its number and the others
are used: `datasets` fails on the whole file, or (CSV) takes an unquoted comma in the first row for
an index and shifts all columns. Packed files (`.gz`, `.bz2`, `.xz`) are unpacked on the way.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import suppress
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
            f"{name} is not one of {', '.join(READ)}; save a spreadsheet as CSV, unpack an archive"
        )


def read_file(path: Path, name: str | None = None) -> Iterator[Row]:
    """The rows of a file; `where` is its `name` and the line (of a CSV
    file, the one that the row ends in), or the row of a table, from 1.

    Raises:
        DataError: it is of another format, damaged, or a Git-LFS pointer.
    """
    name = name or path.name
    require_known(name)
    kind = kind_of(name)
    try:
        start = path.open("rb").read(len(LFS))
        if start == LFS:
            raise DataError(f"{path} is a Git-LFS pointer, not the data; run `git lfs pull` there")
        if kind in (".parquet", ".arrow"):
            if kind == ".parquet":
                rows = pq.read_table(path).to_pylist()
            elif start.startswith(b"ARROW1"):  # Feather
                rows = pa.ipc.open_file(path).read_all().to_pylist()
            else:  # a stream, as `datasets` writes it
                rows = Dataset.from_file(str(path)).to_list()
            yield from _numbered(name, rows)
            return
        with fsspec.open(path, "rb", compression="infer") as file:
            raw = file.read()
        encoding = json.detect_encoding(raw)  # UTF-16 and UTF-32 too
        if not encoding.startswith("utf-8"):
            raw = raw.decode(encoding).encode("utf-8")
    except DataError:
        raise
    except Exception as error:  # zlib, lzma, pyarrow and the codecs have errors of their own
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


def _loaded(text: str) -> Any:
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
    if len(columns) == 1 and isinstance(columns[0], list) and not _are_messages(columns[0]):
        return columns[0]
    by_index = len(columns) > 1 and all(isinstance(column, dict) for column in columns)
    by_order = all(isinstance(column, list) and not _are_messages(column) for column in columns)
    return pd.DataFrame(whole).to_dict("records") if by_index or by_order else [whole]


def _table(name: str, raw: bytes, usual: str) -> Iterator[Row]:
    """The rows of a CSV file, all cells as text; what separates them shows in the header.

    Raises:
        DataError: it is not UTF-8, has two columns of one name, or a quote that is never closed.
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
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        columns = reader.fieldnames or []
        if twice := next((c for c in columns if c and columns.count(c) > 1), None):
            raise DataError(f"{name} has two columns {twice!r}; rename or remove one")
        for row in reader:
            where = f"{name}:{reader.line_num}"
            if any(more := row.pop(None, [])):
                yield where, None, f"{len(columns) + len(more)} cells in {len(columns)} columns"
            else:
                yield where, {column: _cell(cell) for column, cell in row.items()}, ""
    except csv.Error as error:
        where = f"{name}:{reader.line_num + 1}"  # after the last row that is whole
        raise DataError(f"{where} is not CSV: {error}") from None


def _cell(value: str | None) -> Any:
    """A CSV cell; messages as JSON are read as messages."""
    if value and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            parsed = json.loads(value)
            return parsed if parsed and _are_messages(parsed) else value
    return value


def _are_messages(values: list) -> bool:
    return all(isinstance(m, dict) and {"role", "from"} & set(m) for m in values)
