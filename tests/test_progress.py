"""Bars and lines: in place in a real kernel, lines without one; and what a headless run prints."""

import textwrap
import time

import nbformat
import papermill
import pytest
from jupyter_client.manager import start_new_kernel
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from scripts import progress
from scripts.base import ROOT
from scripts.headless import ENGINE, section
from scripts.progress import LINE, Progress


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel(cwd=str(ROOT))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel, code: str, interrupt_after: float = 0) -> list[dict]:
    """The messages that running `code` gives."""
    manager, client = kernel
    sent, messages = client.execute(code), []
    if interrupt_after:
        time.sleep(interrupt_after)
        manager.interrupt_kernel()
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != sent:
            continue
        content = message["content"]
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return messages
        if message["msg_type"] not in ("status", "execute_input"):
            messages.append({"type": message["msg_type"], **content})


def test_a_notebook_has_one_bar_that_is_redrawn(kernel):
    code = """
    from scripts.progress import Progress
    bar = Progress(2)
    for done in range(3):
        bar.show(done, f"<{done}> of 2", line=done == 2)
    """
    first, *updates = run(kernel, textwrap.dedent(code))
    assert first["type"] == "display_data"
    assert [message["type"] for message in updates] == ["update_display_data"]  # not two at once
    last = updates[-1]
    assert last["transient"] == first["transient"]
    assert last["data"]["text/plain"] == "<2> of 2"
    assert 'value="0" max="2"' in first["data"]["text/html"]
    assert last["data"]["text/html"] == '<div style="text-align:left">&lt;2&gt; of 2</div>'
    assert last["metadata"] == {LINE: True}


def test_an_interrupt_in_a_notebook_is_one_line(kernel):
    run(kernel, "from scripts import quiet\nquiet._readable()")
    (error,) = run(kernel, "import time\nfor _ in range(600): time.sleep(0.1)", 1.0)
    assert error["type"] == "error" and error["ename"] == "KeyboardInterrupt"
    assert error["traceback"] == [
        "interrupted. The cell can be run again; nothing after it was run"
    ]


def test_tables_of_texts_are_aligned_left_and_of_figures_right(kernel):
    code = "import pandas as pd\nfrom scripts import quiet\nquiet._readable()\n"
    run(kernel, code)
    (texts,) = run(kernel, "pd.DataFrame({'a': ['word ' * 9, 'b']})")
    assert texts["data"]["text/html"].count('<td style="text-align:left">') == 2
    (figures,) = run(kernel, "pd.DataFrame({'a': ['0.14 [0.10, 0.18]', 2]})")
    assert "<td style" not in figures["data"]["text/html"]


def test_without_a_notebook_lines_are_printed_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINES", 0.1)
    bar = Progress(3)
    bar.show(0, "none")
    bar.show(1, "one")
    time.sleep(0.15)
    bar.show(2, "two")
    bar.show(3, "three")
    assert capsys.readouterr().out == "two\nthree\n"


def test_what_is_through_at_once_has_no_bar(capsys):
    bar = Progress(2, patience=0.2)
    bar.show(1, "one")
    bar.show(2, "two")
    time.sleep(0.25)
    bar.show(2, "late")
    assert capsys.readouterr().out == ""


CELLS = [
    new_markdown_cell("# A title\n\ntext # not a heading"),
    new_code_cell("overrides = {}", metadata={"tags": ["parameters"]}),
    new_markdown_cell("## 1. First\n\nand so on"),
    new_code_cell("print('said')"),
    new_code_cell("1 + 1"),
    new_markdown_cell("no heading"),
    new_code_cell(
        "from scripts.progress import Progress\nbar = Progress(3)\n"
        "bar.show(0, 'at first', line=False)\nbar.show(1, 'one', line=True)\n"
        "bar.show(3, 'three', line=True)"
    ),
    new_markdown_cell("### Part"),
    new_code_cell("print('end')"),
]


def test_a_headless_run_names_sections_and_prints_lines(tmp_path, capsys):
    nbformat.write(new_notebook(cells=CELLS), tmp_path / "in.ipynb")
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), cwd=str(ROOT),
        engine_name=ENGINE, kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said == [
        "--- A title ---", "--- 1. First ---", "said", "2", "one", "three", "--- Part ---", "end",
    ]  # fmt: skip
    (bar,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[6].outputs
    assert bar.data["text/plain"] == "three"  # kept as it was last


def test_the_section_of_a_cell():
    assert section(CELLS, 6) == "1. First"
    assert section(CELLS[1:2], 0) == ""
