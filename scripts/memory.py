"""Watch memory over a run, phase by phase: GPU memory where there is a GPU, else the process's."""

from __future__ import annotations

import ctypes
import sys
import threading
import time

import pandas as pd
import psutil
import torch

GB = 1024**3


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next allocation, instead of returning each to the system.

    Torch on a CPU frees and asks for hundreds of MB at every operation; by default each such block
    is mapped, faulted in page by page and unmapped again, which can take as long as the arithmetic.
    On anything but Linux with glibc this does nothing. See mallopt(3).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            m_trim_threshold, m_mmap_max = -1, -4
            libc.mallopt(m_mmap_max, 0)
            libc.mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Give the blocks that `keep_freed_memory` kept back to the system."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class MemoryMonitor:
    """A background thread that notes the memory in use a few times a second.

    On a GPU it notes what torch has allocated there, with torch's own peak counter so that no
    spike between two looks is missed; on a CPU, the resident memory of this process.

    Example:
        >>> monitor = MemoryMonitor()
        >>> monitor.phase("load")      # everything from here on counts as "load"
        >>> monitor.now()              # GB in use
        >>> monitor.table()            # peak by phase
        >>> monitor.stop()
    """

    def __init__(self, interval: float = 0.25) -> None:
        self.cuda = torch.cuda.is_available()
        self.kind = "GPU memory" if self.cuda else "process memory"
        self._process = psutil.Process()
        self._rows: list[tuple[float, str, float]] = []
        self._phase = "start"
        self._start = time.monotonic()
        self._stopped = threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> float:
        """GB in use at this moment."""
        used = torch.cuda.memory_allocated() if self.cuda else self._process.memory_info().rss
        return used / GB

    def phase(self, name: str) -> None:
        """Count what follows as the phase `name`."""
        self._note()
        self._phase = name
        self._note()

    def _note(self) -> None:
        used = self.now()
        if self.cuda:
            used = max(used, torch.cuda.max_memory_allocated() / GB)
            torch.cuda.reset_peak_memory_stats()
        self._rows.append((time.monotonic() - self._start, self._phase, used))

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._note()

    def frame(self) -> pd.DataFrame:
        """All that was noted: `seconds` since the start, `phase`, `gb`."""
        return pd.DataFrame(list(self._rows), columns=["seconds", "phase", "gb"])

    def table(self) -> pd.DataFrame:
        """One row a phase, in order: its peak in GB and how long it took in seconds."""
        frame = self.frame()
        phases = frame.groupby("phase", sort=False)
        span = phases["seconds"].agg(lambda s: s.max() - s.min())
        return pd.DataFrame({"peak GB": phases["gb"].max().round(2), "seconds": span.round(1)})

    def stop(self) -> pd.DataFrame:
        """End the thread and return the `frame`."""
        self._note()
        self._stopped.set()
        self._thread.join()
        return self.frame()
