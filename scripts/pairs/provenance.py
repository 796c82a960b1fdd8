"""What a built file came from, and files that remember it.

Sampling and judging are slow or paid for, so each finished piece of work is a line of a JSON-lines
file, with a `key` made of everything that it came from. A later call does again what has no line
under its key, and nothing else: whatever was edited meanwhile, old work is never taken for new.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, TextIO

from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from scripts.base import RecipeError, write_whole


def digest(value: Any) -> str:
    """A short key of any JSON value: equal values, equal keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def weights_state(path: str, revision: str = "main") -> str:
    """What tells one state of a model from another: of a model on the hub, its commit; of a folder,
    a digest of its files.

    They are read whole: training may leave a file's size, and a copy changes its time.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = cached_file(path, "config.json", revision=revision)
        return extract_commit_hash(config, None) or revision
    contents = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix != ".md":
            with file.open("rb") as stream:
                contents.append((file.name, hashlib.file_digest(stream, "sha256").hexdigest()))
    return digest(contents)


def keep_settings(folder: Path, settings: dict) -> None:
    """Write the settings that the files in `folder` come from.

    Raises:
        RecipeError: the folder was started with other settings. Going on would throw its work away,
            or mix the work of two models.
    """
    path = folder / "settings.json"
    if path.exists():
        try:
            before = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise RecipeError(f"{path} is damaged; delete it, or use another --out") from None
        names = [name for name in settings if before.get(name) != settings[name]]
        if names:
            changes = (f"{n} was {before.get(n)!r}, is {settings[n]!r}" for n in names)
            raise RecipeError(
                f"{folder.parent} was started with other settings ({', '.join(changes)}); use "
                "another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def line(row: dict) -> str:
    """`row` as a JSON line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: Path, *fields: str) -> list[dict]:
    """The rows of a JSON-lines file, each with `fields`; none if there is no file. A last line that
    a kill cut short is left out.

    Raises:
        RecipeError: another line is damaged; it names the line.
    """
    if not path.exists():
        return []
    rows = []
    with path.open("rb") as file:  # splitlines() would also split at U+2028 in a text
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                break
            try:
                rows.append(json.loads(text))
                damaged = not set(fields) <= set(rows[-1])
            except (ValueError, TypeError):
                damaged = True
            if damaged:
                raise RecipeError(
                    f"{path}:{number} is damaged; delete that line, and what it held is made again"
                )
    return rows


def append_to(path: Path) -> TextIO:
    """A JSON-lines file opened to add lines; a last line that a kill cut short goes first."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a JSON-lines file whole, or not at all."""
    write_whole(path, "".join(map(line, rows)))
