"""Memory is short in a step: one line, and the last finished step is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import ShortMemory

AREA = "memory short"
SAYS = {"torch": "out of main memory", "Python": "out of main memory", "GPU": "out of GPU memory"}


def short(of: str) -> None:
    run_dir = tiny.scratch("memory") / "run"
    done = tiny.run(run_dir, probe=ShortMemory(3, of))
    assert done.code == 1, done.text[-1500:]
    line = done.one_line()
    assert SAYS[of] in line and "checkpoint-3, step 3 of 6" in line, line
    again = tiny.run(run_dir, activation_checkpointing=True)  # as the line says
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for of in SAYS:
        yield f"{of} has no more", partial(short, of)
