"""Cells that are run again, out of order, or after a value was changed."""

import json
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from scripts.adapter import AdapterError, save_adapter
from scripts.base import RecipeError
from scripts.checkpoints.trouble import Stopped
from scripts.data import load_preferences
from scripts.evaluate import evaluate
from scripts.export import merge_adapter
from scripts.model import load_tokenizer
from scripts.training import build_trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" in n}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_again_trains_nothing_anew(tiny_run, capsys):
    trainer, cfg = tiny_run(max_steps=3)
    first = trainer.train()
    save_adapter(trainer, cfg)
    trained, log = weights(trainer), (cfg.run_dir / "metrics.jsonl").read_text()
    again = trainer.train()
    save_adapter(trainer, cfg)
    assert again is first
    assert same(trained, weights(trainer))
    assert (cfg.run_dir / "metrics.jsonl").read_text() == log
    assert "This training is through (3 steps): nothing is trained anew" in capsys.readouterr().out


class Interrupt(TrainerCallback):
    """Ctrl-C at the end of a step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.step = 0
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 3])
def test_an_interrupted_training_goes_on_in_the_same_trainer(tiny_run, tmp_path, step):
    whole, _ = tiny_run(max_steps=5, output_dir=str(tmp_path / "whole"))
    whole.train()
    trainer, cfg = tiny_run(max_steps=5, output_dir=str(tmp_path / "parts"))
    trainer.add_callback(Interrupt(step))
    with pytest.raises(Stopped, match=rf"Kept: .*checkpoint-{step}, step {step} of 5; the same"):
        trainer.train()
    trainer.train()  # the very same call, as a cell is run again
    assert same(weights(whole), weights(trainer))
    steps = [
        line.split(",")[0] for line in (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[:5] == [f'{{"step": {number}' for number in range(1, 6)]


def test_a_run_that_goes_on_saves_and_logs_as_its_config_says_now(tiny_run):
    trainer, cfg = tiny_run(max_steps=6, save_steps=6, save_total_limit=9)
    trainer.add_callback(Interrupt(2))
    with pytest.raises(Stopped):
        trainer.train()
    kept = str(cfg.run_dir / "checkpoint-2")
    trainer, _ = tiny_run(
        max_steps=6, save_steps=3, save_total_limit=9, logging_steps=2, resume_from_checkpoint=kept
    )
    trainer.train(resume_from_checkpoint=kept)
    assert (cfg.run_dir / "checkpoint-3").is_dir()
    rows = map(json.loads, (cfg.run_dir / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 4, 6]


def test_a_broken_off_training_without_a_checkpoint_is_not_gone_on_with(tiny_run, monkeypatch):
    trainer, _ = tiny_run(max_steps=5)
    trainer.add_callback(Interrupt(2))
    monkeypatch.setattr(trainer, "_save_checkpoint", lambda *args: 1 / 0)
    with pytest.raises(Stopped, match="No checkpoint is kept"):
        trainer.train()
    with pytest.raises(RecipeError, match="stopped at step 2, and no checkpoint is kept: load the"):
        trainer.train()


def test_a_second_trainer_over_one_model_is_refused(tiny_run):
    trainer, cfg = tiny_run()
    model, tokenizer = trainer.model.get_base_model(), trainer.processing_class
    with pytest.raises(RecipeError, match=r"a trainer.s already.*load it again"):
        build_trainer(cfg, model, tokenizer, load_preferences(cfg, tokenizer))


def test_results_of_one_config_do_not_go_into_the_folder_of_another(tiny_run, tiny_cfg, tmp_path):
    trainer, _ = tiny_run(max_steps=1)
    trainer.train()
    other = tiny_cfg(max_steps=1, beta=0.3, output_dir=str(tmp_path / "other"))
    for wrong in (lambda: save_adapter(trainer, other), lambda: evaluate(trainer, other, None)):
        with pytest.raises(AdapterError, match=r"`beta` was 0\.1 and is 0\.3; the run folder was"):
            wrong()
    assert not (tmp_path / "other" / "adapter").exists()
    equal = tiny_cfg(max_steps=1)  # the config's cell run again, nothing changed
    assert save_adapter(trainer, equal).is_dir()


def test_evaluating_and_merging_twice_gives_the_same(tiny_run, tiny_llama3, capsys):
    trainer, cfg = tiny_run(max_steps=3, eval_prompts=2)
    trainer.train()
    save_adapter(trainer, cfg)
    tokenizer = load_tokenizer(str(tiny_llama3))
    test = load_preferences(cfg, tokenizer)["test"]
    first, second = (evaluate(trainer, cfg, test) for _ in range(2))
    assert first[0] == second[0] and first[1].equals(second[1])
    assert "base: 2/2 replies" in capsys.readouterr().out
    rows = trainer.eval_dataset.to_list()
    one, other = (merge_adapter(cfg, str(tiny_llama3), tokenizer, rows) for _ in range(2))
    assert one == other
