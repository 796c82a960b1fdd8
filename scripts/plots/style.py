"""The look that the figures share, and how one is saved."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

CHOSEN, REJECTED, NEUTRAL, ACCENT = "#1b7f5c", "#c0392b", "#6b7280", "#2b5fb3"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
}


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG at `path`, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
