"""The figures of the notebooks. Each function takes data and returns a matplotlib figure."""
# ruff: noqa: F401

from scripts.plots.concepts import (
    beta_surface,
    coloured_answers,
    displacement,
    length_hacking,
    loss_curve,
    pipelines,
    quantization,
    spectrum,
)
from scripts.plots.figures import (
    before_after,
    benchmark_chart,
    compared_runs,
    data_check,
    memory_timeline,
    pair_lengths,
    training_curves,
)
from scripts.plots.style import described, save
