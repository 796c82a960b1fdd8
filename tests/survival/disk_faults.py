"""No room for a file, at each step that writes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import SmallFiles, SmallFilesAtOnce

AREA = "disk full"


def full(probe, kept: int | None) -> None:
    run_dir = tiny.scratch("full") / "run"
    done = tiny.run(run_dir, probe=probe)
    assert done.code == 1, done.text[-1500:]
    line = done.one_line()
    assert "the disk is full" in line, line
    if kept is not None:
        assert (run_dir / f"checkpoint-{kept}" / "whole.json").exists(), line
    assert not (run_dir / "adapter").exists()
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    assert (kept is not None) == ("going on from" in again.text), again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "the run's config", partial(full, SmallFilesAtOnce(100), None)
    yield "the first line of the log", partial(full, SmallFiles(0, "on_step_begin", 100), None)
    yield "a later line of the log", partial(full, SmallFiles(3, "on_step_begin", 100), 2)
    yield "the first checkpoint", partial(full, SmallFiles(1, "on_step_end", 4000), None)
    for what, size in (("weights", 9_000), ("optimiser", 25_000)):
        probe = SmallFiles(3, "on_step_end", size)
        yield f"a later checkpoint's {what}", partial(full, probe, 2)
    yield "the adapter", partial(full, SmallFiles(6, "on_train_end", 4000), 6)
