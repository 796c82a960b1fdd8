"""The GPU check keeps to its time, loses nothing when a part fails, and runs on a CPU."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from scripts.base import ROOT, RecipeError
from tests.gpu import __main__ as gpu
from tests.gpu import measured


@pytest.fixture
def check(tmp_path):
    return gpu.GpuCheck(tmp_path, time.monotonic() + 60, machine={"cuda": False})


def test_a_program_that_takes_too_long_is_stopped_with_what_it_started(check, tmp_path):
    code = "import subprocess, sys; print('so far', flush=True); "
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
    with pytest.raises(RecipeError, match=r"stopped after 3 s \(more in slow\.log\)"):
        check.python("slow", "-c", code, most=3)
    assert (tmp_path / "slow.log").read_text() == "so far\n"
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if "import time; time.sleep(61.5)" in line]
    with pytest.raises(RecipeError, match="exit code"):
        check.python("none", "-m", "no_such_module")
    check.ends = time.monotonic()
    with pytest.raises(RecipeError, match="the time was used up"):
        check.python("late", "-c", "1")


def test_a_part_that_fails_loses_no_other(check, monkeypatch, tmp_path):
    def broken(check):
        raise KeyError("peak")

    parts = {"a": lambda check: check.add("a", "speed", 2.0, "times", True), "b": broken}
    parts["c"] = lambda check: check.python("c", "-m", "no_such_module")
    monkeypatch.setattr(gpu, "PARTS", parts)
    for name in parts:
        gpu.run_part(name, check)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    found = {row["part"]: row for row in rows if row["what"] != "took"}
    assert found["a"]["met"] and found["a"]["value"] == 2.0
    assert found["b"]["met"] is False and found["b"]["note"] == "KeyError: 'peak'"
    assert "no_such_module" in found["c"]["note"].lower()
    assert "| a | speed | 2.0 times | yes |  |" in (tmp_path / "report.md").read_text()


def test_a_tiny_llama_is_measured_beside_its_plan(tmp_path):
    """The work of the part `plan`, in this process; its run folder lies in a temporary one."""
    config = "configs/smollm2-135m-cpu.yaml"
    folder = measured.random_model(config, str(tmp_path / "model"), cuda=False)["model"]
    small = {"max_length": 32, "per_device_train_batch_size": 1, "model_name_or_path": folder}
    found = measured.plan_against_measured(config, small | {"output_dir": str(tmp_path / "run")})
    assert found["lengths"] == "8/24/24"
    assert found["planned"] == pytest.approx(found["measured"], rel=0.5)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()  # which a real run may have there


@pytest.mark.slow
def test_the_command_measures_what_there_is(tmp_path):
    command = [sys.executable, "-m", "tests.gpu", "--parts", "plan", "benchmark"]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    values = {row["what"]: row["value"] for row in rows}
    assert 0.3 < values["peak of a step"] < 4
    assert values["speed, shared to TRL"] > 0
