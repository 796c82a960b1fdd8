"""The acceptance run keeps to its time, loses nothing when a part fails, and says what is open."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from scripts.acceptance import __main__ as acceptance
from scripts.acceptance import jobs
from scripts.acceptance.budget import Budget, PartError
from scripts.acceptance.parts import Context, gpu_tests, outcomes, plan, simulation
from scripts.acceptance.report import Report, Row
from scripts.base import ROOT, RecipeError


@pytest.fixture
def run(tmp_path):
    """What a part is given on a machine without a GPU."""
    config = "configs/smollm2-135m-cpu.yaml"
    return Context(config, {}, tmp_path, Budget(60), cuda=False, cuda_build=False)


def test_a_program_that_takes_too_long_is_stopped_with_what_it_started(tmp_path):
    child = "import subprocess, sys; print('so far', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
    started = time.monotonic()
    with pytest.raises(PartError, match=r"stopped after 2 s; its output: slow\.log"):
        Budget(60).run(["-c", child], tmp_path / "slow.log", most=2)
    assert time.monotonic() - started < 10
    assert (tmp_path / "slow.log").read_text() == "so far\n"
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if "import time; time.sleep(61.5)" in line]


def test_nothing_is_begun_when_the_time_is_used_up(tmp_path):
    with pytest.raises(PartError, match="the time was used up"):
        Budget(0).run(["-c", "open('begun', 'w')"], tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_a_failure_is_told_by_its_last_line(tmp_path):
    with pytest.raises(PartError, match=r"exit code 3: why \(more in log\)"):
        Budget(60).run(["-c", "print('first\\nwhy'); raise SystemExit(3)"], tmp_path / "log")
    assert Budget(60).run(["-c", "raise SystemExit(3)"], tmp_path / "log", codes=(0, 3)) == ""


def test_a_part_that_fails_loses_no_other(run, monkeypatch, tmp_path):
    def broken(run):
        raise KeyError("peak")

    def late(run):
        raise PartError("stopped after 5 s; its output: x.log")

    parts = {"a": lambda run: [Row("a", "speed", "measured", 2.0, "times", True)]}
    parts |= {"b": broken, "c": late, "d": lambda run: [Row("d", "8B", "open", note="no GPU")]}
    monkeypatch.setattr(acceptance, "PARTS", parts)
    report = Report(tmp_path, {"device": "CPU"})
    for name in parts:
        acceptance.run_part(name, run, report)
        saved = json.loads((tmp_path / "acceptance.json").read_text())
        assert list(saved["seconds"])[-1] == name  # written as it goes
        assert not saved["finished"] and not saved["passed"]
    rows = {row["part"]: row for row in saved["rows"]}
    assert rows["a"]["value"] == 2.0 and rows["a"]["met"]
    assert rows["b"]["met"] is False and rows["b"]["note"] == "KeyError: 'peak'"
    assert rows["c"]["note"].startswith("stopped after 5 s")
    page = (tmp_path / "acceptance.md").read_text()
    assert "FAILED (1 measured, 0 simulated, 3 open): b: the part; c: the part" in page
    assert "| a | speed | 2 times | measured | yes |  |" in page


def test_open_rows_do_not_fail_a_run_and_missed_ones_do(tmp_path):
    report = Report(tmp_path, {})
    report.add([Row("a", "8B", "open", note="no GPU here")], "a", 1.0)
    assert not report.passed  # it has not come to its end
    report.finished = True
    assert report.passed
    report.add([Row("b", "speed", "measured", 0.5, "times", met=False)], "b", 1.0)
    assert not report.passed
    with pytest.raises(ValueError, match="not 'guessed'"):
        Row("c", "speed", "guessed", 3.0)


def test_without_a_gpu_the_8b_rows_are_open(run, monkeypatch):
    said = "2 passed in 3.00s"
    monkeypatch.setattr(Context, "command", lambda *a, **k: said)
    measured = {
        "planned": 1.09,
        "measured": 1.0,
        "paged": 0.0,
        "seconds": 2.0,
        "lengths": [1, 2, 2],
    }
    monkeypatch.setattr(Context, "job", lambda *a, **k: measured)
    for part in (gpu_tests, plan, simulation):
        assert part(run)[0].state == "open", part
    run.cuda = True
    assert gpu_tests(run)[0] == Row("tests", "GPU-marked tests", "measured", "2 passed", met=True)
    assert plan(run)[0].met  # a tenth is allowed
    measured["planned"] = 0.8
    assert plan(run)[0].met is False
    said = "1 failed, 2 passed, 3 skipped in 3.00s"
    assert gpu_tests(run)[0].met is False
    assert outcomes(said) == {"passed": 2, "failed": 1, "skipped": 3, "error": 0}


def test_simulated_figures_are_called_so(run, monkeypatch):
    run.cuda_build = True
    found = [{"compared": {"step": {"all": [8.0, 8.3]}, "reference": {"all": [6.0, 6.5]}}}]
    (run.folder / "simulation.json").write_text(json.dumps(found))
    monkeypatch.setattr(Context, "command", lambda *a, **k: "")
    step, reference = simulation(run)
    assert (step.state, step.value, step.met) == ("simulated", 8.0, True)
    assert reference.met is False  # more than a twentieth


def test_a_part_that_is_none_is_refused():
    assert acceptance.chosen_parts(["plan"]) == ["prepare", "plan"]
    assert acceptance.chosen_parts(None) == list(acceptance.PARTS)
    with pytest.raises(RecipeError, match="no part 'plans'"):
        acceptance.chosen_parts(["plans"])


def test_the_options_load_no_library():
    code = "import sys; from scripts.acceptance import __main__; "
    code += "sys.exit('torch' in sys.modules or 'trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_tiny_llama_is_measured_beside_its_plan(run):
    """The work of the parts `prepare` and `plan` on a CPU, in this process."""
    found = jobs.prepare(run.config, {}, str(run.folder / "model"), cuda=False)
    assert found["note"] == "a tiny random Llama"
    small = {"max_length": 64, "per_device_train_batch_size": 2, "output_dir": str(run.folder)}
    measured = jobs.plan_against_measured(run.config, found["overrides"] | small)
    assert tuple(measured["lengths"]) == (16, 48, 48)
    assert measured["paged"] == 0 and 0.3 < measured["measured"] < 8
    assert measured["planned"] == pytest.approx(measured["measured"], rel=0.5)
    assert not (run.folder / "metrics.jsonl").exists()  # which a real run may have there


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scripts.acceptance", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_no_time_is_one_line_and_a_failure(tmp_path):
    done = call("--minutes", "0", "--output-dir", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--minutes" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_measures_what_there_is(tmp_path):
    done = call("--device", "cpu", "--parts", "plan", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((tmp_path / "acceptance.json").read_text())
    rows = {row["name"]: row for row in saved["rows"]}
    assert saved["passed"] and rows["peak of an 8B step"]["state"] == "open"
    assert rows["model and data"]["value"] == "a tiny random Llama"
    measured = rows["peak of a tiny step, process"]
    assert 0.3 < measured["value"] < 4 and "pairs of 24/72/72" in measured["note"]
