"""The benchmark counts what a step really went through, and shows what it measured."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

from scripts import plots
from scripts.base import RecipeError
from scripts.benchmark import (
    MEASURED,
    StepRecorder,
    against_best,
    benchmark_summary,
    measure,
    profile,
    require_sharing,
    table,
    trl_attentions,
)

CONFIG = "configs/smollm2-135m-cpu.yaml"


def test_a_step_of_several_batches_counts_all_its_pairs(tiny_trainer):
    """Two steps of two batches of one pair: every pair of the data once, by its own lengths."""
    trainer = tiny_trainer(per_device_train_batch_size=1, gradient_accumulation_steps=2)
    recorder = StepRecorder(trainer)
    trainer.train()
    steps = recorder.lengths()
    assert [len(pairs) for pairs in steps] == [2, 2]
    assert len(recorder.seconds) == 2
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = sorted(tuple(len(row[name]) for name in names) for row in trainer.train_dataset)
    cut = trainer.args.max_length
    rows = [(p, min(c, cut - p), min(r, cut - p)) for p, c, r in rows]
    assert sorted(map(tuple, np.concatenate(steps).tolist())) == rows


def test_the_data_case_divides_all_pairs_of_a_step_by_its_time(tiny_cfg):
    given = tiny_cfg(per_device_train_batch_size=1, gradient_accumulation_steps=3).given
    result = measure(CONFIG, given, "data", None)
    # Four pairs: a step takes the first three, the next the one that is left, and so on.
    assert result["step_pairs"] == [1, 3, 1]
    assert len(result["seconds"]) == MEASURED
    pairs = zip(result["step_pairs"], result["seconds"], strict=True)
    assert result["rates"] == pytest.approx([n / seconds for n, seconds in pairs])
    assert result["pairs_per_second"] == sorted(result["rates"])[1]
    assert 0 < result["share_of_limit"] < 1
    assert result["peak_gb"] > 0


def test_the_size_of_a_case_is_that_of_its_batches(tiny_cfg):
    given = tiny_cfg(gradient_accumulation_steps=2).given
    assert measure(CONFIG, given, "8/4/6x3", "eager")["step_pairs"] == [3] * MEASURED


def test_a_trainer_that_went_trls_way_is_not_measured_as_prefix_sharing(tiny_run):
    trainer, cfg = tiny_run(torch_compile=True)
    assert trainer.refusal
    with pytest.raises(RecipeError, match="nothing is measured: prefix_sharing: torch_compile"):
        require_sharing(trainer, cfg)
    cfg.recipe.prefix_sharing = False
    require_sharing(trainer, cfg)


def test_both_attentions_of_a_cpu_are_tried():
    assert trl_attentions()[:2] == ["eager", "sdpa"]


def run(*rates: float, gb: float = 1.0) -> dict:
    middle = sorted(rates)[len(rates) // 2]
    return {"pairs_per_second": middle, "rates": list(rates), "peak_gb": gb,
            "share_of_limit": 0.1, "limit_tflops": 2.0}  # fmt: skip


@pytest.fixture
def ways():
    """Two processes each; eager is the faster of TRL's, and one of its processes failed."""
    return {
        "eager": [run(1.0, 2.0, 3.0, gb=8.0), {"error": "out of memory"}],
        "sdpa": [run(1.0, 1.0, 1.0), run(1.0, 1.0, 9.0)],
        "shared": [run(4.0, 5.0, 6.0, gb=2.0), run(4.0, 8.0, 9.0, gb=4.0)],
    }


def test_the_fastest_attention_is_the_baseline_and_is_named(ways):
    best = against_best(ways)
    assert [one["attention"] for one in best["trl"]] == ["eager", "eager"]
    ways["eager"] = [{"error": "no"}]
    assert against_best(ways)["trl"][0]["attention"] == "sdpa"


def test_the_table_has_medians_ranges_and_ratios(ways):
    row = table({"a": against_best(ways)}).loc["a"]
    assert row["TRL attention"] == "eager"
    assert (row["pairs_per_second trl"], row["range trl"]) == (2.0, "1.00-3.00")
    assert (row["pairs_per_second shared"], row["range shared"]) == (5.5, "4.00-9.00")
    assert row["speed"] == 2.75
    assert (row["peak_gb trl"], row["peak_gb shared"], row["memory"]) == (8.0, 3.0, 0.375)
    assert "2.00 pairs/s (1.00-3.00)" in benchmark_summary(ways["eager"][0])
    assert benchmark_summary(ways["eager"][1]) == "failed: out of memory"


def test_the_figure_draws_medians_and_their_ranges(ways):
    case = against_best(ways)
    growth = {"prompt": {"64/1/1x2": case, "128/1/1x2": case}}
    figure = plots.benchmark_chart({"cases": {"a": case}, "growth": growth})
    speed, memory, seconds = figure.axes
    assert [bar.get_width() for bar in speed.patches] == [2.0, 5.5]
    assert [bar.get_width() for bar in memory.patches] == [8.0, 3.0]
    ends = [line.get_segments()[0][:, 0].tolist() for line in speed.collections]
    assert ends == [[1.0, 3.0], [4.0, 9.0]]
    assert [line.get_xdata().tolist() for line in seconds.lines] == [[64, 128]] * 2
    assert seconds.lines[0].get_ydata().tolist() == [0.5, 0.5]
    plt.close(figure)


def test_a_profile_tells_where_the_time_goes(tiny_cfg):
    table = profile(CONFIG, tiny_cfg().given, "8/4/4x1")
    assert "aten::mm" in table and "Self CPU time total" in table
