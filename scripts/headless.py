"""A notebook run without a reader: papermill's client, which names sections and prints lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines

from scripts.progress import LINE

ENGINE = "sections"


def section(cells: Sequence[NotebookNode], index: int) -> str:
    """The heading that the cell at `index` stands under, empty where there is none."""
    for cell in reversed(cells[: index + 1]):
        if cell.cell_type == "markdown":
            heads = [line for line in cell.source.splitlines() if line.startswith("#")]
            if heads:
                return heads[-1].lstrip("# ")
    return ""


def pass_on(text: str, end: str = "\n") -> None:
    """Print; a run outlives the terminal, or the pipe, that shows it."""
    with suppress(OSError):
        print(text, end=end, flush=True)


class Client(PapermillNotebookClient):
    """Prints the heading of each section that is come to, and what its cells print and show.

    A bar that is redrawn in place (`Progress`) is printed as lines, where it asks for them.
    """

    _section = ""

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int):
        content = msg["content"]
        if msg["msg_type"] == "execute_input":
            self._come_to(section(self.nb.cells, cell_index))
        elif msg["msg_type"] == "stream":
            pass_on(content["text"], end="")
        elif (data := content.get("data")) and content.get("metadata", {}).get(
            LINE, "image/png" not in data
        ):
            pass_on(data.get("text/plain", ""))
        return super().process_message(msg, cell, cell_index)

    def _come_to(self, name: str) -> None:
        if name != self._section:
            self._section = name
            pass_on(f"\n--- {name} ---")


class Engine(NBClientEngine):
    """papermill's engine over `Client`; a cell may take as long as it takes."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, start_timeout: int = 60, **kwargs
    ):
        client = Client(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout)
        return client.execute()


papermill_engines.register(ENGINE, Engine)
