"""Before against after: the figures are what they say they are."""

import json

import numpy as np
import pytest
import torch
from conftest import PAIRS, explicit, write_jsonl

from scripts.data import load_preferences
from scripts.evaluate import (
    evaluate,
    evaluation_table,
    implicit_rewards,
    save_evaluation,
    side_by_side,
)
from scripts.generation import generate_replies
from scripts.measures.statistics import bootstrap
from scripts.model import load_model, load_tokenizer


def test_bootstrap_brackets_the_mean_and_pairs_the_models():
    rng = np.random.default_rng(1)
    base = rng.normal(10, 3, 200)
    tuned = base - 1 + rng.normal(0, 0.1, 200)
    alone, change = bootstrap(tuned), bootstrap(tuned, base)
    assert alone["low"] < alone["mean"] < alone["high"]
    # 1.96 standard errors either side, within what 10,000 draws scatter
    assert alone["high"] - alone["low"] == pytest.approx(3.92 * 3 / 200**0.5, rel=0.2)
    assert change["mean"] == pytest.approx(-1, abs=0.05)
    assert change["high"] - change["low"] < 0.05  # far tighter than unpaired
    assert bootstrap(tuned) == alone  # no dice


def test_implicit_rewards_by_hand():
    logps = {
        "chosen": np.array([-10.0]), "ref_chosen": np.array([-12.0]),
        "rejected": np.array([-30.0]), "ref_rejected": np.array([-25.0]),
    }  # fmt: skip
    chosen, rejected = implicit_rewards(logps, beta=0.1)
    assert chosen == pytest.approx([0.2])
    assert rejected == pytest.approx([-0.5])


def test_batched_replies_equal_single_ones_and_know_their_end(tiny_cfg):
    cfg = tiny_cfg()
    path = cfg.model.model_name_or_path
    model, tokenizer = load_model(cfg, path), load_tokenizer(path)
    prompts = [[{"role": "user", "content": "x" * n}] for n in (40, 3, 17)]
    kwargs = {"max_new_tokens": 8}
    batched = generate_replies(model, tokenizer, prompts, batch_size=3, **kwargs)
    single = [generate_replies(model, tokenizer, [p], batch_size=1, **kwargs)[0] for p in prompts]
    assert [r.ids for r in batched] == [r.ids for r in single]
    assert all(not r.finished and r.length == 8 for r in batched)
    with torch.no_grad():  # a head that can only say "end of turn"
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.generation_config.eos_token_id = [5, 0]  # every logit ties; greedy takes the first: 0
    ended = generate_replies(model, tokenizer, prompts, batch_size=3, **kwargs)
    assert all(r.finished and r.ids == [0] and r.length == 0 for r in ended)


def test_an_untrained_adapter_changes_nothing(tiny_run):
    trainer, cfg = tiny_run()
    figures, frame = evaluate(trainer, cfg, load_preferences(cfg)["test"])
    assert (frame["base"] == frame["tuned"]).all()
    assert figures["shorter"] == 0
    assert figures["measures"]["base_nll"]["change"]["mean"] == 0
    assert figures["reward_margin"]["mean"] == 0
    assert figures["reward_accuracy"]["mean"] == 0  # no pair is told apart
    assert not figures["targets"]["replies at least 30% shorter"]
    assert "facts" not in figures["measures"]  # these pairs list none


def test_base_loss_is_that_of_the_model_itself(tiny_run):
    """Replies picked greedily by the base: its loss per token, from its own log-softmax."""
    from scripts.export import completion_logps

    trainer, cfg = tiny_run()
    test = load_preferences(cfg)["test"]
    _, frame = evaluate(trainer, cfg, test)
    tokenizer = trainer.processing_class
    prompt = tokenizer.apply_chat_template(
        test[0]["prompt"], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    reply = generate_replies(
        trainer.model, tokenizer, [test[0]["prompt"]], max_new_tokens=6, batch_size=1
    )[0]
    row = {"prompt_ids": prompt, "chosen_ids": reply.ids}
    by_hand = -completion_logps(trainer.model, [row])[0].mean().item()
    assert frame["base_base_nll"][0] == pytest.approx(by_hand, rel=1e-4)


def test_training_shows_in_the_figures_and_in_the_files(tiny_run, tmp_path):
    rows = [explicit(*pair) | {"facts": [["honey", "seven", "paris"]]} for pair in PAIRS]
    again = explicit(PAIRS[0][0], PAIRS[0][1], "It is a long story.") | {"facts": rows[0]["facts"]}
    rows.append(again)  # a prompt that stands in two pairs is answered once
    write_jsonl(tmp_path / "p" / "test.jsonl", rows)
    asked = [explicit("Well? " + prompt, *answers) for prompt, *answers in PAIRS]
    write_jsonl(tmp_path / "p" / "train.jsonl", asked)
    overrides = {"dataset_name": str(tmp_path / "p"), "max_steps": 10}
    trainer, cfg = tiny_run(**overrides)
    trainer.train()
    figures, frame = evaluate(trainer, cfg, load_preferences(cfg)["test"])
    assert trainer.data_collator.max_length == cfg.dpo.max_length
    assert (figures["prompts"], figures["pairs"]) == (6, 7)
    assert figures["reward_accuracy"]["mean"] == 1.0  # as good as seen in training
    assert figures["reward_margin"]["low"] > 0
    assert 0 <= figures["measures"]["facts"]["base"]["mean"] <= 1
    save_evaluation(figures, frame, cfg.run_dir)
    assert json.loads((cfg.run_dir / "evaluation.json").read_text()) == figures
    assert len((cfg.run_dir / "replies.jsonl").read_text().splitlines()) == 6
    table = evaluation_table(figures)
    assert table.loc["implicit-reward accuracy", "tuned"] == "1.00 [1.00, 1.00]"
    page = side_by_side(frame, rows=2)
    assert page.count("<tr") == 3
    assert "cut off" in page


def test_html_of_a_reply_is_escaped(tiny_run):
    trainer, cfg = tiny_run()
    _, frame = evaluate(trainer, cfg, load_preferences(cfg)["test"])
    frame["tuned"] = "<script>alert(1)</script>"
    assert "<script>" not in side_by_side(frame)
