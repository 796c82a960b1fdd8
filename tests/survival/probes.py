"""What faults do inside a run's process: each is called there before the run begins.

They are classes with their settings as fields, so that they can be sent to the process.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def _prepare(do: Callable) -> None:
    """Have `do(trainer)` called once the trainer is built."""
    from scripts import training

    build = training.build_trainer

    def build_and_do(*arguments):
        trainer = build(*arguments)
        do(trainer)
        return trainer

    training.build_trainer = build_and_do


def _watch(event: str, do: Callable) -> None:
    """Have the trainer call `do(state, **what)` at its event of that name."""
    from transformers import TrainerCallback

    made = {event: lambda self, args, state, control, **what: do(state, **what)}
    _prepare(lambda trainer: trainer.add_callback(type("Probe", (TrainerCallback,), made)))


@dataclass
class SignalAtStep:
    """The process sends itself a signal at an event of a step."""

    signum: int
    step: int
    event: str = "on_step_end"
    group: bool = False  # its children, too

    def __call__(self) -> None:
        if self.group:
            os.setpgrp()

        def strike(state, **_) -> None:
            if state.global_step == self.step:
                (os.killpg if self.group else os.kill)(os.getpid(), self.signum)

        _watch(self.event, strike)


@dataclass
class BreakOutput:
    """From a step on, the process's output is a pipe that nobody reads."""

    step: int

    def __call__(self) -> None:
        def strike(state, **_) -> None:
            if state.global_step == self.step:
                reader, writer = os.pipe()
                os.close(reader)
                os.dup2(writer, 1)

        _watch("on_step_end", strike)


@dataclass
class KillInSave:
    """SIGKILL at the n-th call of a function that the saving of checkpoints makes."""

    module: str
    name: str
    call: int
    after: bool = False

    def __call__(self) -> None:
        import importlib

        owner = importlib.import_module(self.module)
        if "." in self.name:
            kind, name = self.name.split(".")
            owner = getattr(owner, kind)
        else:
            name = self.name
        real, count = getattr(owner, name), [0]

        def counted(*args, **kwargs):
            count[0] += 1
            if count[0] == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if count[0] == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, counted)


@dataclass
class NotFinite:
    """At a step, something becomes infinite or NaN: `where` is rate, gradient or weights."""

    step: int
    where: str

    def __call__(self) -> None:
        def strike(state, optimizer=None, model=None, **_) -> None:
            if state.global_step != self.step:
                return
            weight = next(p for p in model.parameters() if p.requires_grad)
            if self.where == "rate":
                optimizer.param_groups[0]["lr"] = math.inf
            elif self.where == "gradient":
                weight.register_hook(lambda gradient: gradient * math.nan)
            else:
                weight.data.fill_(math.nan)

        _watch("on_step_begin", strike)


@dataclass
class SmallFiles:
    """From an event of a step on, no file can grow beyond so many bytes."""

    step: int
    event: str
    size: int

    def __call__(self) -> None:
        def strike(state, **_) -> None:
            if state.global_step == self.step:
                limit_files(self.size)

        _watch(self.event, strike)


def limit_files(size: int) -> None:
    """setrlimit(2): a longer write fails with EFBIG, as one on a full disk does with ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@dataclass
class SmallFilesAtOnce:
    """The same from the start."""

    size: int

    def __call__(self) -> None:
        limit_files(self.size)


@dataclass
class ShortMemory:
    """In a step, more memory is asked for than there is: of torch, Python or (raised) the GPU."""

    step: int
    of: str

    def __call__(self) -> None:
        import torch

        def ask(state, model=None, **_) -> None:
            if state.global_step == self.step:
                model.register_forward_pre_hook(lambda *_: take())

        def take() -> None:
            if self.of == "GPU":  # what torch raises, where a GPU would have raised it
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + 2**28
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            torch.ones(2**28) if self.of == "torch" else bytearray(2**30)

        _watch("on_step_begin", ask)


@dataclass
class Remove:
    """At a step, a file or folder goes."""

    step: int
    path: Path

    def __call__(self) -> None:
        def strike(state, **_) -> None:
            if state.global_step == self.step:
                shutil.rmtree(self.path)

        _watch("on_step_end", strike)
