"""The figures of the notebooks. Each function takes data and returns a matplotlib figure."""

from scripts.plots.benchmark import benchmark
from scripts.plots.concepts import loss_curve, pipelines
from scripts.plots.data import data_check, pair_lengths
from scripts.plots.evaluation import before_after
from scripts.plots.lessons import (
    beta_surface,
    displacement,
    head_memory,
    length_hacking,
    quantization,
    spectrum,
)
from scripts.plots.memory import memory_timeline, plan_memory
from scripts.plots.style import described, save
from scripts.plots.tokens import coloured_answers
from scripts.plots.training import compared_runs, training_curves

__all__ = [
    "before_after",
    "benchmark",
    "beta_surface",
    "coloured_answers",
    "compared_runs",
    "data_check",
    "described",
    "displacement",
    "head_memory",
    "length_hacking",
    "loss_curve",
    "memory_timeline",
    "pair_lengths",
    "pipelines",
    "plan_memory",
    "quantization",
    "save",
    "spectrum",
    "training_curves",
]
