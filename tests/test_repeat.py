"""A run is repeated from its folder, to the last digit; a figure that differs is named."""

import json
import subprocess
import sys

import pytest

from scripts.cli import ROOT
from scripts.origins import read_origins
from scripts.repeat import RepeatError, changed_machine, differences, figures, flat, report


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=570
    )


def test_a_run_is_repeated_to_the_last_digit(tiny_cfg, tmp_path):
    cfg = tiny_cfg(output_dir=str(tmp_path / "first"))
    cfg.save(tmp_path / "given.yaml")
    done = command("scripts.training", "--config", str(tmp_path / "given.yaml"))
    assert done.returncode == 0, done.stderr[-800:]
    origins = read_origins(cfg.run_dir)
    assert origins["model"]["content"] and origins["dataset"]["content"]
    again = command("scripts.repeat", str(cfg.run_dir))
    assert again.returncode == 0, again.stdout[-800:] + again.stderr[-800:]
    assert "0 differ" in again.stdout
    before = (cfg.run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
    after = tmp_path / "first-repeat" / "adapter" / "adapter_model.safetensors"
    assert after.read_bytes() == before
    # A figure of the first that is changed by hand is found, and by its name.
    log = (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    row = json.loads(log[0])
    row["loss"] += 1e-6
    (cfg.run_dir / "metrics.jsonl").write_text("\n".join([json.dumps(row), *log[1:]]) + "\n")
    with pytest.raises(RepeatError, match=r"1 of \d+ figures differ, first: step 1\.loss"):
        report(cfg.run_dir, tmp_path / "first-repeat", 0.0)
    report(cfg.run_dir, tmp_path / "first-repeat", 1e-5)
    assert command("scripts.repeat", str(cfg.run_dir)).returncode == 2  # it is there already


def test_times_are_no_figures_and_a_missing_one_differs(tmp_path):
    row = {"step": 1, "loss": 0.5, "train_runtime": 3.0, "nested": {"a": [1, "x"]}, "off": None}
    assert dict(flat(row)) == {"step": 1.0, "loss": 0.5, "nested.a[0]": 1.0, "nested.a[1]": "x"}
    nan = float("nan")
    assert differences({"a": nan, "b": 1.0}, {"a": nan, "b": 1.0}) == []
    found = differences({"a": nan, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.5})
    assert [one.figure for one in found] == ["a", "b", "c"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 1, "loss": 2}\n')
    assert figures(tmp_path)["step 1.loss"] == 2.0


def test_no_run_folder_is_one_line(tmp_path):
    done = command("scripts.repeat", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 2, "lo'),
        ("metrics.jsonl", "5"),
        ("metrics.jsonl", '{"loss": 1}'),
        ("evaluation.json", '{"a": '),
    ],
)
def test_a_damaged_run_folder_is_told(tmp_path, name, text):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n')
    assert figures(tmp_path) == {"step 1.step": 1.0, "step 1.loss": 1.0}
    with (tmp_path / name).open("a") as file:
        file.write(text)
    with pytest.raises(RepeatError, match=f"{name} is damaged"):
        figures(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "5", "null", '{"model": 5, "dataset": null}', "{"])
def test_damaged_notes_on_a_run_are_none(tmp_path, text):
    for name in ("origins.json", "environment.json"):
        (tmp_path / name).write_text(text)
    assert read_origins(tmp_path) == {}
    assert changed_machine(tmp_path)
