"""The figures of the notebooks. Each function takes data and returns a matplotlib figure."""

from scripts.plots.benchmark import benchmark
from scripts.plots.concepts import loss_curve, pipelines
from scripts.plots.data import data_check, pair_lengths
from scripts.plots.evaluation import before_after
from scripts.plots.memory import memory_timeline, plan_memory
from scripts.plots.style import save
from scripts.plots.training import training_curves

__all__ = [
    "before_after",
    "benchmark",
    "data_check",
    "loss_curve",
    "memory_timeline",
    "pair_lengths",
    "pipelines",
    "plan_memory",
    "save",
    "training_curves",
]
