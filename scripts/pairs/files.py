"""The rows of one file, and where each stands in it.

JSON and CSV are read line by line, so that one bad line is reported with its number instead of
failing the whole file. An array, or objects that take several lines each, are read whole, in a
`.jsonl` too. Packed files (`.gz`, `.bz2`, `.xz`) are unpacked on the way.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from ast import literal_eval
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from scripts.base import RecipeError

Row = tuple[str, dict[str, Any] | None, str]  # where it stands; the row, or None and what is wrong
TEXT = (".jsonl", ".json", ".ndjson", ".csv", ".tsv")
READ = (*TEXT, ".parquet", ".arrow")
PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz"}
SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".zst")
LFS = b"version https://git-lfs.github.com/spec/"
BOMS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
# What the bytes beyond ASCII of a Western European text in Windows-1252 are.
WESTERN = set(
    "äöüßéèêëàâáãåçíìîïóòôõøñúùûæœÿýÄÖÜÉÈÊËÀÂÁÃÅÇÍÌÎÏÓÒÔÕØÑÚÙÛÆŒ€‘’“”„‚«»‹›–—…•¿¡§°©®™·\xa0"
)
PRINTED = re.compile(r"\s*\[\s*\{\s*[\"']")  # a list of objects
BETWEEN = re.compile(r"\}\s*\n\s*\{")  # two of them in numpy's arrays, which have no commas
SPACE = re.compile(r"\s*")
OF_UTF8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")


class DataError(RecipeError):
    """The data cannot be read as preference pairs: what, where and how to fix it."""


def kind_of(name: str | Path) -> str:
    """The suffix that tells a file's format, in lower case and packing aside: `.jsonl` of
    `A.JSONL.gz`."""
    path = Path(str(name).lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def refuse(path: Path) -> None:
    """Raise a `DataError` for a file of a format that is not read, with the way to make one that
    is."""
    kind = kind_of(path)
    if kind in READ:
        return
    fix = f"write it as one of {', '.join(READ)}"
    if kind in SHEETS:
        fix = "save the sheet as CSV (in Excel: CSV UTF-8)"
    elif kind in ARCHIVES:
        fix = "unpack it, and name the file or folder in it"
    raise DataError(
        f"{path.name} is {kind or 'of no format'} by its name, which is not read; {fix}"
    )


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file; `where` is its name and the line (of JSON and tables, the row's) number,
    from 1.

    Raises:
        DataError: it is of another format, damaged, or not there but for a Git-LFS pointer.
    """
    refuse(path)
    raw, kind = _contents(path), kind_of(path)
    if kind in (".parquet", ".arrow"):
        yield from _table_rows(path, raw)
    elif kind in (".csv", ".tsv"):
        yield from _csv_rows(path, raw)
    elif _object_a_line(raw):
        yield from _json_lines(path, raw)
    elif (rows := _spread(raw)) is not None:
        yield from _numbered(path, rows)
    elif kind == ".json":
        yield from _json_rows(path, raw)
    else:
        yield from _json_lines(path, raw)


def _contents(path: Path) -> bytes:
    """The bytes of a file, unpacked, and text in UTF-16 or UTF-32 as UTF-8."""
    try:
        raw = path.read_bytes()
        if packing := next((p for magic, p in MAGIC.items() if raw.startswith(magic)), None):
            raw = PACKED[packing](raw)
    except (EOFError, zlib.error, lzma.LZMAError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged or cannot be read: {error}; copy it anew") from None
    if raw.startswith(LFS):
        raise DataError(
            f"{path} is a Git-LFS pointer, not the data; fetch it with `git lfs pull` in its "
            "repository"
        )
    encoding = next((name for bom, name in BOMS if raw.startswith(bom)), None)
    if encoding is None or kind_of(path) not in TEXT:
        return raw
    try:
        return raw.decode(encoding).encode("utf-8")
    except UnicodeError:
        raise DataError(f"{path.name} begins as {encoding} and is not; export as UTF-8") from None


def _table_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        if kind_of(path) == ".parquet":
            rows = pq.read_table(pa.BufferReader(raw)).to_pylist()
        else:
            rows = _arrow_rows(raw)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name} is damaged, or no {kind_of(path)} file: {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path.name}:{number}", row, ""


def _arrow_rows(raw: bytes) -> list[dict[str, Any]]:
    """The rows of a stream, as `datasets` writes it, or of Arrow's file format, Feather's too."""
    if raw.startswith(b"ARROW1"):
        return pa.ipc.open_file(pa.BufferReader(raw)).read_all().to_pylist()
    return list(Dataset.from_buffer(pa.py_buffer(raw)))


def _loaded(text: str | bytes) -> Any:
    """`text` as JSON, in which the NaN of a table's empty cell, as Python writes it, is a null."""
    return json.loads(text, parse_constant=lambda _: None)


def _object_a_line(raw: bytes) -> bool:
    """Whether a file holds JSON lines, several objects, and not one array or object."""
    first, _, rest = raw.strip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _spread(raw: bytes) -> list | None:
    """The rows of a file that holds one array, or several objects one after another, over any
    number of lines; None if it holds anything else."""
    decoder = json.JSONDecoder(parse_constant=lambda _: None)
    values, at = [], 0
    try:
        text = raw.decode("utf-8-sig").strip()
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = SPACE.match(text, end).end()
    except (ValueError, RecursionError):
        return None
    if len(values) == 1:
        return values[0] if isinstance(values[0], list) else None
    return values if all(isinstance(value, dict) for value in values) else None


def _numbered(path: Path, rows: list) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path.name}:{number}", row)


def _json_lines(path: Path, raw: bytes) -> Iterator[Row]:
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{path.name}:{number}"
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


def _object(where: str, row: Any) -> Row:
    if isinstance(row, dict):
        return where, row, ""
    return where, None, f"not an object of fields but {type(row).__name__}"


def _json_rows(path: Path, raw: bytes) -> Iterator[Row]:
    try:
        rows = _loaded(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(rows, dict):
        raise DataError(f"{path.name} is not a list of rows but {type(rows).__name__}")
    yield from _numbered(path, _rows_of(path, rows))


def _rows_of(path: Path, whole: dict) -> list:
    """The rows in one JSON object: columns, as `Dataset.to_dict` and pandas' `to_json` have them,
    `{"data": [...]}`, or the object itself."""
    columns = list(whole.values())
    if len(columns) > 1 and all(isinstance(column, dict) for column in columns):
        numbers = columns[0].keys()
        if all(n.isdigit() for n in numbers) and all(c.keys() == numbers for c in columns):
            columns = [list(column.values()) for column in columns]
    if len(columns) > 1 and all(isinstance(column, list) for column in columns):
        cells = [cell for column in columns for cell in column]
        if len({len(column) for column in columns}) == 1 and not any(
            isinstance(cell, dict) for cell in cells
        ):
            return [dict(zip(whole, row, strict=True)) for row in zip(*columns, strict=True)]
    lists = {name: v for name, v in whole.items() if v and isinstance(v, list)}
    if len(lists) > 1 and "train" in lists:
        raise DataError(
            f"{path.name} holds several lists ({', '.join(lists)}); write each to a file of its "
            "own, in one folder: train.jsonl, test.jsonl"
        )
    return next(iter(lists.values())) if len(lists) == 1 else [whole]


def _csv_rows(path: Path, raw: bytes) -> Iterator[Row]:
    text = _csv_text(path, raw)
    csv.field_size_limit(2**31 - 1)
    # Strict: else a quote that is never closed takes in the rest of the file as one cell.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=_delimiter(path, text), strict=True
    )
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
        if not cells or (not columns and cells[0].lower().startswith("sep=")):
            continue  # an empty line, or Excel's note of the separator
        if not columns:
            columns = cells
            if twice := next((c for c in columns if c and columns.count(c) > 1), None):
                raise DataError(f"{path.name} has two columns {twice!r}; rename or remove one")
        elif len(cells) > len(columns):
            yield where, None, f"{len(cells) - len(columns)} cells more than there are columns"
        else:
            row = dict(zip_longest(columns, map(_cell, cells)))
            yield where, row, ""


def _csv_text(path: Path, raw: bytes) -> str:
    """The text of a CSV file, also one in Windows-1252, as Excel writes it in Western Europe.

    Bytes that are neither become U+FFFD, which the checks find in their row: to guess further
    would be to train on garbled text.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        high = bytes(byte for byte in raw if byte > 127)
        western = WESTERN.issuperset(high.decode("cp1252", errors="replace"))
        letters = sum(byte > 127 or chr(byte).isalpha() for byte in raw)
        if western and not OF_UTF8.search(raw) and len(high) < letters / 4:
            print(f"{path.name} is not UTF-8 and is read as Windows-1252 (Western European).")
            return raw.decode("cp1252")
        return raw.decode("utf-8-sig", errors="replace")


def _delimiter(path: Path, text: str) -> str:
    """What parts the columns: comma (in `.tsv`, tab), or else what parts the header in several."""
    usual = "\t" if kind_of(path) == ".tsv" else ","
    header = next((line for line in re.split("[\r\n]", text) if line.strip()), "")

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter)))

    if header.lower().startswith("sep="):
        return header[4:5] or usual
    return usual if columns(usual) > 1 else max((usual, *",;\t|"), key=columns)


def _cell(value: str | None) -> Any:
    """A CSV cell; one that holds messages, as JSON or as Python and numpy print them (which is what
    pandas writes), is read as such."""
    if not value or not PRINTED.match(value):
        return value
    readers = (json.loads, literal_eval, lambda text: literal_eval(BETWEEN.sub("}, {", text)))
    for read in readers:
        try:
            parsed = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if all(isinstance(m, dict) and {"role", "from"} & set(m) for m in parsed):
            return parsed
        break
    return value
