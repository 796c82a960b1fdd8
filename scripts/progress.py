"""How far something is: a bar and a line redrawn in place in a notebook, else printed lines."""

from __future__ import annotations

import html
import time

from IPython.display import DisplayHandle, display

from scripts.base import in_notebook

LINES = 10.0  # seconds between two printed lines, unless a caller asks for one
REDRAWS = 0.5  # seconds between two looks of a bar
LINE = "printed_line"  # in an update's metadata: a headless run prints it


class Progress:
    """One bar of `total` with a line of text below it.

    A notebook shows it from the first `show` on, or, if that comes within `patience` seconds of the
    start, from the first one after them; what is through by then is not shown at all. The line is
    kept with the notebook as it was last, without the bar once all is done. Outside a notebook the
    text is printed now and then, and when all is done.

    Example:
        >>> bar = Progress(len(rows))
        >>> bar.show(3, f"3/{len(rows)} rows")
    """

    def __init__(self, total: float, patience: float = 0.0) -> None:
        self.total, self._patience = total, patience
        self._handle: DisplayHandle | None = None
        self._shown = False
        self._began = self._lined = time.monotonic()
        self._drawn = -REDRAWS

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def show(self, done: float, text: str, line: bool | None = None) -> None:
        """Redraw: `done` of the total. `line` says whether a line is printed where lines are; None:
        if the last one is long ago, or all is done."""
        now, through = time.monotonic(), done >= self.total
        if now - self._began < self._patience or (through and self._patience and not self._shown):
            return
        if line is None:
            line = through or now - self._lined >= LINES
        if line:
            self._lined = now
        elif now - self._drawn < REDRAWS and self._handle:
            return
        self._drawn = now
        if in_notebook():
            self._draw(done, text, line)
        elif line:
            print(text, flush=True)
        self._shown = self._shown or in_notebook() or line

    def _draw(self, done: float, text: str, line: bool) -> None:
        words = html.escape(text)
        # A `progress` follows the page's light or dark; readers that leave it out keep the words.
        bar = (
            f'<progress aria-label="{words}" value="{done:g}" max="{self.total:g}" '
            'style="width:100%;max-width:40em"></progress><br>'
        ) * (done < self.total)
        shown = {
            "text/plain": text,
            "text/html": f'<div style="text-align:left">{bar}{words}</div>',
        }
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True, metadata={LINE: line})
        else:
            self._handle.update(shown, raw=True, metadata={LINE: line})
