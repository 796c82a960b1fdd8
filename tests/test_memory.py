"""Memory is noted by phase."""

import mmap

from scripts.memory import MemoryMonitor


def test_a_phase_shows_the_memory_it_took():
    monitor = MemoryMonitor(interval=0.01)
    before = monitor.now()
    monitor.phase("big")
    block = mmap.mmap(-1, 100 * 1024**2)  # straight from the system: no block that was kept
    block.write(b"x" * len(block))
    monitor.phase("after")
    block.close()
    table = monitor.table()
    frame = monitor.stop()
    assert list(table.index) == ["start", "big", "after"]
    assert table.loc["big", "peak GB"] >= before + 0.09
    assert frame["seconds"].is_monotonic_increasing
    assert len(frame) == len(monitor.frame())  # the thread has ended
