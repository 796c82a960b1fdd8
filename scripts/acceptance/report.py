"""The report of an acceptance run: rows, written as JSON and as a page after every part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

# How a figure was come by. `open`: not come by; the note says why.
STATES = ("measured", "simulated", "open")


@dataclass(frozen=True)
class Row:
    """One figure. `met` is None where there is nothing to meet."""

    part: str
    name: str
    state: str
    value: float | str | None = None
    unit: str = ""
    met: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"a row is one of {STATES}, not {self.state!r}")


class Report:
    """Rows so far, and what they were measured on; every change is on disk at once."""

    def __init__(self, folder: Path, facts: dict) -> None:
        self.folder, self.facts, self.rows = folder, facts, []
        self.seconds: dict[str, float] = {}
        self.finished = False
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, rows: list[Row], part: str, seconds: float) -> None:
        """Take what a part has found."""
        self.rows += rows
        self.seconds[part] = round(seconds, 1)
        self.write()

    @property
    def passed(self) -> bool:
        """Whether every part came to its end and nothing that was asked for was missed."""
        return self.finished and not any(row.met is False for row in self.rows)

    def write(self) -> None:
        values = {
            "passed": self.passed, "finished": self.finished, "machine": self.facts,
            "seconds": self.seconds, "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip
        for name, text in (
            ("acceptance.json", json.dumps(values, indent=1) + "\n"),
            ("acceptance.md", self.page()),
        ):
            part = self.folder / f"{name}.part"
            part.write_text(text)
            part.rename(self.folder / name)  # a run that is killed leaves a whole report

    def verdict(self) -> str:
        """The outcome in one line."""
        counts = {state: sum(row.state == state for row in self.rows) for state in STATES}
        told = ", ".join(f"{count} {state}" for state, count in counts.items())
        missed = [f"{row.part}: {row.name}" for row in self.rows if row.met is False]
        if missed:
            return f"FAILED ({told}): {'; '.join(missed)}"
        if not self.finished:
            return f"not finished ({told} so far)"
        return f"passed ({told})"

    def page(self) -> str:
        """The report as Markdown."""
        lines = ["# Acceptance", "", self.verdict(), ""]
        lines += [f"- {name}: {value}" for name, value in self.facts.items()]
        took = ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.seconds.items())
        lines += [f"- seconds: {took}", ""] if took else [""]
        lines += ["| part | what | value | how | met | note |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            met = {None: "", True: "yes", False: "**no**"}[row.met]
            cells = (row.part, row.name, shown(row), row.state, met, row.note)
            lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def shown(row: Row) -> str:
    """A row's value with its unit."""
    if row.value is None:
        return ""
    value = f"{row.value:.3g}" if isinstance(row.value, float) and abs(row.value) < 100 else None
    value = value or (f"{row.value:.0f}" if isinstance(row.value, float) else str(row.value))
    return f"{value} {row.unit}".strip()
