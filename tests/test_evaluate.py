"""Before against after: the figures are what they say they are."""

import json
import re
import resource
import shutil
from functools import partial

import pandas as pd
import pytest
import torch
from conftest import PAIRS, explicit, pairs_of, token_rows, write_jsonl
from datasets import Dataset
from huggingface_hub import constants
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from scripts.evaluate import (
    evaluate,
    implicit_rewards,
    judged_wins,
    pair_logps,
    replies_that_fit,
    restore_reference,
    save_evaluation,
)
from scripts.export import completion_logps
from scripts.intervals import QUESTION_AIMS, TOO_FEW
from scripts.model import load_model, load_tokenizer
from scripts.pairs.generation import generate_replies
from scripts.pairs.judges import Endpoint
from scripts.plots import before_after
from scripts.tables import (
    BASELINES,
    baselines_table,
    checked_wins,
    compared,
    evaluation_table,
    losses,
    side_by_side,
)
from scripts.training import assemble


@pytest.mark.parametrize(
    "settings",
    [
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.5, "prefix_sharing": False},
        {"precompute_ref_log_probs": True, "f_divergence_type": "js_divergence"},
        {"use_peft": False, "ld_alpha": 0.5},
        {"use_peft": False, "precompute_ref_log_probs": True},
        {"use_peft": False, "sync_ref_model": True, "ref_model_sync_steps": 1},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_rewards_are_log_ratios_of_whole_answers(tiny_run, settings):
    """Untrained: exactly 0. Trained: log-softmaxes of whole logits, row by row, two models."""
    trainer, cfg = tiny_run(**settings, max_steps=1)
    rows = token_rows(trainer)
    restore_reference(trainer, cfg)
    for reward in implicit_rewards(pair_logps(trainer, rows), trainer.beta):
        assert (reward == 0).all()
    trainer.train()
    restore_reference(trainer, cfg)
    logps = pair_logps(trainer, rows)
    base = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path)
    for name, model in {"": trainer.model.eval(), "ref_": base}.items():
        for side in ("chosen", "rejected"):
            pairs = [{**row, "chosen_ids": row[f"{side}_ids"]} for row in rows]
            by_hand = [x.sum().item() for x in completion_logps(model, pairs)]
            assert logps[name + side] == pytest.approx(by_hand, abs=2e-4), name + side
    assert abs(logps["chosen"] - logps["ref_chosen"]).max() > 0.01  # it was trained


@pytest.mark.parametrize("beforehand", [False, True])
def test_the_reference_of_a_whole_model_is_of_its_revision(
    tiny_run, tiny_llama3, tmp_path, monkeypatch, beforehand
):
    """Two revisions in the hub's cache; the second one is tuned, and is its own reference."""
    cache = tmp_path / "hub" / "models--tiny--chat"
    (cache / "refs").mkdir(parents=True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (cache / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_llama3, cache / "snapshots" / commit)
    other = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    other.lm_head.weight.data.mul_(2)
    other.save_pretrained(cache / "snapshots" / ("b" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = {"model_name_or_path": "tiny/chat", "model_revision": "v2", "use_peft": False}
    trainer, cfg = tiny_run(**settings, precompute_ref_log_probs=beforehand)
    restore_reference(trainer, cfg)
    logps = pair_logps(trainer, token_rows(trainer))
    assert (logps["chosen"] == logps["ref_chosen"]).all()


def test_batched_replies_equal_single_ones_and_know_their_end(tiny_cfg, llama3_vocabulary):
    cfg = tiny_cfg(model_name_or_path=str(llama3_vocabulary))  # which does not repeat itself
    path = cfg.model.model_name_or_path
    model, tokenizer = load_model(cfg, path), load_tokenizer(path)
    prompts = [[{"role": "user", "content": "x" * n}] for n in (40, 3, 17)]
    ask = partial(generate_replies, model, tokenizer, max_new_tokens=8, label=None)
    whole = ask(prompts, batch_size=3)
    assert "\n\nxxx<|eot_id|>" in tokenizer.decode(whole[1].prompt_ids)
    assert all(not reply.finished and reply.length == 8 for reply in whole)
    end = whole[0].ids[2]  # let one reply end early
    model.generation_config.eos_token_id = [5, end]
    batched = ask(prompts, batch_size=3)
    assert batched == [ask([prompt], batch_size=1)[0] for prompt in prompts]
    assert batched[0].finished and batched[0].length == 2 and batched[0].ids[-1] == end
    assert not all(reply.finished for reply in batched)


def test_an_untrained_adapter_changes_nothing(tiny_run):
    trainer, cfg = tiny_run(ld_alpha=0.5)
    figures, frame = evaluate(trainer, cfg, pairs_of(cfg)["test"])
    assert (frame["base"] == frame["tuned"]).all()
    nothing = {"mean": 0, "low": 0, "high": 0, "prompts": 2}
    assert figures["shorter"] == figures["reward_margin"] == nothing
    assert figures["measures"]["base_nll"]["change"] == nothing
    assert figures["reward_accuracy"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "prompts": 2}
    assert set(figures["targets"].values()) == {TOO_FEW}
    assert "facts" not in figures["measures"]  # these pairs list none


def test_base_loss_is_that_of_the_model_itself(tiny_run):
    """Replies picked greedily by the base: its loss per token, from its own log-softmax."""
    trainer, cfg = tiny_run()
    test = pairs_of(cfg)["test"]
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
    figures, frame = evaluate(trainer, cfg, pairs_of(cfg)["test"])
    assert (figures["prompts"], figures["pairs"]) == (6, 7)
    assert figures["reward_accuracy"]["mean"] == 1.0  # as good as seen in training
    assert figures["reward_accuracy"]["prompts"] == figures["reward_margin"]["prompts"] == 6
    assert figures["reward_margin"]["low"] > 0
    assert 0 <= figures["measures"]["facts"]["base"]["mean"] <= 1
    save_evaluation(figures, frame, cfg.run_dir)
    assert json.loads((cfg.run_dir / "evaluation.json").read_text()) == figures
    assert len((cfg.run_dir / "replies.jsonl").read_text().splitlines()) == 6
    table = evaluation_table(figures)
    assert table.loc["implicit-reward accuracy", "tuned"] == "1.00 [1.00, 1.00]"
    page = side_by_side(frame.head(2))
    assert page.count("<tr") == 3
    assert "cut off" in page


def test_the_head_is_not_copied_for_every_reply(tiny_trainer):
    """The logits of the prompts' last tokens, whose product with frozen weights torch would else
    make of as many copies of them."""
    trainer = tiny_trainer()
    vocabulary, factors = len(trainer.processing_class), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
                factors.append(tuple(args[1].shape))
            return function(*args, **(kwargs or {}))

    prompts = [[{"role": "user", "content": word}] for word in ("Why?", "Why not?", "How so?")]
    with Products():
        generate_replies(
            trainer.model, trainer.processing_class, prompts, max_new_tokens=2, batch_size=3
        )
    heads = {shape for shape in factors if shape[-1] >= vocabulary}
    assert heads and all(len(shape) == 2 for shape in heads), heads


def test_replies_that_memory_does_not_hold_are_had_fewer_at_a_time(tiny_run, capsys):
    trainer, cfg = tiny_run(generation_batch_size=4)
    sizes = []

    def full(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = trainer.model.get_input_embeddings().register_forward_pre_hook(full)
    replies = [{"role": "user", "content": word} for word in ("Why?", "Why not?", "How so?")]
    made = replies_that_fit(trainer, cfg, trainer.model, [[r] for r in replies], None, "tuned")
    assert len(made) == 3 and sizes[0] == 3 and set(sizes[2:]) == {1}
    assert "out of memory; trying again, 1 at a time" in capsys.readouterr().out
    hook.remove()
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replies_that_fit(trainer, cfg, trainer.model, [[r] for r in replies], None, "tuned")


def test_one_prompt_is_evaluated_without_an_interval(tiny_cfg, tmp_path):
    cfg = tiny_cfg(eval_prompts=1, max_new_tokens=2)
    run = assemble(cfg)
    figures, frame = evaluate(run.trainer, cfg, run.pairs["test"])
    save_evaluation(figures, frame, cfg.run_dir)  # strict JSON: no NaN
    table = evaluation_table(figures)
    assert table.loc["reply length (tokens)", "base"] == "2.00 [one prompt]"
    before_after(figures, frame).savefig(tmp_path / "figure.png")


def test_pairs_that_the_trainer_leaves_out_are_no_pairs(tiny_cfg, tmp_path):
    """A prompt as long as `max_length` leaves no room for an answer, and TRL drops its pairs."""
    cfg = tiny_cfg(max_length=120, max_new_tokens=2)
    pairs = pairs_of(cfg)
    long = explicit("why " * 100, "No.", "Yes, and at length.")
    pairs["test"] = Dataset.from_list([long, *(explicit(*pair) for pair in PAIRS[4:])])
    run = assemble(cfg, pairs)
    figures, _ = evaluate(run.trainer, cfg, run.pairs["test"])
    assert (figures["prompts"], figures["pairs"]) == (3, 2)
    assert figures["reward_margin"]["prompts"] == 2


def test_html_of_a_reply_is_escaped():
    row = {"prompt": "<i>", "base": "<b>", "tuned": "<script>alert(1)</script>"}
    row |= {f"{who}_{k}": 1 for who in ("base", "tuned") for k in ("length", "finished")}
    page = side_by_side(pd.DataFrame([row]))
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;i&gt;" in page


def test_temperature_0_is_greedy(tiny_trainer):
    trainer = tiny_trainer()
    prompt = [[{"role": "user", "content": "Why?"}]]
    ask = partial(
        generate_replies, trainer.model, trainer.processing_class, prompt, max_new_tokens=5,
        batch_size=1, label=None,
    )  # fmt: skip
    assert ask(temperature=0.0, top_p=0.9)[0].ids == ask()[0].ids


PASSAGES = [
    {
        "id": f"p{n}", "split": split, "level": "plain",
        "passage": f"The blue bag costs {n} dollars.",
        "questions": [
            {"question": "How much is the blue bag?", "answerable": True,
             "accept": [f"{n} dollars"], "wrong": ["900 dollars"]},
            {"question": "Who sews it?", "answerable": False, "accept": [], "wrong": ["Abel"]},
        ],
    }
    for n, split in ((20, "test"), (30, "test"), (40, "train"))
]  # fmt: skip


def test_questions_on_texts_are_checked_with_baselines_side_probes_and_win_rate(tiny_run, tmp_path):
    questions = write_jsonl(tmp_path / "passages.jsonl", PASSAGES)
    trainer, cfg = tiny_run(
        questions=str(questions), questions_level="plain", baselines=True, side_prompts=2,
        max_new_tokens=4,
    )  # fmt: skip
    figures, frame = evaluate(trainer, cfg, pairs_of(cfg)["test"])
    assert list(frame["question"]) == ["How much is the blue bag?", "Who sews it?"] * 2
    assert frame["prompt"][0] == "The blue bag costs 20 dollars.\n\nHow much is the blue bag?"
    # A random model says nothing of use; an untrained adapter changes nothing.
    assert figures["measures"]["exact"]["base"]["mean"] == 0
    assert figures["measures"]["exact"]["change"] == {"mean": 0, "low": 0, "high": 0, "prompts": 2}
    declined = figures["measures"]["declined"]["base"]
    assert declined["prompts"] == 2  # two passages, one question each
    assert figures["win_rate"]["raw"]["mean"] == 0.5
    assert set(figures["beside"]) == {"passages trained on", "plain questions", "instructions"}
    assert "follows" in figures["beside"]["instructions"]
    assert "facts" in figures["beside"]["plain questions"]
    assert list(figures["baselines"]) == list(BASELINES.values())
    assert set(figures["targets"]) == {aim.text for aim in QUESTION_AIMS}
    assert list(baselines_table(figures).columns) == ["base", *BASELINES.values(), "tuned with DPO"]
    save_evaluation(figures, frame, cfg.run_dir)
    assert "✗ not right" in side_by_side(frame)
    before_after(figures, frame).savefig(tmp_path / "figure.png")


def test_wins_and_losses_go_by_what_is_exact_and_then_by_the_first_sentence():
    good, late, bad, none = (1, 1, 0), (1, 0, 0), (0, 0, 1), (0, float("nan"), 0)
    cases = {
        "win": (bad, good), "nearer": (late, good), "same": (good, good), "loss": (good, bad),
        "first_lost": (good, late), "undecided": (none, none),
    }  # fmt: skip
    marks = [
        f"{who}_{name}" for who in ("base", "tuned") for name in ("exact", "first", "unsupported")
    ]
    frame = pd.DataFrame([base + tuned for base, tuned in cases.values()], columns=marks)
    frame["prompt"] = list(cases)
    assert list(checked_wins(frame)) == [1, 1, 0.5, 0, 0, 0.5]
    assert list(losses(frame)["prompt"]) == ["loss", "first_lost"]


def test_an_endpoint_judges_the_replies_in_both_orders(loopback):
    """A judge that likes "good", and one that always likes what it reads first."""
    frame = pd.DataFrame(
        {
            "base": ["bad", "good", "bad"], "tuned": ["good", "bad", "bad too"],
            "base_length": [1, 1, 1], "tuned_length": [1, 1, 2],
        }
    )  # fmt: skip
    talks = [[{"role": "user", "content": "Why?"}]] * 3

    def likes_good(path, body):
        asked = json.loads(body)["messages"][0]["content"]
        a, b = re.search(r"Answer A\n(.*)\n\n### Answer B\n(.*)\n\nReply", asked).groups()
        winner = "tie" if ("good" in a) == ("good" in b) else "A" if "good" in a else "B"
        content = json.dumps({"choices": [{"message": {"content": f'{{"winner": "{winner}"}}'}}]})
        return 200, {}, content.encode()

    assert list(judged_wins(frame, talks, Endpoint(loopback(likes_good), "m"))) == [1, 0, 0.5]
    first = json.dumps({"choices": [{"message": {"content": '{"winner": "A"}'}}]}).encode()
    always_first = Endpoint(loopback(lambda *_: (200, {}, first)), "m")
    assert list(judged_wins(frame, talks, always_first)) == [0.5] * 3


def test_a_gain_that_only_cut_off_replies_show_is_gone_where_both_finish():
    frame = pd.DataFrame(
        {
            "cluster": ["a", "b", "c", "d"],
            "base_finished": [True, True, False, False], "tuned_finished": [True] * 4,
            "base_repeated": [0.1, 0.1, 0.9, 0.9], "tuned_repeated": [0.1] * 4,
        }
    )  # fmt: skip
    measure = compared(frame)["repeated"]
    assert measure["change"]["mean"] == pytest.approx(-0.4)
    assert measure["both_finish"]["mean"] == pytest.approx(0)
    assert measure["both_finish"]["prompts"] == 2


def test_aims_of_a_config_take_the_place_of_those_set_beforehand(tiny_run):
    aims = {"shorter": {"at_least": -1.0}, "finished": {"at_most": 0.1}, "no_such": {"at_least": 0}}
    trainer, cfg = tiny_run(aims=aims)
    figures, _ = evaluate(trainer, cfg, pairs_of(cfg)["test"])
    assert set(figures["targets"]) == {"shorter at least -1", "finished at most 0.1"}


def test_a_full_disk_leaves_the_earlier_evaluation(tmp_path):
    save_evaluation({"pairs": 1}, pd.DataFrame({"base": ["a"]}), tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(OSError):
            save_evaluation({"pairs": 2}, pd.DataFrame({"base": ["b" * 99]}), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
