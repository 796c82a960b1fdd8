"""The figures of the notebooks. Each function takes data and returns a matplotlib figure."""

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

__all__ = [
    "before_after",
    "benchmark_chart",
    "beta_surface",
    "coloured_answers",
    "compared_runs",
    "data_check",
    "described",
    "displacement",
    "length_hacking",
    "loss_curve",
    "memory_timeline",
    "pair_lengths",
    "pipelines",
    "quantization",
    "save",
    "spectrum",
    "training_curves",
]
