"""Stopped from outside: a checkpoint at once, a code of its own, and the same result later."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import BreakOutput, SignalAtStep

AREA = "SIGTERM and Ctrl-C"
CODES = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGHUP: 75}


def stopped(signum: int, step: int, event: str, settings: dict) -> None:
    run_dir = tiny.scratch("stopped") / "run"
    group = "dataloader_num_workers" in settings
    done = tiny.run(run_dir, probe=SignalAtStep(signum, step, event, group), **settings)
    assert done.code == CODES[signum], done.text[-1500:]
    line = done.one_line()
    assert f"Kept: {run_dir}/checkpoint-" in line and "the same command goes on" in line, line
    assert not (run_dir / "adapter").exists()
    again = tiny.run(run_dir, **settings)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir, **settings)


def before_the_first_step() -> None:
    run_dir = tiny.scratch("stopped") / "run"
    done = tiny.run(run_dir, probe=SignalAtStep(signal.SIGTERM, 0, "on_train_begin"))
    assert done.code == 75 and "No checkpoint is kept" in done.one_line(), done.text
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def unread() -> None:
    """What the output was piped to has gone, as after `| head`."""
    run_dir = tiny.scratch("unread") / "run"
    done = tiny.run(run_dir, probe=BreakOutput(3))
    assert done.code == 141, done.text[-1500:]
    assert f"Kept: {run_dir}/checkpoint-" in done.one_line(), done.text
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for where, step, event, settings in (
        ("between two steps", 3, "on_step_end", {}),
        ("in a step", 3, "on_step_begin", {}),
        ("in a step of two parts", 2, "on_substep_end",
         {"gradient_accumulation_steps": 2, "max_steps": 4}),
        ("at the start of a pass", 4, "on_epoch_begin", {}),
        ("in evaluation", 2, "on_prediction_step", {"eval_strategy": "steps", "eval_steps": 2}),
        ("in a run that keeps no checkpoints", 3, "on_step_end", {"save_strategy": "no"}),
        ("with the loader's workers", 3, "on_step_end",
         {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}),
        ("in the last step", 6, "on_step_end", {}),
    ):  # fmt: skip
        yield f"SIGTERM {where}", partial(stopped, signal.SIGTERM, step, event, settings)
    logs = {"logging_steps": 3}
    yield "SIGINT between two logs", partial(stopped, signal.SIGINT, 5, "on_step_end", logs)
    yield "SIGTERM before the first step", before_the_first_step
    yield "SIGHUP between two steps", partial(stopped, signal.SIGHUP, 3, "on_step_end", {})
    yield "the output's reader goes", unread
