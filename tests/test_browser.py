"""The notebooks as a reader has them: JupyterLab at the repository's root, in headless Chromium."""

import os
from pathlib import Path

import nbformat
import pytest
from conftest import PAIRS, explicit, write_jsonl

from tests import browser

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"
)
RECIPE = "llama3_dpo.ipynb"
NOTEBOOKS = (RECIPE, "dpo_explained.ipynb", "preference_data.ipynb")
WIDTHS = (1400, 800)
# Where pictures of what was seen are kept, for somebody to look at.
SHOTS = os.environ.get("BROWSER_SHOTS")
# Model with everything, outputs included, as it is in the page.
STATE = """() => {
  const panel = jupyterapp.shell.currentWidget;
  const cells = panel.content.model.sharedModel.toJSON().cells;
  const code = cells.filter(cell => cell.cell_type == 'code');
  const bad = code.flatMap(cell => cell.outputs).filter(
    output => output.output_type == 'error' || output.name == 'stderr');
  return {
    run: code.filter(cell => cell.execution_count).length, all: code.length, bad: bad,
    kernel: panel.sessionContext.session?.kernel?.status,
  };
}"""


# The bars that are seen on the way: their words and width in px.
WATCH = """() => {
  window.bars = {};
  setInterval(() => document.querySelectorAll('progress').forEach(bar => {
    window.bars[bar.getAttribute('aria-label')] = bar.getBoundingClientRect().width;
  }), 100);
}"""


@pytest.fixture(scope="module")
def page_opener():
    with browser.chromium() as one:
        yield one


def keep(page, tmp_path: Path, name: str) -> None:
    folder = Path(SHOTS) if SHOTS else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    browser.screenshot(page, folder / name)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_committed_notebook_is_readable(page_opener, tmp_path, name):
    """Wide and narrow, light and dark: figures with words, no equation or output cut off."""
    lab = browser.Lab(tmp_path)
    lab.set("apputils-extension/themes", theme=browser.THEMES[0])
    with lab.running():
        for width, theme in zip(WIDTHS, browser.THEMES, strict=True):
            lab.set("apputils-extension/themes", theme=theme)
            page = lab.open(page_opener, name, width)
            dark = page.evaluate("document.body.dataset.jpThemeLight") == "false"
            assert dark == ("Dark" in theme)
            assert page.evaluate(browser.LAYOUT) == []
            keep(page, tmp_path, f"{name}-{width}")
            page.close()


def test_faults_of_layout_would_be_seen(page_opener, tmp_path):
    """A figure without words, a long equation and text to the right, in a notebook of their own."""
    lab = browser.Lab(tmp_path)
    table = "<table><tr><td>" + "word " * 20 + "</td></tr></table>"
    html = f'<img src="data:image/png;base64,AAAA">{table}'
    output = nbformat.v4.new_output("display_data", {"text/html": html})
    cells = [
        nbformat.v4.new_markdown_cell("$$" + "x + " * 100 + "x$$"),
        nbformat.v4.new_code_cell("1", outputs=[output], execution_count=1),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), lab.root / "notebooks" / "bad.ipynb")
    with lab.running():
        found = "\n".join(lab.open(page_opener, "bad.ipynb", 800).evaluate(browser.LAYOUT))
    for fault in ("no alternative text", "not shown", "equation is clipped", "aligned right"):
        assert fault in found, found


@pytest.fixture
def tiny_parameters(tiny_llama3, tmp_path) -> dict:
    """The main notebook's parameters for a run of a minute: a random two-layer Llama in NF4."""
    pairs = tmp_path / "pairs"
    write_jsonl(pairs / "train.jsonl", [explicit(*pair) for pair in PAIRS[:4]])
    write_jsonl(pairs / "test.jsonl", [explicit(*pair) for pair in PAIRS[4:]])
    return {
        "model_name_or_path": str(tiny_llama3), "dataset_name": str(pairs), "max_length": 160,
        "max_steps": 12, "warmup_steps": 0, "per_device_train_batch_size": 2, "logging_steps": 1,
        "max_new_tokens": 8, "report_to": "none", "merge_dtype": "float32",
    }  # fmt: skip


@pytest.mark.slow
def test_the_recipe_runs_in_a_browser(page_opener, tmp_path, tiny_parameters):
    """Run, Run All Cells in the menu; no error, nothing on stderr, and the bars move in place."""
    lab = browser.Lab(tmp_path)
    folder = str(tmp_path / "outputs" / "run")
    lab.parameters(RECIPE, {"overrides": tiny_parameters, "output_dir": folder})
    with lab.running():
        page = lab.open(page_opener, RECIPE, WIDTHS[0])
        page.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        page.evaluate("jupyterapp.shell.currentWidget.sessionContext.ready")
        page.evaluate(WATCH)
        for item in ("Run", "Run All Cells"):
            page.get_by_role("menuitem", name=item, exact=True).click()
        page.wait_for_function(
            f"() => {{ const s = ({STATE})();"
            " return s.kernel == 'idle' && (s.bad.length > 0 || s.run == s.all); }",
            timeout=600_000, polling=1000,
        )  # fmt: skip
        state = page.evaluate(STATE)
        assert state["bad"] == []
        assert state["run"] == state["all"]
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 1000})
            page.wait_for_timeout(500)
            assert page.evaluate(browser.LAYOUT) == []
            keep(page, tmp_path, f"run-{RECIPE}-{width}")
        said = page.evaluate(
            "[...document.querySelectorAll('.jp-OutputArea-output')].map(o => o.innerText)"
        )
        bars = page.evaluate("window.bars")
    # One line that was updated in place, not one a step.
    said = "\n".join(said)
    assert said.count("step 12/12") == 1 and "step 1/12" not in said
    steps = [words for words in bars if words.startswith("step")]
    assert len(steps) > 3 and all(bars[words] > 400 for words in steps)
