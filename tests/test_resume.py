"""Training that is stopped, resumed, or run again: by cells, by both trainers, to the last bit."""

import json
import os
import signal

import pytest
import torch
from transformers import TrainerCallback

from scripts.adapter import AdapterError, save_adapter
from scripts.base import RecipeError
from scripts.checkpoints import Stopped, TrainingError, checkpoints, damage, resumable
from scripts.data import load_preferences
from scripts.evaluate import evaluate
from scripts.run_folder import start_run
from scripts.training import build_trainer


def trained(trainer) -> dict[str, torch.Tensor]:
    """The weights after the notebook's training cell."""
    with resumable(trainer) as checkpoint:
        trainer.train(resume_from_checkpoint=checkpoint)
    return weights(trainer)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def rows_of(cfg) -> list[dict]:
    """The steps in metrics.jsonl, without what a clock or the end of training says."""
    lines = (cfg.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if "loss" in row]


class At(TrainerCallback):
    """Does something at a hook of one step, once."""

    def __init__(self, hook: str, step: int, do) -> None:
        self.step, self.do = step, do
        setattr(self, hook, self._hook)

    def _hook(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and self.do:
            do, self.do = self.do, None
            do()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def fail() -> None:
    raise OSError(28, "No space left on device")


WAYS = {  # when the run is stopped, and the settings that make it hard
    "at a step's end": ("on_step_end", 3, interrupt, {}),
    "at the last step's end": ("on_step_end", 5, interrupt, {}),
    "at an epoch's end": ("on_step_end", 2, interrupt, {}),
    "in an epoch's first step": ("on_step_begin", 2, interrupt, {}),
    "in the middle of a step": (
        "on_substep_end", 2, interrupt,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    ),
    "between two logs": ("on_step_end", 3, interrupt, {"logging_steps": 2}),
    "by an error": ("on_step_begin", 3, fail, {}),
    "with all weights trained": (
        "on_step_end", 3, interrupt, {"use_peft": False, "learning_rate": 1e-3},
    ),
    "while held-out pairs are scored": (
        "on_prediction_step", 3, interrupt, {"eval_strategy": "steps", "eval_steps": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("way", "prefix_sharing"),
    [*((way, True) for way in WAYS), ("in the middle of a step", False), ("by an error", False)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_run, tmp_path, way, prefix_sharing):
    hook, step, do, settings = WAYS[way]
    settings = {"max_steps": 5, "save_steps": 100, "prefix_sharing": prefix_sharing} | settings
    whole, whole_cfg = tiny_run(**settings, output_dir=str(tmp_path / "whole"))
    expected = trained(whole)
    trainer, cfg = tiny_run(**settings, output_dir=str(tmp_path / "parts"))
    trainer.add_callback(At(hook, step, do))
    with pytest.raises((Stopped, TrainingError), match=r"Kept: .*; the same command goes on"):
        trained(trainer)
    (kept,) = checkpoints(cfg.run_dir)
    assert damage(kept) is None
    # In the same process, as the cell is run again ...
    assert same(expected, trained(trainer))
    # ... and in a new one.
    again, cfg = tiny_run(
        **settings, output_dir=str(tmp_path / "parts"), resume_from_checkpoint=str(kept)
    )
    assert same(expected, trained(again))
    clock = ("epoch", "step_time", "num_tokens")  # TRL counts the tokens of this process
    for one, other in zip(rows_of(whole_cfg), rows_of(cfg), strict=True):
        assert {k: v for k, v in one.items() if k not in clock} == {
            k: v for k, v in other.items() if k not in clock
        }


def test_training_again_trains_nothing_more(tiny_run, capsys):
    trainer, cfg = tiny_run(max_steps=3)
    first = trained(trainer)
    save_adapter(trainer, cfg)
    log = (cfg.run_dir / "metrics.jsonl").read_text()
    assert same(first, trained(trainer))
    save_adapter(trainer, cfg)
    assert (cfg.run_dir / "metrics.jsonl").read_text() == log
    assert len(trainer.state.log_history) >= 3
    assert "This training has finished (3 steps): there is nothing left to do" in (
        capsys.readouterr().out
    )
    # A finished run that is resumed takes no step too many.
    last = str(checkpoints(cfg.run_dir)[0])
    resumed, _ = tiny_run(max_steps=3, resume_from_checkpoint=last)
    assert same(first, trained(resumed))


def test_old_checkpoints_go_only_once_the_new_one_is_whole(tiny_run, tmp_path):
    trainer, cfg = tiny_run(max_steps=4, save_steps=1, save_total_limit=2)
    trained(trainer)
    assert [path.name for path in checkpoints(cfg.run_dir)] == ["checkpoint-4", "checkpoint-3"]
    assert trainer.args.save_total_limit == 2
    newest, older = checkpoints(cfg.run_dir)
    with (newest / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert "adapter_model.safetensors differs" in damage(newest)
    (older / "optimizer.pt").unlink()
    assert damage(older) == "optimizer.pt is missing"
    (newest / "whole.json").unlink()
    assert "no readable whole.json" in damage(newest)


def test_a_checkpoint_of_another_run_is_refused_by_its_keys(tiny_run, tmp_path):
    trainer, cfg = tiny_run(max_steps=2)
    trained(trainer)
    last = str(checkpoints(cfg.run_dir)[0])
    other, _ = tiny_run(max_steps=2, beta=0.3, resume_from_checkpoint=last)
    with pytest.raises(RecipeError, match=r"another run's: `beta` was 0\.1 and is 0\.3"):
        trained(other)
    fewer, _ = tiny_run(max_steps=2, train_samples=3, resume_from_checkpoint=last)
    with pytest.raises(RecipeError, match=r"the training pairs differ \(`train_samples` was None"):
        trained(fewer)


def test_a_run_that_goes_on_saves_and_logs_as_its_config_says_now(tiny_run):
    trainer, cfg = tiny_run(max_steps=6, save_steps=6, save_total_limit=9)
    trainer.add_callback(At("on_step_end", 2, interrupt))
    with pytest.raises(Stopped):
        trained(trainer)
    trainer, _ = tiny_run(
        max_steps=6, save_steps=3, save_total_limit=9, logging_steps=2,
        resume_from_checkpoint=str(cfg.run_dir / "checkpoint-2"),
    )  # fmt: skip
    trained(trainer)
    assert (cfg.run_dir / "checkpoint-3").is_dir()
    assert [row["step"] for row in rows_of(cfg)] == [1, 2, 4, 6]


def test_what_is_not_finite_ends_training_and_names_its_pairs(tiny_run):
    trainer, cfg = tiny_run(max_steps=4, save_steps=100)

    def spoil() -> None:
        next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).data[0, 0] = torch.nan

    trainer.add_callback(At("on_step_begin", 2, spoil))
    with pytest.raises(TrainingError, match=r"stopped at step 3: a gradient is not finite.*Kept"):
        trained(trainer)
    failed = json.loads((cfg.run_dir / "failed_batch.json").read_text())
    assert (failed["step"], len(failed["pairs"])) == (3, 2)
    assert all("<|eot_id|>" in pair["chosen"] for pair in failed["pairs"])


def test_a_second_trainer_over_one_model_is_refused(tiny_run):
    trainer, cfg = tiny_run()
    model, tokenizer = trainer.model.get_base_model(), trainer.processing_class
    with pytest.raises(RecipeError, match=r"belongs to a trainer.*load it again"):
        build_trainer(cfg, model, tokenizer, load_preferences(cfg, tokenizer))


def test_the_cell_that_starts_a_run_may_run_again(tiny_cfg):
    cfg = tiny_cfg()
    start_run(cfg)
    (cfg.run_dir / "adapter").mkdir()
    start_run(cfg)
    assert (cfg.run_dir / "adapter").is_dir()
    start_run(tiny_cfg())  # another reading of the config begins another run
    assert not (cfg.run_dir / "adapter").is_dir()


def test_results_of_one_config_do_not_go_into_the_folder_of_another(tiny_run, tiny_cfg, tmp_path):
    trainer, _ = tiny_run(max_steps=1)
    trained(trainer)
    other = tiny_cfg(max_steps=1, beta=0.3, output_dir=str(tmp_path / "other"))
    for wrong in (lambda: save_adapter(trainer, other), lambda: evaluate(trainer, other, None)):
        with pytest.raises(AdapterError, match=r"`beta` was 0\.1 and is 0\.3; the run folder was"):
            wrong()
    assert not (tmp_path / "other" / "adapter").exists()
    equal = tiny_cfg(max_steps=1)  # the config's cell run again, nothing changed
    assert save_adapter(trainer, equal).is_dir()


def test_evaluating_twice_gives_the_same(tiny_run, capsys):
    trainer, cfg = tiny_run(max_steps=3, eval_prompts=2)
    trained(trainer)
    test = load_preferences(cfg, trainer.processing_class)["test"]
    first, second = (evaluate(trainer, cfg, test) for _ in range(2))
    assert first[0] == second[0] and first[1].equals(second[1])
