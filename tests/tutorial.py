"""The cells of `dpo_explained.ipynb`: tests run the very code that a reader sees."""

from __future__ import annotations

import json
from types import SimpleNamespace

from scripts.base import ROOT

TUTORIAL = ROOT / "notebooks" / "dpo_explained.ipynb"
CELLS = {cell["id"]: "".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text())["cells"]}


def run_cells(*names: str, **given) -> SimpleNamespace:
    """What the cells of these ids define, run in order; `given` is there before."""
    space = dict(given)
    for name in names:
        exec(CELLS[name], space)
    return SimpleNamespace(**{k: v for k, v in space.items() if not k.startswith("__")})
