"""Two runs side by side."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from PIL import Image

from scripts.base import ROOT, RecipeError
from scripts.compare import compare
from scripts.intervals import bootstrap


def a_run(folder, *, gain=0.1, evaluated=True, prompts=None, **config):
    """A run folder, its margins growing by `gain` a step."""
    folder.mkdir(parents=True)
    rows = [
        {"step": n, "loss": 0.7, "learning_rate": 1e-4, "rewards/margins": gain * n,
         "rewards/chosen": gain * n / 2, "rewards/rejected": -gain * n / 2,
         "rewards/accuracies": 0.5}
        for n in range(1, 21)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"beta": 0.1, "seed": 1, "output_dir": str(folder)} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if evaluated:
        lengths = [100 * gain + n % 7 for n in range(40)]
        finished = [True] * 40
        frame = pd.DataFrame({"prompt": prompts or [f"p{n}" for n in range(40)],
                              "cluster": [f"c{n // 2}" for n in range(40)],
                              "tuned_length": lengths, "tuned_finished": finished})  # fmt: skip
        frame.to_json(folder / "replies.jsonl", orient="records", lines=True)
        figures = {
            "reward_accuracy": bootstrap([0, 1, 1, 1]), "reward_margin": bootstrap([1.0, 2.0]),
            "measures": {"length": {"tuned": bootstrap(lengths)},
                         "finished": {"tuned": bootstrap(finished)}},
        }  # fmt: skip
        (folder / "evaluation.json").write_text(json.dumps(figures))
    return folder


def test_settings_figures_and_the_change_prompt_by_prompt(tmp_path):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", gain=0.2, beta=0.2)
    found = compare(a, b)
    assert found.remarks == []  # different settings, so nothing to hold figure by figure
    assert found.settings.to_dict("index") == {"beta": {"a": "0.1", "b": "0.2"}}  # no folder
    figures = found.figures
    assert figures.loc["training: reward margin (nats)", ["a", "b"]].tolist() == ["1.85", "3.70"]
    length = figures.loc["reply length (tokens)"]
    # The same 10 tokens more for every prompt: no doubt about the change, much about either mean.
    assert length["change"] == "+10.0 [+10.0, +10.0]"
    assert length["a"].startswith("12.9 [") and length["a"] != "12.9 [12.9, 12.9]"
    assert figures.loc["implicit-reward accuracy", "b"].startswith("0.75 [")


def test_other_prompts_and_no_evaluation_are_told(tmp_path):
    a = a_run(tmp_path / "a")
    other = a_run(tmp_path / "b", prompts=[f"q{n}" for n in range(40)])
    found = compare(a, other)
    assert "different prompts" in found.remarks[0]
    assert "change" not in found.figures and "reply length (tokens)" in found.figures.index
    found = compare(a, a_run(tmp_path / "c", evaluated=False))
    assert found.remarks == ["c has no evaluation yet: only the training is compared."]
    assert "training: reward margin (nats)" in found.figures.index


def test_a_repeated_run_is_compared_figure_by_figure(tmp_path):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    (remark,) = compare(a, b).remarks
    assert "figures are equal" in remark
    log = b / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 3, "loss": 0.7', '"step": 3, "loss": 0.700001'))
    for folder, version in ((a, "2.12"), (b, "2.13")):
        (folder / "environment.json").write_text(json.dumps({"torch": version, "cpu": "x"}))
    differ, versions = compare(a, b).remarks
    assert "The first is step 3.loss: 0.7 and 0.700001." in differ and "but 1 of" in differ
    assert versions == "Versions and machine: torch: 2.12 and 2.13."


def test_a_folder_that_is_no_run_is_told(tmp_path):
    a = a_run(tmp_path / "a")
    with pytest.raises(RecipeError, match="no such folder"):
        compare(a, tmp_path / "none")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    found = compare(a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run", beta=0.2))
    assert list(found.settings) == [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]


def test_the_command(tmp_path):
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", beta=0.2)
    command = [sys.executable, "-m", "scripts.compare", str(a), str(b)]
    command += ["--figure", str(tmp_path / "both.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "beta  0.1  0.2" in done.stdout
    assert "Reward margins" in Image.open(tmp_path / "both.png").text["Description"]
