"""The notebook where it stands alone, as on Colab or Kaggle."""

import os
import subprocess
import sys

import nbformat
import pytest

from scripts import hosted
from scripts.base import ROOT


def first_cells() -> str:
    """The notebook's code up to the cell that reads the config."""
    cells = nbformat.read(ROOT / "notebooks" / "llama3_dpo.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return "\n".join(code[: next(i for i, text in enumerate(code) if "load_config" in text) + 1])


def test_the_first_cells_work_in_an_empty_folder(tmp_path):
    """They clone a repository (this one, by its path), and find all requirements installed."""
    env = os.environ | {"DPO_REPOSITORY": ROOT.as_uri(), "PYTHONPATH": ""}
    env.pop("DPO_CONFIG", None)
    fetching = first_cells().split("from scripts.config")[0]
    for code in (fetching, first_cells()):  # the second time as after a restart
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "run folder: outputs/smollm2-135m-cpu" in done.stdout
    assert (tmp_path / "recipe" / "scripts" / "config.py").is_file()


def test_inside_the_repository_nothing_is_fetched(tmp_path):
    env = os.environ | {"DPO_REPOSITORY": (tmp_path / "none").as_uri()}
    code = first_cells().split("from scripts.config")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "notebooks", env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "notebooks" / "recipe").exists()


def test_what_the_host_stands_on_is_left_as_it_is():
    requirements = (ROOT / "requirements.txt").read_text()
    pins = hosted.wanted(requirements, has_torch=True)
    assert "trl==1.16.0" in pins and "datasketch==2.0.0" in pins
    assert not [pin for pin in pins if pin.startswith(("jupyter", "ipywidgets", "torch", "#"))]
    assert "torch==2.13.0" in hosted.wanted(requirements, has_torch=False)


def test_a_library_replaced_under_a_running_kernel_asks_for_a_restart(monkeypatch):
    import numpy

    monkeypatch.setattr(numpy, "__version__", "1.0")  # as if another had been loaded
    with pytest.raises(hosted.HostedError, match="numpy had been loaded and was replaced: restart"):
        hosted.install()


def test_a_failing_pip_is_one_line(monkeypatch):
    monkeypatch.setattr(hosted, "wanted", lambda *args: ["no-such-file.whl"])
    with pytest.raises(hosted.HostedError, match="pip could not install"):
        hosted.install()
