"""What every part of the code stands on: where the project is, its errors, whole writes."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "configs/smollm2-135m-cpu.yaml"

STOPPED = 75  # exit code: stopped from outside, the same command goes on (EX_TEMPFAIL, sysexits.h)
CTRL_C = 130  # 128 + SIGINT, as shells have it

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The same from torch's and safetensors' own writers, which give no errno.
FULL_WORDS = (
    "no space left", "os error 28", "os error 27", "os error 122", "file too large",
    "quota exceeded", "pytorchstreamwriter failed", "unexpected pos", "iostream error",
)  # fmt: skip


class RecipeError(Exception):
    """Something the user can put right; its one line says what, where and how."""

    exit_code = 1  # what a command that it ends exits with

    def _render_traceback_(self) -> list[str]:
        """IPython's hook: a notebook shows the line, and not the way to it through the code."""
        return [f"error: {self}"]


class InputError(RecipeError):
    """A mistake in what the user gave: a config, an override, a path. Nothing was loaded yet."""

    exit_code = 2  # as argparse ends after a mistyped option


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel, with a reader or headless."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for lack of room: full disk, quota, or a limit on a file's size."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(word in str(error).lower() for word in FULL_WORDS)


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message on one line, or its class where it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def local_path(name: str) -> Path | None:
    """The file or folder that `name` is on this machine: from the home folder (`~`), the current
    one, or the project's; None if there is none."""
    path = Path(os.path.expanduser(name))  # Path's own raises for the home of an unknown user
    return next((p for p in (path, ROOT / path) if os.path.lexists(p)), None)


def flush(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before going on. See fsync(2)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a kill leaves the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        flush(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, target: Path) -> None:
    """Flush the folder `part` and rename it to `target`; what was there goes only after."""
    for path in [*part.rglob("*"), part]:
        flush(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    part.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
