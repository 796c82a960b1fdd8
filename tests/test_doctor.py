"""The run doctor, on short trainings that really went wrong, each in its own way."""

import json
import random
import string
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from conftest import explicit, write_jsonl

from scripts.base import ROOT, RecipeError
from scripts.checkpoints import resumable
from scripts.doctor import diagnose, in_words, read_run
from scripts.evaluate import evaluate, length_follows, save_evaluation
from scripts.training import assemble

DRAW = random.Random(0)
SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}


def words(count, letters=string.ascii_lowercase):
    return "".join(DRAW.choice(letters) for _ in range(count))


def same_length():
    """Answers of one length, chosen ones of vowels: what tells them apart is their text."""
    return explicit(words(5), words(6, "aeiou"), words(6, "bcdfg"))


def same_letters():
    """Answers of the same two letters, the rejected half as long again: a margin is to be had by
    making both letters improbable, in the chosen answer too."""
    return explicit(words(5), words(10, "ab"), words(15, "ab"))


def overlapping():
    """Chosen answers have more of some letters, rejected of others; not every pair tells."""
    return explicit(words(5), words(4, "aaabbc"), words(4, "abbccc"))


def by_length():
    """Answers of the same letters, the rejected one longer, by more or less."""
    return explicit(words(5), words(DRAW.randint(3, 6)), words(DRAW.randint(8, 50)))


def coin():
    """Answers with nothing to learn that holds for others."""
    return explicit(words(5), words(6), words(6))


@pytest.fixture
def trained(tiny_cfg, tmp_path):
    """Trains on 16 pairs that `make` draws and gives the run's folder; `evaluated` on 16 more."""

    def run(make, evaluated=False, rate=None, **overrides):
        DRAW.seed(0)
        for split in ("train", "test"):
            write_jsonl(tmp_path / "data" / f"{split}.jsonl", [make() for _ in range(16)])
        settings = {"dataset_name": str(tmp_path / "data"), "max_steps": 20, "max_new_tokens": 2}
        settings |= {"per_device_train_batch_size": 4, "eval_prompts": 2, "learning_rate": 1e-3}
        cfg = tiny_cfg(**settings | overrides)
        if rate:  # beyond what a config may hold
            cfg.dpo.learning_rate = cfg.given["learning_rate"] = rate
        cfg.save(cfg.run_dir / "config.yaml")
        run = assemble(cfg)
        ends = pytest.raises(RecipeError, match="is not finite") if rate else nullcontext()
        with ends, resumable(run.trainer):
            run.trainer.train()
        if evaluated:
            save_evaluation(*evaluate(run.trainer, cfg, run.pairs["test"]), cfg.run_dir)
        return cfg.run_dir

    return run


def names(folder):
    return [finding.name for finding in diagnose(read_run(folder))]


def test_a_run_that_overflows_is_called_nan_and_nothing_else(trained):
    folder = trained(same_length, rate=1e30, max_grad_norm=0.0)
    (finding,) = diagnose(read_run(folder))
    assert finding.name == "NaN"
    assert "is not finite" in finding.evidence and "failed_batch.json" in finding.evidence
    assert "learning_rate: 1e+29" in finding.change


FALLS = {"learning_rate": 3e-3, "max_steps": 30}
LEAPS = {"learning_rate": 0.5, "lr_scheduler_type": "constant", "beta": 1.0}
RUNS = {  # what the run is called: its pairs, its settings, and words of the finding
    "too few steps": (same_length, {"max_steps": 3}, "3 logs to step 3;"),
    "chosen reward falls": (same_letters, FALLS, "loss_type: [sigmoid, sft]"),
    "margin in one leap": (same_length, LEAPS, "learning_rate: 0.1,"),
    "accuracy at once 1": (same_length, {"learning_rate": 1e-2}, "accuracy reached 0.99"),
    "length only": (by_length, {"evaluated": True}, '"the shorter answer wins" is right in 1.00'),
    "learned by heart": (coin, {"evaluated": True, "learning_rate": 5e-3, "max_steps": 40}, ""),
    "nothing learned": (coin, {"learning_rate": 1e-9}, "learning_rate: 5e-09"),
    "steady": (overlapping, SFT, "over the last fifth of 20 logs"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_called_what_it_was(trained, name):
    make, settings, words_of_it = RUNS[name]
    found = {finding.name: finding for finding in diagnose(read_run(trained(make, **settings)))}
    assert words_of_it in str(found[name])
    if name in ("too few steps", "nothing learned", "steady"):
        assert list(found) == [name]


def test_an_sft_term_holds_the_chosen_answers_up(trained):
    assert "chosen reward falls" not in names(trained(same_letters, **FALLS, **SFT))


STEP = {
    "loss": 0.6, "learning_rate": 1e-4, "rewards/margins": 0.1, "rewards/chosen": 0.1,
    "rewards/accuracies": 0.8,
}  # fmt: skip


def log_of(folder, steps=12):
    rows = [json.dumps({"step": step, **STEP}) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    return folder


@pytest.mark.parametrize(("high", "told"), [(-0.2, True), (0.1, False)])
def test_fewer_key_facts_are_told(tmp_path, high, told):
    """By a made-up evaluation: a tiny model knows no facts."""
    figure = {"base": {"mean": 0.7}, "tuned": {"mean": 0.4}, "change": {"low": -0.4, "high": high}}
    figures = {"measures": {"facts": figure, "length": figure}}
    (tmp_path / "evaluation.json").write_text(json.dumps(figures))
    assert ("emptier replies" in names(log_of(tmp_path))) == told


def test_the_command_prints_it_and_names_what_is_missing(trained, tmp_path):
    folder = trained(same_length, max_steps=3)
    command = [sys.executable, "-m", "scripts.doctor"]
    done = subprocess.run([*command, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "\n\n".join(in_words(folder)) + "\n"
    assert "no evaluation.json yet" in done.stdout
    done = subprocess.run([*command, tmp_path / "none"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    (folder / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(RecipeError, match="line 1 is not JSON"):
        list(in_words(folder))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", b"\xff\xfe", "line 13 is not JSON"),
        ("metrics.jsonl", '{"loss": 1, "rewards/margins": 1}', "metrics.jsonl, .* is damaged"),
        ("config.yaml", b"\xff\xfe", "config.yaml cannot be read"),
        ("config.yaml", "beta: x", "is damaged"),
        ("evaluation.json", '{"length": {"rule": "x"}}', "is damaged"),
        ("failed_batch.json", "{", "failed_batch.json cannot be read"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(tmp_path, name, text, said):
    assert list(in_words(log_of(tmp_path)))
    with (tmp_path / name).open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError, match=said) as told:
        list(in_words(tmp_path))
    assert "\n" not in str(told.value)


def test_length_is_counted_as_training_cuts_it():
    rows = [
        {"prompt_ids": [0] * 4, "chosen_ids": [0] * c, "rejected_ids": [0] * r}
        for c, r in ((1, 2), (1, 5), (3, 3), (6, 60))
    ]
    margins = np.array([1.0, 4.0, 0.0, 0.0])
    cut = length_follows(rows, margins, max_length=10)
    assert cut["rule"] == "shorter"
    assert cut["rule_accuracy"] == pytest.approx(0.75)  # two of two, and two ties
    assert cut["margin_correlation"] == pytest.approx(1.0)
    assert length_follows(rows, margins, max_length=None)["margin_correlation"] < 0.5
    assert length_follows(rows, np.zeros(4), None)["margin_correlation"] is None
