"""The DPO loss over both log-ratios with beta on a slider, for a running notebook."""

from __future__ import annotations

import numpy as np
from ipywidgets import HTML, SelectionSlider, VBox
from matplotlib import pyplot as plt

from scripts.plots.lessons import beta_surface
from scripts.plots.style import with_alt_text

BETAS = (0.05, 0.1, 0.2, 0.5)


class Moved(VBox):
    """A box whose text, where no widget can be shown, is short."""

    def __repr__(self) -> str:
        return "A slider for beta: it moves while the notebook runs."


def beta_slider(points: dict[str, list[float]], betas: tuple[float, ...] = BETAS) -> Moved:
    """A slider, and under it the surface at its place, drawn anew when it moves.

    `points` are the log-ratios of held-out pairs, `{"chosen": [...], "rejected": [...]}` in nats.
    Where no kernel runs nothing moves: show `plots.beta_surface` beside it.
    """
    slider = SelectionSlider(options=betas, value=0.1, description="beta")
    picture = HTML()

    def draw(_: dict | None = None) -> None:
        figure = beta_surface((slider.value,), points)
        image = with_alt_text(figure)[0]["text/html"]
        plt.close(figure)
        picture.value = f"<p>{in_words(slider.value, points)}</p>{image}"

    draw()
    slider.observe(draw, "value")
    return Moved([slider, picture])


def in_words(beta: float, points: dict[str, list[float]]) -> str:
    """What `beta` makes of the pairs: their mean loss and weight, and how far a pair has to go."""
    margin = beta * (np.array(points["chosen"]) - np.array(points["rejected"]))
    loss, weight = np.logaddexp(0, -margin).mean(), (1 / (1 + np.exp(margin))).mean()
    return (
        f"beta {beta:g}: a loss of 0.1 takes log-ratios that are {nats_apart(beta):.1f} nats "
        f"apart. These pairs: mean loss {loss:.2f} nats, mean weight of the gradient {weight:.2f}."
    )


def nats_apart(beta: float, loss: float = 0.1) -> float:
    """How far apart the log-ratios of a pair must be for this DPO loss, in nats: eq. 7, solved."""
    return float(-np.log(np.expm1(loss)) / beta)
