"""Ask several things at a time of something slow, and lose nothing that was answered."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

GRACE = 10.0  # seconds for what is under way when another job has failed
STOP = object()


def several_at_a_time(
    ask: Callable[[Any], Any], jobs: list, workers: int
) -> Iterator[tuple[Any, Any]]:
    """(job, `ask(job)`) for each of `jobs`, as the answers come in.

    After an error no further job is begun, those under way have `GRACE` seconds, and then it is
    raised. Ctrl-C is taken in turn: answers that were there before it are given, then
    `KeyboardInterrupt` is raised at once. The threads are daemons, so that none that waits for a
    server keeps the process; `ThreadPoolExecutor` would wait for all of them.
    """
    if workers == 1:
        for job in jobs:
            yield job, ask(job)
        return
    todo, done, stop = SimpleQueue(), SimpleQueue(), threading.Event()
    for job in jobs:
        todo.put(job)

    def work() -> None:
        try:
            while not stop.is_set():
                job = todo.get_nowait()
                done.put((job, ask(job)))
        except Empty:
            pass
        except Exception as error:
            done.put(error)
        finally:
            done.put(None)

    running, failed = min(workers, len(jobs)), None
    with _interrupts_to(done):
        try:
            for _ in range(running):
                threading.Thread(target=work, daemon=True).start()
            while running:
                item = done.get(timeout=GRACE if failed else None)
                if item is STOP:
                    raise KeyboardInterrupt
                elif item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    failed = failed or item
                    stop.set()
                else:
                    yield item
        except Empty:
            pass
        finally:
            stop.set()
    if failed:
        raise failed


@contextmanager
def _interrupts_to(queue: SimpleQueue) -> Iterator[None]:
    """Meanwhile Ctrl-C puts `STOP` into `queue`, in place of an exception anywhere at all."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as in the background of a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGINT, lambda *_: queue.put(STOP))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
