"""The look that the figures share, their alternative text, and how one is saved.

Colours are Okabe and Ito's, which people with any of the common colour blindnesses tell apart
(https://jfly.uni-koeln.de/color/); a marker or a dash says the same again.
"""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib.figure import Figure

BLUE, GREEN, VERMILLION, ORANGE = "#0072B2", "#009E73", "#D55E00", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#5F6368"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW, GREY)
CHOSEN, REJECTED, NEUTRAL, ACCENT = GREEN, VERMILLION, GREY, BLUE
CHOSEN_MARK, REJECTED_MARK, NEUTRAL_MARK, ACCENT_MARK = "o", "v", "s", "D"
# Inches: at most 800 px at the 100 dots an inch of a notebook's figure, so that nothing is shrunk.
WIDEST = 8.0
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.markersize": 5,
}


def described(figure: Figure, alt: str) -> Figure:
    """Give `figure` its alternative text, which a screen reader says in its place.

    The text is the figure's label. In a notebook the figure is then shown as an HTML image with
    it, because JupyterLab and nbconvert's default template ignore the `alt` of an image's output
    metadata; that is written as well, for the readers that do look.
    """
    figure.set_label(" ".join(alt.split()))
    _show_alt_text()
    return figure


def _show_alt_text() -> None:
    """Have IPython, if this runs in it, show every figure with its alternative text."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.mimebundle_formatter.for_type(Figure, with_alt_text)


def with_alt_text(figure: Figure) -> tuple[dict, dict]:
    """The figure as IPython's data and metadata: an HTML image, and the PNG it is made of."""
    from IPython.core.pylabtools import print_figure

    alt = figure.get_label()
    if not alt or not figure.axes:
        return {}, {}  # a figure of somebody else's, or an empty one: IPython's own way
    png = print_figure(figure, "png", base64=True)
    image = (
        f'<img alt="{html.escape(alt, quote=True)}" style="max-width:100%" '
        f'src="data:image/png;base64,{png.strip()}">'
    )
    return {"text/html": image, "image/png": png}, {"image/png": {"alt": alt}}


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG at `path`, its alternative text in it, making the folder if need be.

    The text is the PNG's `Description`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Description": figure.get_label()})
