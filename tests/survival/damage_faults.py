"""The newest checkpoint is damaged: the one before it is taken, and a line says why."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.survival import tiny
from tests.survival.probes import SignalAtStep
from tests.survival.resume_faults import interrupted

AREA = "damaged newest checkpoint"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


DAMAGE = {
    "adapter_model.safetensors": ("one bit flipped", flip),
    "optimizer.pt": ("missing", Path.unlink),
    "scheduler.pt": ("cut in half", cut),
    "trainer_state.json": ("empty", empty),
    "whole.json": ("cut in half", cut),
}


def damaged(name: str, kind: Callable[[Path], None]) -> None:
    run_dir = tiny.scratch("damaged") / "run"
    shutil.copytree(interrupted(), run_dir)
    assert {p.name for p in run_dir.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    kind(run_dir / "checkpoint-4" / name)
    done = tiny.run(run_dir, "--resume")
    assert done.code == 0, done.text[-1500:]
    assert "checkpoint-4 is not whole" in done.text and name in done.text, done.text
    assert f"going on from {run_dir / 'checkpoint-2'}" in done.text, done.text
    tiny.same_as_uninterrupted(run_dir)


def all_damaged() -> None:
    run_dir = tiny.scratch("damaged") / "run"
    shutil.copytree(interrupted(), run_dir)
    for folder in run_dir.glob("checkpoint-*"):
        cut(folder / "optimizer.pt")
    done = tiny.run(run_dir, "--resume")
    assert done.code == 1 and "no whole checkpoint" in done.one_line(), done.text


def kept_beside_a_damaged_one() -> None:
    """A damaged checkpoint of a later step does not have the one just written rotated away."""
    run_dir, few = tiny.scratch("damaged") / "run", {"save_total_limit": 1}
    shutil.copytree(interrupted(), run_dir)
    cut(run_dir / "checkpoint-4" / "optimizer.pt")
    stopped = tiny.run(run_dir, probe=SignalAtStep(signal.SIGTERM, 3), **few)
    assert stopped.code == 75 and "checkpoint-3, step 3" in stopped.one_line(), stopped.text
    done = tiny.run(run_dir, **few)
    assert done.code == 0, done.text[-1500:]
    assert f"going on from {run_dir / 'checkpoint-3'}" in done.text, done.text
    tiny.same_as_uninterrupted(run_dir)
    assert [p.name for p in run_dir.glob("checkpoint-*")] == ["checkpoint-6"]


def renamed() -> None:
    """A copy under the name of a later step, and one under a name that is no step's."""
    run_dir = tiny.scratch("renamed") / "run"
    shutil.copytree(interrupted(), run_dir)
    for name in ("checkpoint-99", "kept"):
        shutil.copytree(run_dir / "checkpoint-4", run_dir / name)
    other = tiny.run(run_dir, resume_from_checkpoint=str(run_dir / "kept"))
    assert other.code == 1 and "not named checkpoint-<step>" in other.one_line(), other.text
    done = tiny.run(run_dir)
    assert done.code == 0 and "it is of step 4" in done.text, done.text[-1500:]
    assert f"going on from {run_dir / 'checkpoint-4'}" in done.text, done.text
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for name, (what, kind) in DAMAGE.items():
        yield f"{name} {what}", partial(damaged, name, kind)
    yield "all of them", all_damaged
    yield "copied under other names", renamed
    yield "stopped again once a new one is written", kept_beside_a_damaged_one
