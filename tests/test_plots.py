"""The figures show the data they are given, and can be read by everybody."""

import inspect
import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from scripts import plots
from scripts.base import ROOT
from scripts.pairs.checks import Report
from scripts.plots.style import with_alt_text


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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


def test_the_dpo_term_is_drawn_apart_with_the_line_at_ln_2():
    history = steps().assign(loss=lambda h: h["loss"] + 1.3)
    loss = plots.training_curves(history).axes[0]
    assert not any(np.allclose(line.get_ydata(), np.log(2)) for line in loss.lines)
    history["loss/dpo"], history["loss/sft"] = history["loss"] - 1.3, 1.3
    figure = plots.training_curves(history)
    loss, last = figure.axes[0], figure.axes[3]
    assert any(np.array_equal(line.get_ydata(), history["loss/dpo"]) for line in loss.lines)
    assert any(np.allclose(line.get_ydata(), np.log(2)) for line in loss.lines)
    assert not any(np.array_equal(line.get_ydata(), history["loss"]) for line in loss.lines)
    assert last.get_ylabel() == "nats a token"
    assert "DPO term from 0.69" in figure.get_label()


def every_figure() -> dict:
    """A figure of each kind, over made-up data of the right shape."""
    frame = pd.DataFrame({"seconds": range(10), "phase": ["load"] * 10, "gb": [1.0] * 10})
    lengths = pd.DataFrame({"chosen": [3, 4, 5], "rejected": [9, 9, 12]})
    share = {"mean": 0.5, "low": 0.4, "high": 0.6}
    replies = pd.DataFrame({f"{w}_{k}": [v, v] for w in ("base", "tuned")
                            for k, v in (("length", 9), ("finished", True))})  # fmt: skip
    evaluation = {"shorter": {"mean": 0.1},
                  "measures": {"finished": {"base": share, "tuned": share}}}  # fmt: skip
    run = {"rates": [1.0], "peak_gb": [2.0], "pairs_per_second": 1.0}
    case = {"trl": [run], "shared": [run]}
    lessons = json.loads((ROOT / "notebooks" / "lessons.json").read_text())
    return {
        "training_curves": plots.training_curves(steps()),
        "compared_runs": plots.compared_runs({"a": steps(), "b": steps()}),
        "memory_timeline": plots.memory_timeline(frame, "process memory"),
        "pipelines": plots.pipelines(),
        "loss_curve": plots.loss_curve(),
        "pair_lengths": plots.pair_lengths(lengths),
        "data_check": plots.data_check(Report([], {"train": 1}, {"train": np.ones((1, 3))}, 160)),
        "before_after": plots.before_after(evaluation, replies),
        "benchmark_chart": plots.benchmark_chart(
            {"cases": {"a": case}, "growth": {"prompt": {"64/1/1x2": case}}}
        ),
        "beta_surface": plots.beta_surface(),
        "displacement": plots.displacement(lessons),
        "length_hacking": plots.length_hacking(lessons),
        "quantization": plots.quantization(
            np.zeros((2, 64)), {"NF4": np.zeros(16)}, {"int4": (0.1, 4.5)}
        ),
        "spectrum": plots.spectrum({"q": np.array([1.0, 0.5])}),
    }  # fmt: skip


def test_every_figure_has_alternative_text_units_and_is_readable_at_800_pixels():
    figures = every_figure()
    drawn = {name for name, made in vars(plots).items() if inspect.isfunction(made)}
    assert {*figures} == drawn - {"save", "described", "coloured_answers"}
    for name, figure in figures.items():
        assert len(figure.get_label()) > 40, name
        width, _ = figure.get_size_inches()
        assert width * 100 <= 800, name  # a notebook's figure has 100 dots an inch
        figure.canvas.draw()
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                assert text.get_fontsize() >= 8, (name, text.get_text())
        for axis in figure.axes:
            if axis.axison and len(axis.lines) + len(axis.patches) > 0:
                assert axis.get_xlabel() or axis.get_ylabel(), name


def test_a_saved_figure_and_a_shown_one_carry_their_text(tmp_path):
    figure = plots.described(plt.subplots(figsize=(1, 1))[0], 'A "small"  figure')
    plots.save(figure, tmp_path / "small.png")
    assert Image.open(tmp_path / "small.png").text["Description"] == 'A "small" figure'
    data, metadata = with_alt_text(figure)
    assert data["text/html"].startswith('<img alt="A &quot;small&quot; figure"')
    assert metadata == {"image/png": {"alt": 'A "small" figure'}}
    assert with_alt_text(plt.subplots(figsize=(1, 1))[0]) == ({}, {})


def test_a_notebook_shows_a_figure_with_its_text(tmp_path):
    """In a real kernel, and as nbconvert's default page: the two places where it is read."""
    code = "from scripts import plots\nplots.loss_curve();"
    notebook = new_notebook(cells=[new_code_cell(code)])
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    images = re.findall(r"<img[^>]*?alt=\"([^\"]*)\"", page)
    assert images == [plots.loss_curve().get_label()]
    (output,) = notebook.cells[0].outputs
    assert output.metadata["image/png"]["alt"] == images[0]
