"""The headless notebook is stopped, or its kernel is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import nbformat
import psutil

from tests.survival import tiny

AREA = "headless notebook stopped or killed"
SETTINGS = {
    "max_steps": 300, "save_steps": 5, "max_new_tokens": 4, "warmup_steps": 0,
    "generation_batch_size": 4,
}  # fmt: skip


def strike(signum: int, whom: str, expected: int, *words: str) -> None:
    """Signal the command or its kernel at step 20, and look at terminal and notebook."""
    run_dir = tiny.scratch("kernel") / "run"
    started = tiny.start(run_dir, command="run", **SETTINGS)
    started.wait_for("step   20/300")
    kernels = [
        p for p in psutil.Process(started.process.pid).children() if "ipykernel" in str(p.cmdline())
    ]
    os.kill(kernels[0].pid if whom == "kernel" else started.process.pid, signum)
    done = started.end()
    assert done.code == expected, (done.code, done.text[-1500:])
    top = nbformat.read(run_dir / "notebook.ipynb", as_version=4).cells[0].source
    for text in (done.text, top):
        assert "Traceback" not in text, text[-1500:]
        for word in (*words, f"{run_dir}/checkpoint-"):
            assert word in text, (word, text[-1500:])
    assert not kernels[0].is_running()


def kernel_killed() -> None:
    strike(signal.SIGKILL, "kernel", 1, "kernel was killed", "python -m scripts.plan")


def command_terminated() -> None:
    strike(signal.SIGTERM, "command", 75, "stopped by SIGTERM", "the same command goes on")


def command_interrupted() -> None:
    strike(signal.SIGINT, "command", 130, "stopped by Ctrl-C", "the same command goes on")


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "the kernel is killed, as for lack of memory", kernel_killed
    yield "SIGTERM to the command", command_terminated
    yield "Ctrl-C in the terminal", command_interrupted
