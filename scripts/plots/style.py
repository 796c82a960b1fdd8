"""The look that the figures share, their alternative text, and how one is saved.

Colours are Okabe and Ito's, which people with any of the common colour blindnesses tell apart
(https://jfly.uni-koeln.de/color/); a marker or a dash says the same again.
"""

from __future__ import annotations

import html
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

BLUE, GREEN, VERMILLION, ORANGE = "#0072B2", "#009E73", "#D55E00", "#E69F00"
SKY, PURPLE, YELLOW, GREY = "#56B4E9", "#CC79A7", "#F0E442", "#5F6368"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW, GREY)
CHOSEN, REJECTED, NEUTRAL, ACCENT = GREEN, VERMILLION, GREY, BLUE
CHOSEN_MARK, REJECTED_MARK, NEUTRAL_MARK, ACCENT_MARK = "o", "v", "s", "D"
# A figure is at most 8 inches wide: 800 px at a notebook's 100 dots an inch, so nothing is shrunk.
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}

# Begin the backend now: its first figure makes a notebook show figures, and inside `rc_context`
# that would be undone at the context's end, so that later figures were not shown.
plt.switch_backend(plt.get_backend())


def described(figure: Figure, alt: str) -> Figure:
    """Give `figure` its alternative text, which a screen reader says in its place.

    The text is the figure's label. In a notebook the figure is then shown as an HTML image with
    it, because JupyterLab and nbconvert's default template ignore the `alt` of an image's output
    metadata; that is written as well, for the readers that do look.
    """
    from IPython import get_ipython

    figure.set_label(" ".join(alt.split()))
    if shell := get_ipython():
        shell.display_formatter.mimebundle_formatter.for_type(Figure, with_alt_text)
    return figure


def with_alt_text(figure: Figure) -> tuple[dict, dict]:
    """The figure as IPython's data and metadata: an HTML image, and the PNG it is made of."""
    from IPython.core.pylabtools import print_figure

    alt = figure.get_label()
    if not alt or not figure.axes:
        return {}, {}  # somebody else's figure, or an empty one: IPython's own way
    png = print_figure(figure, "png", base64=True)
    image = (
        f'<img alt="{html.escape(alt, quote=True)}" style="max-width:100%" '
        f'src="data:image/png;base64,{png.strip()}">'
    )
    return {"text/html": image, "image/png": png}, {"image/png": {"alt": alt}}


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as a PNG, its alternative text in it as the PNG's `Description`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Description": figure.get_label()})
