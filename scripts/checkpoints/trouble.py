"""Say in one line what stopped a run: memory, disk, data or a signal."""

from __future__ import annotations

import errno
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scripts.base import CTRL_C, STOPPED, RecipeError, disk_is_full

MEMORY_WORDS = ("defaultcpuallocator", "can't allocate memory", "cannot allocate memory")


class TrainingError(RecipeError):
    """Training cannot go on; the message says why, what is kept, and how to go on."""


class Stopped(RecipeError):
    """A signal stopped the run; the message says what is kept, and how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = CTRL_C if signum == signal.SIGINT else STOPPED


def explain(error: BaseException, folder: Path) -> str | None:
    """What an error of the system means for a run that writes to `folder`, and what helps; None for
    any other error, which is told as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is short (torch.OutOfMemoryError); activation_checkpointing: true "
            "computes the same in less, and may be set on going on; or begin anew with a smaller "
            "per_device_train_batch_size and more gradient_accumulation_steps (scripts.plan counts "
            "both), and see with nvidia-smi who else uses the GPU"
        )
    short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if short or any(word in str(error).lower() for word in MEMORY_WORDS):
        return (
            "main memory is short; scripts.plan says what the config needs: end other programs, "
            "set activation_checkpointing: true, or begin anew with a smaller "
            "per_device_train_batch_size"
        )
    if re.search(r"DataLoader worker \(pid.* (exited|is killed)", str(error)):
        return (
            f"a worker of the data loader was killed ({first_line(error)}), most often for lack of "
            "main memory; dataloader_num_workers: 0 does without, and may be set on going on"
        )
    if disk_is_full(error):
        room = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(room).free / 1024**2
        return (
            f"a file could not be written: no room ({first_line(error)}; {free:,.0f} MB are free "
            f"at {room}); make room, or raise the limit"
        )
    return None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextmanager
def told(folder: Path, doing: str) -> Iterator[None]:
    """Turn an error of the system while `doing` something into one clear line.

    Raises:
        TrainingError: memory or disk were short.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if what := explain(error, folder):
            raise TrainingError(f"while {doing}: {what}") from error
        raise
