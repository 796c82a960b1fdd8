"""The launchable: a Compose file that stands alone, its check, and the clicks that are printed."""

import copy
import subprocess
import sys

import pytest
import yaml

from scripts import launchable
from scripts.base import ROOT, InputError


@pytest.fixture
def values():
    return launchable.read(launchable.FILE)


def run(*options):
    command = [sys.executable, "-m", "scripts.launchable", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_file_is_valid_and_the_clicks_name_what_it_holds(values):
    done = run("--repository", "https://github.com/me/mine.git")
    assert done.returncode == 0, done.stderr
    brev = values["x-brev"]
    for words in (
        "https://github.com/me/mine/blob/main/brev-launchable.yaml", brev["instance"],
        "Data Storage 256 GiB", "JUPYTER_TOKEN (required), HF_TOKEN, WANDB_API_KEY",
        "jupyter on port 8888", "No, I don't want Jupyter", "Create Launchable",
    ):  # fmt: skip
        assert words in done.stdout
    assert "  8. " in done.stdout and "  9. " not in done.stdout


def test_the_image_has_the_torch_of_the_requirements(values):
    pins = (ROOT / "requirements.txt").read_text()
    version = values["services"]["recipe"]["image"].split(":")[1].split("-")[0]
    assert f"torch=={version}\n" in pins


def test_it_stands_alone(values):
    """Every variable has a default: nothing is rendered into the file."""
    defaults = launchable.variables(values)
    assert defaults["REPOSITORY"].startswith("https://")
    assert defaults["BIND_ADDRESS"] == "0.0.0.0"
    assert None not in defaults.values()
    assert values["x-brev"]["disk"] >= 256


def change(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    if value is None:
        del values[last]
    else:
        values[last] = value


SERVICE = ("services", "recipe")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((*SERVICE, "image"), "pytorch/pytorch:latest", "needs a fixed tag"),
        ((*SERVICE, "image"), "pytorch/pytorch", "needs a fixed tag"),
        ((*SERVICE, "deploy"), {}, "reserves no GPU"),
        ((*SERVICE, "ports"), ["8080:8080"], "no service publishes port 8888"),
        ((*SERVICE, "environment", "MORE"), "${MORE}", "${MORE} has no default"),
        ((*SERVICE, "environment", "HF_TOKEN"), None, "parameter HF_TOKEN is used nowhere"),
        (("x-brev", "parameters", 0, "required"), False, "must be a required parameter"),
        (("x-brev", "disk"), None, "exactly the keys"),
    ],
)
def test_what_would_not_work_is_said(values, path, value, said):
    changed = copy.deepcopy(values)
    change(changed, path, value)
    with pytest.raises(launchable.LaunchableError) as error:
        launchable.check_file(changed)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert changed != values


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("a: [", "could not be read"), ("- a", "must have `services`")],
)
def test_a_file_that_cannot_be_read_is_an_error_of_one_line(tmp_path, text, said):
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=said):
        launchable.read(path)
    done = run("--file", str(path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_repository_that_brev_cannot_read_is_refused():
    done = run("--repository", "git@github.com:me/mine.git")
    assert done.returncode == 2 and "no public GitHub or GitLab repository" in done.stderr


def test_a_placeholder_for_the_repository_is_pointed_out(tmp_path, values):
    assert "write your fork's address" in run().stdout
    values["services"]["recipe"]["environment"]["REPOSITORY"] = (
        "${REPOSITORY:-https://github.com/me/mine}"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    done = run("--file", str(path))
    assert "https://github.com/me/mine/blob" in done.stdout and "write your fork" not in done.stdout
