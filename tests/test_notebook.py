"""The committed notebook is clean, and the notebook runs headless from top to bottom."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import torch

from scripts.base import ROOT, RecipeError
from scripts.run import NOTEBOOK
from scripts.training import assemble


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


RECIPE = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}


def test_the_recipe_is_small_and_shows_its_libraries():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert len(code) <= 28 and len(prose) <= 10_000
    assert NOTEBOOK.stat().st_size < 1_200_000
    for call in (
        "AutoTokenizer.from_pretrained(", "apply_chat_template(", "BitsAndBytesConfig(",
        "AutoModelForCausalLM.from_pretrained(", "LoraConfig(", "DPOConfig(", "DPOTrainer",
        "trainer.train(", "merge_and_unload()",
    ):  # fmt: skip
        assert any(call in source for source in code), call


def test_the_recipe_shows_its_figures():
    cells = {cell.id: cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    for name in ("lengths", "train", "curves", "evaluate", "memory"):
        shown = [o for o in cells[name].outputs if "image/png" in o.get("data", {})]
        assert len(shown) == 1, name


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"prefix_sharing": False},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True},
        {"use_peft": False},
        {"loss_type": "ipo", "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_the_cells_make_what_the_commands_make(setting, tiny_cfg, tmp_path):
    """Tokenizer, pairs, model, adapter, arguments and trainer, from the same config."""
    wanted = assemble(tiny_cfg(**setting)).trainer
    args = wanted.args.to_dict()
    given = tiny_cfg(**setting, output_dir=str(tmp_path / "cells")).given
    space = {"config": "configs/smollm2-135m-cpu.yaml", "overrides": given, "output_dir": None}
    plain = {"display": print, "monitor": None, "os": os, "sys": sys, "Path": Path, "pd": pd}
    space |= plain
    for name in ("config", "tokenizer", "pairs", "model", "lora", "dpo", "trainer"):
        exec(RECIPE[name], space)
    made, monitor = space["trainer"], space["monitor"]
    monitor.stop()
    assert type(made) is type(wanted)
    theirs = made.args.to_dict()
    free = ("output_dir", "logging_dir", "run_name", "disable_tqdm")
    assert {k: v for k, v in theirs.items() if k not in free} == {
        k: v for k, v in args.items() if k not in free
    }
    for part in ("train_dataset", "eval_dataset"):
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert getattr(made, part)[column] == getattr(wanted, part)[column]
    one, other = (t.accelerator.unwrap_model(t.model) for t in (made, wanted))
    assert getattr(one, "peft_config", None) == getattr(other, "peft_config", None)
    assert str(one) == str(other)  # every layer, quantized or not
    for (name, here), (_, there) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        assert (here.dtype, here.shape, here.requires_grad) == (
            there.dtype, there.shape, there.requires_grad
        ), name  # fmt: skip
        if "lora_A" not in name:  # drawn at random
            assert torch.equal(here, there), name
    assert (made.ref_model is None) == (wanted.ref_model is None)
    assert [type(c) for c in made.callback_handler.callbacks] == [
        type(c) for c in wanted.callback_handler.callbacks
    ]
    with pytest.raises(RecipeError, match="already belongs to a trainer"):
        exec(RECIPE["trainer"], space)  # run again


SMALL = {
    "max_steps": 3, "train_samples": 12, "eval_samples": 4, "eval_prompts": 2, "side_prompts": 1,
    "max_new_tokens": 8, "max_length": 96, "per_device_train_batch_size": 1, "save_steps": 2,
}  # fmt: skip


@pytest.mark.slow
def test_the_notebook_runs_with_papermill(tmp_path):
    """The real default model, data and NF4; fewer steps, prompts and tokens."""
    options = [part for k, v in SMALL.items() for part in ("--set", f"{k}={v}")]
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
    assert figures["prompts"] == 2
    assert "Before and after on 2 held-out prompts" in done.stdout
    assert "step    3/3" in done.stdout
    executed = nbformat.read(tmp_path / "run" / "notebook.ipynb", as_version=4)
    for name in ("lengths", "train", "curves", "evaluate", "memory"):
        (cell,) = [cell for cell in executed.cells if cell.id == name]
        assert [o for o in cell.outputs if "image/png" in o.get("data", {})], name
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
