"""One run at a time in a folder, by flock(2): the system lets go of it when the process ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from scripts.base import RecipeError

# The headless command holds the first, the kernel that it starts the second. Killing the command
# alone thus leaves the folder locked until its kernel, too, is gone.
OUTER, INNER = ".run.lock", ".kernel.lock"
HELD_BY_PARENT = "DPO_RUN_LOCKED"  # the folder whose outer lock the process that started us holds
_held: dict[Path, int] = {}  # open descriptors, which are the locks; a notebook's kernel keeps them


def _leave_to_the_parent() -> None:
    """A worker of the loader that outlives its run, hung as it is, must not keep the folder."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_the_parent)


def _take(path: Path) -> int | None:
    """An open descriptor that holds the lock `path`, or None if another process does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:  # not every network's file system has locks
        raise RecipeError(
            f"{path} cannot be locked ({error.strerror}); remove it, or give an --output-dir on "
            "another disk"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def hold(run_dir: Path) -> None:
    """Keep every other run out of `run_dir` until this process ends; again is the same as once.

    Raises:
        RecipeError: another process runs there, or the folder takes no lock.
    """
    folder = run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.environ.get(HELD_BY_PARENT) == str(folder)
    mine = folder / (INNER if inside else OUTER)
    if mine in _held:
        return
    descriptor = _take(mine)
    other = mine
    if descriptor is not None and not inside:
        other = folder / INNER  # of a kernel that outlives its command
        kernel = _take(other)
        if kernel is None:
            os.close(descriptor)
            descriptor = None
        else:
            os.close(kernel)
    if descriptor is None:
        pid = other.read_text(errors="replace").strip() or "?"
        raise RecipeError(
            f"{run_dir} is in use by process {pid}; wait for it, end it (a notebook's kernel keeps "
            "the folder until it is shut down), or give another --output-dir"
        )
    _held[mine] = descriptor
