"""The loss's terms in the log, and ties in its accuracy."""

import math

import pytest
from conftest import VOCABULARY, explicit, write_jsonl

from scripts.run_log import history

BOTH = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ready", [False, True])
def test_the_terms_add_up_to_the_loss_and_dpo_starts_at_ln_2(tiny_run, accumulate, ready):
    trainer, cfg = tiny_run(
        max_steps=3, gradient_accumulation_steps=accumulate, precompute_ref_log_probs=ready, **BOTH
    )
    trainer.train()
    steps = history(cfg.run_dir / "metrics.jsonl")
    whole = steps["loss/dpo"] + 0.5 * steps["loss/sft"]
    assert steps["loss"].to_numpy() == pytest.approx(whole.to_numpy(), abs=1e-4)
    assert steps["loss/dpo"].iloc[0] == pytest.approx(math.log(2), abs=1e-5)
    assert steps["loss/dpo"].iloc[-1] < 0.6
    assert steps["loss/sft"].iloc[0] == pytest.approx(math.log(VOCABULARY), abs=0.5)


def test_a_loss_of_one_term_has_no_second_name(tiny_run):
    trainer, cfg = tiny_run(max_steps=1)
    trainer.train()
    assert not {"loss/dpo", "loss/sft"} & {*history(cfg.run_dir / "metrics.jsonl")}


def test_ties_count_half(tiny_run, tmp_path):
    """Of four pairs one stays a tie for ever: `max_length` leaves its answers alike."""
    for split, word in (("train", "Why"), ("test", "How")):
        rows = [explicit(f"{word} {c}?", f"{c} is so", f"no {c}") for c in "abc"]
        rows.append(explicit(f"{word} d?", "yes yes yes A", "yes yes yes B"))
        write_jsonl(tmp_path / "ties" / f"{split}.jsonl", rows)
    trainer, cfg = tiny_run(dataset_name=str(tmp_path / "ties"), max_steps=6, max_length=200,
                            per_device_train_batch_size=4, on_bad_rows="error")  # fmt: skip
    longest = len(trainer.train_dataset[3]["prompt_ids"]) + 10
    trainer.data_collator.max_length = longest
    trainer.train()
    steps = history(cfg.run_dir / "metrics.jsonl")
    assert steps["rewards/accuracies"].iloc[0] == 0.5
    assert steps["rewards/accuracies"].iloc[-1] == pytest.approx(3.5 / 4)
