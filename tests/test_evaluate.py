"""Before against after: the figures are what they say they are."""

import json
import re
import resource
import shutil
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import PAIRS, explicit, token_rows, write_jsonl
from datasets import Dataset
from huggingface_hub import constants
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OpenAIGPTConfig,
)

from scripts.data import load_preferences
from scripts.evaluate import (
    PARTIAL,
    evaluate,
    implicit_rewards,
    judged_wins,
    pair_logps,
    replies_that_fit,
    restore_reference,
    save_evaluation,
)
from scripts.export import completion_logps
from scripts.intervals import AIMS, MET, MISSED, QUESTION_AIMS, TOO_FEW, bootstrap
from scripts.model import load_model, load_tokenizer
from scripts.pairs import generation
from scripts.pairs.generation import generate_replies
from scripts.pairs.judges import Endpoint
from scripts.pairs.text import are_facts
from scripts.planning.memory import process_gb
from scripts.plots import before_after
from scripts.probes import pick_prompts
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


def test_bootstrap_brackets_the_mean():
    values = np.random.default_rng(1).normal(10, 3, 200)
    figure = bootstrap(values)
    assert figure["low"] < figure["mean"] < figure["high"]
    # 1.96 standard errors either side, within what 10,000 draws scatter
    assert figure["high"] - figure["low"] == pytest.approx(3.92 * 3 / 200**0.5, rel=0.2)
    assert bootstrap(values) == figure  # no dice


def test_pairs_of_one_prompt_are_drawn_together():
    """Saying each value three times adds no information, so the interval must not narrow."""
    once = np.random.default_rng(2).normal(size=40)
    thrice = np.repeat(once, 3)
    names = [str(i) for i in np.repeat(np.random.default_rng(3).permutation(40), 3)]
    alone, clustered = bootstrap(once), bootstrap(thrice, prompts=names)
    assert clustered["mean"] == pytest.approx(alone["mean"])
    width = alone["high"] - alone["low"]
    assert clustered["high"] - clustered["low"] == pytest.approx(width, rel=0.05)
    assert clustered["prompts"] == 40
    as_if_independent = bootstrap(thrice)
    assert as_if_independent["high"] - as_if_independent["low"] < 0.7 * width


def test_prompts_with_more_pairs_weigh_more():
    figure = bootstrap([1, 1, 1, 0], prompts=["a", "a", "a", "b"])
    assert figure["mean"] == 0.75  # over pairs, as accuracy is
    assert (figure["low"], figure["high"]) == (0, 1)


def test_a_share_of_a_sum():
    base, tuned = np.array([100, 10, 40]), np.array([50, 10, 20])
    figure = bootstrap(base - tuned, per=base)
    assert figure["mean"] == pytest.approx(1 - 80 / 150)
    assert (figure["low"], figure["high"]) == (0, 0.5)  # the same prompt three times


def test_degenerate_values_have_a_figure():
    assert bootstrap([3.0]) == {"mean": 3, "low": None, "high": None, "prompts": 1}
    assert bootstrap([1, 0], prompts=["a", "a"])["low"] is None
    assert bootstrap([2.0] * 50) == {"mean": 2, "low": 2, "high": 2, "prompts": 50}
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: aim.figure)
def test_little_data_meets_no_aim(aim):
    """Four prompts, whatever they show: a loss, a gain, or nothing at all."""
    for values in ([-0.37, -0.9, 0.1, -0.3], [0.9, 0.8, 0.9, 1.0], [0.0] * 4, [1.0] * 4, [0.5]):
        assert aim.verdict(bootstrap(values)) == TOO_FEW


def test_a_margin_is_met_missed_or_open():
    facts = next(aim for aim in AIMS if aim.figure == "facts")
    noise = np.random.default_rng(4).normal(0, 0.1, 400)
    assert facts.verdict(bootstrap(noise)) == MET
    assert facts.verdict(bootstrap(noise - 0.37)) == MISSED
    assert facts.verdict(bootstrap(noise - 0.05)) == TOO_FEW
    wide = bootstrap(np.tile([-0.5, 0.5], 20))  # reaches above 0, and far below the margin
    assert wide["high"] > 0 and facts.verdict(wide) == TOO_FEW
    repeated = next(aim for aim in AIMS if aim.figure == "repeated")  # here more is worse
    assert repeated.verdict(bootstrap(noise - 0.37)) == MET
    assert repeated.verdict(bootstrap(noise + 0.37)) == MISSED


@pytest.mark.parametrize("prompts", [30, 60])
def test_a_loss_beyond_the_margin_is_rarely_called_met(prompts):
    """True loss just at the margin, on shares like those of key facts: met in few of 300 runs."""
    facts = next(aim for aim in AIMS if aim.figure == "facts")
    rng, met = np.random.default_rng(6), 0
    for _ in range(300):
        change = rng.choice([-1, -0.5, 0, 0.5, 1], prompts, p=[0.1, 0.2, 0.45, 0.2, 0.05])
        met += facts.verdict(bootstrap(change, draws=500)) == MET
    assert met / 300 < 0.06  # 2.5% is nominal


def test_prompts_are_drawn_by_seed_once_each_and_in_order():
    prompts = [[{"role": "user", "content": str(i % 50)}] for i in range(100)]
    assert pick_prompts(prompts, None, 0) == pick_prompts(prompts, 60, 0) == list(range(50))
    some = pick_prompts(prompts, 10, 0)
    assert some == sorted(set(some)) == pick_prompts(prompts, 10, 0) and len(some) == 10
    assert some != list(range(10)) and some != pick_prompts(prompts, 10, 1)


def test_implicit_rewards_by_hand():
    logps = {
        "chosen": np.array([-10.0]), "ref_chosen": np.array([-12.0]),
        "rejected": np.array([-30.0]), "ref_rejected": np.array([-25.0]),
    }  # fmt: skip
    chosen, rejected = implicit_rewards(logps, beta=0.1)
    assert chosen == pytest.approx([0.2])
    assert rejected == pytest.approx([-0.5])


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


def test_batched_replies_equal_single_ones_and_know_their_end(tiny_cfg):
    cfg = tiny_cfg()
    path = cfg.model.model_name_or_path
    model, tokenizer = load_model(cfg, path), load_tokenizer(path)
    prompts = [[{"role": "user", "content": "x" * n}] for n in (40, 3, 17)]
    kwargs = {"max_new_tokens": 8}
    batched = generate_replies(model, tokenizer, prompts, batch_size=3, **kwargs)
    single = [generate_replies(model, tokenizer, [p], batch_size=1, **kwargs)[0] for p in prompts]
    assert [(r.ids, r.prompt_ids) for r in batched] == [(r.ids, r.prompt_ids) for r in single]
    assert "\n\nxxx<|eot_id|>" in tokenizer.decode(batched[1].prompt_ids)
    assert all(not r.finished and r.length == 8 for r in batched)
    with torch.no_grad():  # a head that can only say "end of turn"
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
    model.generation_config.eos_token_id = [5, 0]  # every logit ties; greedy takes the first: 0
    ended = generate_replies(model, tokenizer, prompts, batch_size=3, **kwargs)
    assert all(r.finished and r.ids == [0] and r.length == 0 for r in ended)


SMALL = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES = {
    "llama": (LlamaConfig(**GROUPED), True),
    "sliding window": (MistralConfig(**GROUPED, sliding_window=6), True),
    "learned positions": (GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4), True),
    "recurrent": (MambaConfig(vocab_size=80, hidden_size=32, num_hidden_layers=2), False),
    "no cache": (OpenAIGPTConfig(vocab_size=80, n_embd=32, n_layer=2, n_head=4), False),
    "positions by the longest row": (
        LlamaConfig(
            **GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        False,
    ),
    "a cache of its own": (LlamaConfig(**GROUPED), False),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_replies_that_have_ended_leave_the_batch_and_change_no_other(name, monkeypatch):
    """Against every row alone and in one go; ends are spread by letting many tokens end a reply."""
    config, shrinks = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that replies differ
    if name == "a cache of its own":
        model.generation_config.cache_implementation = "dynamic"
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(8, 80, (n,), generator=drawn) for n in (9, 4, 7, 12, 5, 9, 3, 8)]
    longest = max(map(len, prompts))
    left = [(longest - len(prompt), 0) for prompt in prompts]
    padded = {
        "input_ids": torch.stack([pad(p, by) for p, by in zip(prompts, left, strict=True)]),
        "attention_mask": torch.stack(
            [pad(torch.ones_like(p), by) for p, by in zip(prompts, left, strict=True)]
        ),
    }

    def settings(stops=(1,)):
        return GenerationConfig(
            max_new_tokens=30, do_sample=False, eos_token_id=list(stops), pad_token_id=0
        )

    if name in ("recurrent", "no cache"):  # no mask for padding: against the batch in one go
        alone = model.generate(**padded, generation_config=settings())[:, longest:].tolist()
    else:
        alone = [
            model.generate(prompt[None], generation_config=settings())[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    stops = {1, alone[0][2], alone[1][13]}  # two of the tokens that the model says
    expected = [
        ids[: next((n + 1 for n, i in enumerate(ids) if i in stops), len(ids))] for ids in alone
    ]
    assert len({len(ids) for ids in expected}) > 1  # some end early, some late
    batches = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: batches.append(len(x[0])))
    monkeypatch.setattr(generation, "EVERY", 4)
    found = generation._generate(model, padded, settings(stops))
    assert [ids[: len(e)] for ids, e in zip(found, expected, strict=True)] == expected
    assert all(set(ids[len(e) :]) <= {0} for ids, e in zip(found, expected, strict=True))
    assert (min(batches) < len(prompts)) == shrinks


def test_an_untrained_adapter_changes_nothing(tiny_run):
    trainer, cfg = tiny_run(ld_alpha=0.5)
    figures, frame = evaluate(trainer, cfg, load_preferences(cfg)["test"])
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
    assert figures["reward_accuracy"]["prompts"] == figures["reward_margin"]["prompts"] == 6
    assert figures["reward_margin"]["low"] > 0
    assert 0 <= figures["measures"]["facts"]["base"]["mean"] <= 1
    assert (cfg.run_dir / PARTIAL).exists()
    save_evaluation(figures, frame, cfg.run_dir)
    assert json.loads((cfg.run_dir / "evaluation.json").read_text()) == figures
    assert len((cfg.run_dir / "replies.jsonl").read_text().splitlines()) == 6
    assert not (cfg.run_dir / PARTIAL).exists()
    table = evaluation_table(figures)
    assert table.loc["implicit-reward accuracy", "tuned"] == "1.00 [1.00, 1.00]"
    page = side_by_side(frame.head(2))
    assert page.count("<tr") == 3
    assert "cut off" in page


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_evaluation_begins_without_what_training_has_let_go(tiny_run):
    """A run on a CPU keeps freed blocks, and blocks of other sizes would come on top of them."""
    trainer, cfg = tiny_run()
    blocks = [torch.ones(2**20) for _ in range(256)]
    del blocks
    held = process_gb()
    evaluate(trainer, cfg, load_preferences(cfg)["test"])
    assert process_gb() < held - 0.5


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


def test_replies_of_the_base_outlive_a_failure_of_the_tuned_model(tiny_run):
    trainer, cfg = tiny_run(prefix_sharing=False)

    def fail(*_):  # the adapter's own layers run only while it is on
        raise RuntimeError("out of memory")

    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(trainer, cfg, load_preferences(cfg)["test"])
    saved = [json.loads(line) for line in (cfg.run_dir / PARTIAL).read_text().splitlines()]
    assert [row["prompt"] for row in saved] == [prompt for prompt, *_ in PAIRS[4:]]
    assert all(row["base"] and row["base_length"] == 6 for row in saved)


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
    assert "out of memory; trying again with 1 replies at a time" in capsys.readouterr().out
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
    pairs = load_preferences(cfg)
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


def test_facts_in_another_form_are_not_measured():
    assert are_facts([["Rayleigh"], ["scatter", "bounce"]]) and are_facts([])
    for odd in (["Rayleigh"], [[""]], '[["Rayleigh"]]', [[]], [[1]]):
        assert not are_facts(odd)


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
    figures, frame = evaluate(trainer, cfg, load_preferences(cfg)["test"])
    assert list(frame["question"]) == ["How much is the blue bag?", "Who sews it?"] * 2
    assert frame["prompt"][0] == "The blue bag costs 20 dollars.\n\nHow much is the blue bag?"
    # A random model says nothing of use; an untrained adapter changes nothing.
    assert figures["measures"]["exact"]["base"]["mean"] == 0
    assert figures["measures"]["exact"]["change"] == {"mean": 0, "low": 0, "high": 0, "prompts": 2}
    assert (
        figures["measures"]["declined"]["base"]["prompts"] == 2
    )  # two passages, one question each
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


def judged(**replies) -> pd.DataFrame:
    """A frame of two models' marks: exact, right in the first sentence, made-up sentences."""
    rows = []
    for name, (base, tuned) in replies.items():
        row = {"prompt": name}
        for who, (exact, first, made_up) in (("base", base), ("tuned", tuned)):
            row |= {f"{who}_exact": exact, f"{who}_first": first, f"{who}_unsupported": made_up}
        rows.append(row)
    return pd.DataFrame(rows)


def test_wins_and_losses_go_by_what_is_exact_and_then_by_the_first_sentence():
    good, late, bad, none = (1, 1, 0), (1, 0, 0), (0, 0, 1), (0, float("nan"), 0)
    frame = judged(
        win=(bad, good), nearer=(late, good), same=(good, good), loss=(good, bad),
        first_lost=(good, late), undecided=(none, none),
    )  # fmt: skip
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
    assert (
        list(judged_wins(frame, talks, Endpoint(loopback(lambda *_: (200, {}, first)), "m")))
        == [0.5] * 3
    )


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
    assert (
        measure["both_finish"]["mean"] == pytest.approx(0)
        and measure["both_finish"]["prompts"] == 2
    )


def test_aims_of_a_config_take_the_place_of_those_set_beforehand(tiny_run):
    aims = {"shorter": {"at_least": -1.0}, "finished": {"at_most": 0.1}, "no_such": {"at_least": 0}}
    trainer, cfg = tiny_run(aims=aims)
    figures, _ = evaluate(trainer, cfg, load_preferences(cfg)["test"])
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
