"""Memory is noted by phase, and the figures show the data they are given."""

import mmap

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from scripts import plots
from scripts.monitoring.memory import MemoryMonitor


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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


def steps(n: int = 30) -> pd.DataFrame:
    x = np.linspace(0, 1, n)
    return pd.DataFrame(
        {
            "loss": 0.69 - 0.3 * x,
            "rewards/chosen": x,
            "rewards/rejected": -2 * x,
            "rewards/margins": 3 * x,
            "rewards/accuracies": 0.5 + 0.4 * x,
            "learning_rate": 1e-4 * (1 - x),
        },
        index=pd.Index(range(1, n + 1), name="step"),
    )


def test_training_curves_draw_the_history():
    history = steps()
    figure = plots.training_curves(history)
    drawn = [line.get_ydata() for axis in figure.axes for line in axis.lines]
    for column in history:
        assert any(np.array_equal(values, history[column]) for values in drawn), column


def test_memory_timeline_names_the_phases_and_their_peaks():
    frame = pd.DataFrame(
        {"seconds": range(10), "phase": ["load"] * 5 + ["train"] * 5, "gb": [1.0] * 5 + [4.25] * 5}
    )
    texts = [t.get_text() for t in plots.memory_timeline(frame, "GPU memory").axes[0].texts]
    assert texts == ["load\npeak 1.0", "train\npeak 4.2"]


def test_concept_figures_draw_and_save(tmp_path):
    plots.save(plots.pipelines(), tmp_path / "a" / "pipelines.png")
    assert (tmp_path / "a" / "pipelines.png").stat().st_size > 5_000
    loss, push = plots.loss_curve().axes[0].lines[:2]
    at_zero = np.argmin(abs(loss.get_xdata()))
    assert loss.get_ydata()[at_zero] == pytest.approx(np.log(2))
    assert push.get_ydata()[at_zero] == pytest.approx(0.5)
