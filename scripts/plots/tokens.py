"""An answer, every token coloured by its log-ratio: where the implicit reward comes from."""

from __future__ import annotations

import html
from collections.abc import Sequence

from scripts.plots.style import BLUE, VERMILLION

# Behind the text, at most so opaque: it stays readable on a light and on a dark page.
STRONGEST = 0.55


def coloured_tokens(tokens: Sequence[str], ratios: Sequence[float], scale: float) -> str:
    """HTML of `tokens`, each on blue where its log-ratio is above 0, on vermillion where below.

    The sign is told twice, for whoever does not see the colours: a solid line under a token that
    became more probable, a dotted one under one that became less. A token's log-ratio, in nats,
    stands in its tooltip. At `scale` nats the colour is at its strongest.
    """
    return "".join(_token(t, float(r), scale) for t, r in zip(tokens, ratios, strict=True))


def _token(text: str, ratio: float, scale: float) -> str:
    strength = min(abs(ratio) / scale, 1.0) if scale else 0.0
    shown = html.escape(text).replace("\n", "↵<br>")
    if strength < 0.02:
        return f'<span title="{ratio:+.2f} nats">{shown}</span>'
    colour, line = (BLUE, "solid") if ratio > 0 else (VERMILLION, "dotted")
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    style = (
        f"background-color:rgba({red},{green},{blue},{STRONGEST * strength:.2f});"
        f"border-bottom:2px {line} {colour}"
    )
    return f'<span title="{ratio:+.2f} nats" style="{style}">{shown}</span>'


def coloured_answers(rows: dict[str, tuple[Sequence[str], Sequence[float]]], scale: float) -> str:
    """Answers one below the other, each `{title: (tokens, log-ratios)}`, with its sum and a legend.

    Example:
        >>> HTML(coloured_answers({"chosen, after": (tokens, hand.log_ratios("chosen"))}, scale=2))
    """
    parts = [
        '<div style="text-align:left;line-height:1.8;max-width:60em">'
        "<p>log π − log π<sub>ref</sub> of each token: "
        + _token(" more probable than before ", scale, scale)
        + " · "
        + _token(" less probable ", -scale, scale)
        + f" (strongest at {scale:g} nats; hold the pointer over a token for its number)</p>"
    ]
    for title, (tokens, ratios) in rows.items():
        total = float(sum(float(r) for r in ratios))
        parts.append(
            f"<p><b>{html.escape(title)}</b>, {len(tokens)} tokens, sum {total:+.2f} nats<br>"
            f"{coloured_tokens(tokens, ratios, scale)}</p>"
        )
    return "".join(parts) + "</div>"
