"""The data goes, hangs or fails while a run reads it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import Loader, Remove, SignalAtStep

AREA = "data gone, hung or unreadable"


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


def loader(how: str, workers: int, says: str) -> None:
    run_dir = tiny.scratch("loader") / "run"
    settings = {"dataloader_num_workers": workers, "loader_timeout": 3}
    if workers:
        settings["dataloader_multiprocessing_context"] = "fork"
    done = tiny.run(run_dir, probe=Loader(4, how), **settings)
    assert done.code == 1, done.text[-1500:]
    line = done.one_line()
    assert says in line and "the same command" in line, line
    assert workers or "Kept: " in line, line  # a worker fetches ahead: it may fail at step 1
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "the dataset goes while it is trained on", gone_while_running
    yield "the dataset is gone on going on", gone_before_resuming
    yield "the loader hangs", partial(loader, "hangs", 0, "no batch came for 3 s")
    yield "a worker of the loader hangs", partial(loader, "hangs", 1, "no batch came for 3 s")
    yield "the loader's disk is lost", partial(loader, "fails", 0, "cannot be read (OSError")
    yield "a worker's disk is lost", partial(loader, "fails", 1, "cannot be read (OSError")
    yield (
        "a worker of the loader is killed",
        partial(loader, "dies", 1, "of the data loader was killed"),
    )
