"""The data goes while a run reads it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator

from tests.survival import tiny
from tests.survival.probes import Remove, SignalAtStep

AREA = "data gone"


def gone_while_running() -> None:
    """The run has read its pairs, and needs the file no more."""
    run_dir, folder = tiny.scratch("gone") / "run", tiny.write_pairs(tiny.scratch("own"))
    done = tiny.run(run_dir, dataset_name=str(folder), probe=Remove(2, folder))
    assert done.code == 0, done.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def gone_before_resuming() -> None:
    run_dir, folder = tiny.scratch("gone") / "run", tiny.write_pairs(tiny.scratch("own"))
    tiny.run(run_dir, dataset_name=str(folder), probe=SignalAtStep(signal.SIGKILL, 3))
    shutil.rmtree(folder)
    done = tiny.run(run_dir, dataset_name=str(folder))
    assert done.code != 0 and str(folder) in done.one_line(), done.text
    tiny.write_pairs(folder)
    again = tiny.run(run_dir, dataset_name=str(folder))
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "the dataset goes while it is trained on", gone_while_running
    yield "the dataset is gone on going on", gone_before_resuming
