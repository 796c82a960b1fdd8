"""The newest checkpoint is damaged: the one before it is taken, and a line says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.survival import tiny
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


KINDS = {"cut in half": cut, "empty": empty, "one bit flipped": flip, "missing": Path.unlink}
FILES = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "whole.json",
)  # fmt: skip


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


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in FILES:
        for what, kind in KINDS.items():
            if (name, what) != ("whole.json", "one bit flipped"):  # its digests then differ or not
                yield f"{name} {what}", partial(damaged, name, kind)
    yield "all of them", all_damaged
