"""The committed notebook is clean, and the notebook runs headless from top to bottom."""

import json
import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from scripts.base import ROOT
from scripts.run import NOTEBOOK


@pytest.fixture(scope="module", params=sorted(p.name for p in NOTEBOOK.parent.glob("*.ipynb")))
def path(request):
    return NOTEBOOK.parent / request.param


@pytest.fixture(scope="module")
def committed(path):
    return nbformat.read(path, as_version=4)


def test_committed_run_is_clean(committed, path):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert path.stat().st_size < 2_500_000  # a figure stands there twice: with alternative text


def test_committed_run_names_no_machine(committed):
    text = json.dumps(committed.cells)
    # base64 pictures hold slashes too, so only what starts like a path counts
    assert not re.findall(r"(?<![\w+/])/(?:root|home|work|tmp|Users|usr|opt|mnt)/[\w.]+", text)
    assert "papermill" not in committed.metadata


def test_cells_are_short_and_told(committed):
    for cell in committed.cells:
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= 22, cell.source
    kinds = [cell.cell_type for cell in committed.cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= 0.7 * kinds.count("code")
    tags = [cell for cell in committed.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tags) == 1


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_notebook_runs_with_papermill(tmp_path):
    """The real default model, data and NF4; fewer steps, prompts and tokens."""
    small = {
        "max_steps": 3, "train_samples": 24, "eval_samples": 6, "eval_prompts": 4,
        "side_prompts": 2,
        "max_new_tokens": 24, "report_to": "wandb", "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    options = [part for k, v in small.items() for part in ("--set", f"{k}={v}")]
    done = run("--output-dir", str(tmp_path / "run"), *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in (
        "config.yaml", "environment.json", "metrics.jsonl", "memory.csv", "evaluation.json",
        "replies.jsonl", "adapter/adapter_model.safetensors", "merged/model.safetensors",
        "figures/training.png", "figures/before_after.png", "figures/memory.png", "notebook.ipynb",
    ):  # fmt: skip
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert figures["prompts"] == 4
    assert "Before and after on 4 held-out prompts" in done.stdout
    assert "step    3/3" in done.stdout
    assert "Nobody is here to chat (headless)" in done.stdout
    executed = nbformat.read(tmp_path / "run" / "notebook.ipynb", as_version=4)
    assert not [o for c in executed.cells for o in c.get("outputs", []) if o.output_type == "error"]
    refused = run("--output-dir", str(tmp_path / "run"), *options)
    assert refused.returncode == 1 and "holds a finished run" in refused.stderr


@pytest.mark.slow
def test_the_notebook_on_data_runs_with_papermill(tmp_path):
    papermill.execute_notebook(
        str(NOTEBOOK.parent / "preference_data.ipynb"),
        str(tmp_path / "executed.ipynb"),
        parameters={"output_dir": str(tmp_path / "out"), "prompts_to_sample": 4},
        cwd=str(ROOT),
        kernel_name="python3",
        progress_bar=False,
    )
    assert (tmp_path / "out" / "pairs.jsonl").stat().st_size > 0
    assert (tmp_path / "out" / "dropped_rows.jsonl").stat().st_size > 0


def test_resume_without_a_checkpoint_is_one_line(tmp_path):
    done = run("--output-dir", str(tmp_path / "run"), "--resume")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --resume: no whole checkpoint in")


@pytest.mark.slow
def test_a_failing_cell_is_told_and_the_notebook_kept(tmp_path):
    done = run("--output-dir", str(tmp_path / "run"), "--set", "dataset_format=alpaca")
    assert done.returncode == 1
    assert "this run would fail: dataset" in done.stdout and "alpaca needs columns" in done.stdout
    assert "Traceback" not in done.stderr
    saved = nbformat.read(tmp_path / "run" / "notebook.ipynb", as_version=4)
    assert "## The run failed in cell" in saved.cells[0].source
    assert "PreflightError: this run would fail: dataset" in saved.cells[0].source
    assert "An Exception was encountered at" in saved.cells[1].source  # links to the cell
    errors = [o for c in saved.cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert [error.ename for error in errors] == ["PreflightError"]
