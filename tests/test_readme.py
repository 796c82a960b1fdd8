"""What the README promises: its commands and links exist, and its table is the notebook's."""

import re

import nbformat
import pytest

from scripts.base import ROOT
from scripts.cli import COMMANDS

NOTEBOOK = nbformat.read(ROOT / "notebooks" / "llama3_dpo.ipynb", as_version=4)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "data/README.md"]
DOCUMENTS += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


def notebook_output(marker: str) -> str:
    """The plain text of the one output of the committed notebook that has `marker` in it."""
    texts = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in NOTEBOOK.cells
        for output in cell.get("outputs", [])
    ]
    (text,) = [text for text in texts if marker in text]
    return text


def rows_of(document: str, first: str, last: str) -> dict[str, list[str]]:
    """The rows of a document's table from the one that begins with `first` to `last`."""
    text = (ROOT / document).read_text()
    begin = text.index(f"| {first}")
    table = text[begin : text.index(f"| {last}", begin)]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_the_table_is_the_committed_notebooks(document):
    output = notebook_output("implicit-reward margin (nats)")
    rows = rows_of(document, "right, nothing wrong or made up | 0", "implicit-reward margin")
    assert len(rows) >= 10
    for name, cells in rows.items():
        # pandas breaks a wide table into several, each with the row's name in front
        line = " ".join(part for part in output.splitlines() if part.startswith(name))
        for cell in cells:
            assert cell in line, (name, cell, line)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = path.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document):
    for name in re.findall(r"python -m scripts\.([a-z_]+)", (ROOT / document).read_text()):
        assert name in COMMANDS, name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for name in re.findall(r"`((?:scripts|tests|configs|notebooks|data)/[\w./-]+\w)`", text):
        assert (ROOT / name).exists(), name
