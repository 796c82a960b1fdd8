"""Killed or stopped while a checkpoint is written: the newest whole one is taken."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import KillInSave

AREA = "killed inside a checkpoint's save"
# Functions that write a checkpoint, and at which of their calls the second save (step 4) is hit. A
# save calls torch.save four times: for the arguments, optimiser, schedule and random state.
POINTS = {
    "as the weights are written": ("peft.PeftModel", "save_pretrained", 2, False),
    "as the optimiser is written": ("torch", "save", 6, False),
    "as the schedule is written": ("torch", "save", 7, False),
    "as the random state is written": ("torch", "save", 8, False),
    "as the trainer's state is written": (
        "transformers.trainer_callback.TrainerState", "save_to_json", 2, False
    ),
    "before the marker": ("scripts.checkpoints", "seal", 2, False),
    "after the marker": ("scripts.checkpoints", "seal", 2, True),
    "before old ones go": ("scripts.checkpoints", "rotate_checkpoints", 2, False),
    "amid the first save of all": ("torch", "save", 2, False),
}  # fmt: skip


def killed(owner: str, name: str, call: int, after: bool) -> None:
    module, _, kind = owner.rpartition(".")
    if kind[0].isupper():
        owner, name = module, f"{kind}.{name}"
    run_dir = tiny.scratch("save") / "run"
    done = tiny.run(run_dir, probe=KillInSave(owner, name, call, after), save_total_limit=1)
    assert done.code == -signal.SIGKILL, done.text[-1500:]
    whole = [p for p in run_dir.glob("checkpoint-*") if (p / "whole.json").exists()]
    assert whole or (call < 3 and name == "save"), f"no checkpoint is left in {run_dir}"
    again = tiny.run(run_dir, save_total_limit=1)
    assert again.code == 0, again.text[-1500:]
    assert bool(whole) == ("going on from" in again.text), again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for where, point in POINTS.items():
        yield f"SIGKILL {where}", partial(killed, *point)
