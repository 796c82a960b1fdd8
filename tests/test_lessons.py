"""The lessons: DPO by hand against TRL, compression against its definition, runs that fail."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import PAIRS, explicit, write_jsonl
from safetensors.torch import save_file

from scripts import plots
from scripts.base import RecipeError
from scripts.lessons import byhand, compression, failures
from scripts.lessons.__main__ import main as lessons

ROW = {"prompt_ids", "chosen_ids", "rejected_ids"}
BOTH_TERMS = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}


def pair(trainer, at=0):
    return {name: trainer.train_dataset[at][name] for name in ROW}


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("max_steps", [0, 3])
def test_by_hand_is_what_trl_says(tiny_trainer, sharing, max_steps):
    trainer = tiny_trainer(prefix_sharing=sharing, max_steps=max_steps or 1, **BOTH_TERMS)
    if max_steps:
        trainer.train()
    hand, trl = byhand.by_hand(trainer, pair(trainer)), byhand.by_trl(trainer, pair(trainer))
    table = byhand.against_trl(hand, trl, trainer.loss_types, trainer.loss_weights)
    assert {name.split(" (")[0] for name in table} == set(trl)
    assert "loss (sigmoid + sft)" in table  # which one TRL logs
    for name, (mine, theirs) in table.items():
        assert mine == pytest.approx(theirs, abs=2e-4), name
    assert hand.loss.item() == pytest.approx(math.log1p(math.exp(-hand.margin)), abs=1e-6)
    if max_steps:
        assert abs(hand.margin) > 1e-2
    else:
        assert hand.margin == 0
        assert hand.weight == 0.5
        assert hand.loss.item() == pytest.approx(math.log(2))


def test_the_gradient_is_the_papers_weight_times_the_difference(tiny_trainer):
    """Section 4: grad = -beta sigma(-margin) (grad log pi(chosen) - grad log pi(rejected))."""
    trainer = tiny_trainer(max_steps=2)
    trainer.train()
    row = pair(trainer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    hand = byhand.by_hand(trainer, row, grad=True)
    chosen, rejected = (
        torch.autograd.grad(hand.policy[side].sum(), parameters) for side in byhand.SIDES
    )
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator([row]))
    theirs = torch.autograd.grad(loss, parameters)
    scale = max(t.abs().max() for t in theirs)
    for c, r, t in zip(chosen, rejected, theirs, strict=True):
        mine = -hand.beta * hand.weight * (c - r)
        assert torch.allclose(mine, t, atol=1e-4 * scale)


def test_looking_at_a_pair_leaves_the_runs_log_alone(tiny_trainer):
    trainer = tiny_trainer(max_steps=1)
    byhand.by_trl(trainer, pair(trainer))
    assert not trainer._metrics["train"]
    trainer.train()
    batch = sum(len(i["prompt_ids"]) for i in trainer.train_dataset)
    assert 0 < trainer.state.log_history[0]["num_tokens"] < 4 * batch + 400


def test_tokens_are_coloured_by_sign_and_size_and_escaped():
    text = plots.coloured_answers({"after": (["<b>", "\n", "x"], [1.0, 0.0, -3.0])}, scale=2)
    assert "&lt;b&gt;" in text
    assert "<b>after</b>" in text
    assert "sum -2.00 nats" in text
    up, down = (text.index(f'title="{n}') for n in ("+1.00", "-3.00"))
    assert "0.28)" in text[up : up + 150]  # half of the strongest
    assert "solid #0072B2" in text[up : up + 150]
    assert "0.55)" in text[down : down + 150]
    assert "dotted #D55E00" in text[down : down + 150]
    assert "style" not in text[text.index('title="+0.00') :].split(">")[0]


def contrast(text, ground):
    """WCAG 2.1's ratio of two sRGB colours."""

    def light(rgb):
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(text), light(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page, text", [((1, 1, 1), (0, 0, 0)), ((0.07,) * 3, (0.88,) * 3)])
def test_coloured_tokens_are_readable_in_light_and_dark(page, text):
    from scripts.plots.style import BLUE, VERMILLION
    from scripts.plots.tokens import STRONGEST

    for colour in (BLUE, VERMILLION):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        ground = [STRONGEST * c + (1 - STRONGEST) * p for c, p in zip(rgb, page, strict=True)]
        assert contrast(text, ground) > 4.5


def test_nf4_beats_int4_on_bell_shaped_weights_and_the_second_rounding_costs_little():
    torch.manual_seed(0)
    errors = compression.quantization_errors(torch.randn(512, 512))
    assert errors["NF4"]["error"] < 0.95 * errors["int4"]["error"]
    assert errors["NF4"]["error"] < errors["NF4, double quantization"]["error"]
    assert errors["NF4, double quantization"]["error"] < 1.02 * errors["NF4"]["error"]
    assert errors["NF4, double quantization"]["bits"] == pytest.approx(4.127, abs=1e-3)


def test_nf4_takes_the_nearest_of_its_levels():
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    blocks = compression.in_blocks(weight)
    levels = compression.nf4_levels()
    assert len(levels) == 16
    nearest = levels[(blocks[..., None] - levels).abs().argmin(-1)]
    mine = (nearest * weight.reshape(-1, 64).abs().amax(1, keepdim=True)).reshape(weight.shape)
    assert torch.allclose(compression.to_nf4(weight, double=False), mine, atol=1e-5)


def test_a_weight_is_read_from_one_file_or_from_shards(tiny_llama3, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    assert compression.read_weight(str(tiny_llama3), name).shape == (64, 64)
    save_file({"a": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert compression.read_weight(str(tmp_path), "a").sum() == 4
    with pytest.raises(RecipeError, match="no weight `nosuch`"):
        compression.read_weight(str(tiny_llama3), "nosuch")


def test_spectrum_is_that_of_the_whole_update(tiny_trainer):
    trainer = tiny_trainer(max_steps=2)
    assert compression.update_spectrum(trainer.model, "layers.0.self_attn.q_proj").max() == 0
    trainer.train()
    values = compression.update_spectrum(trainer.model, "layers.0.self_attn.q_proj")
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    whole = torch.linalg.svdvals(layer.get_delta_weight("default").detach().float())
    assert torch.allclose(values, whole[: len(values)], atol=1e-5)
    assert compression.directions_for(torch.tensor([4.0, 1.0, 0.1]), 0.9) == 1
    assert compression.directions_for(torch.tensor([1.0, 1.0, 1.0]), 0.9) == 3
    with pytest.raises(RecipeError, match="2 adapted layers"):
        compression.update_spectrum(trainer.model, "self_attn.q_proj")


def test_logits_of_a_large_vocabulary_cost_memory_that_rows_at_a_time_do_not():
    head = compression.Head(tokens=256, hidden=64)
    peaks = compression.head_memory(head)
    assert peaks["all at once"] > 2 * head.logits_gb
    assert peaks["a few rows at a time"] < peaks["all at once"] / 2


def test_beta_surface_is_the_loss_and_flat_along_the_diagonal():
    figure = plots.beta_surface((0.1,), points={"chosen": [1.0], "rejected": [-2.0]})
    axis = figure.axes[0]
    assert "beta 0.1" in figure.get_label()
    (dots,) = [line for line in axis.lines if line.get_marker() == "o"]
    assert (dots.get_xdata()[0], dots.get_ydata()[0]) == (1.0, -2.0)
    drawn = axis.collections[-1]
    for level, path in zip(drawn.levels, drawn.get_paths(), strict=True):
        margin = 0.1 * (path.vertices[:, 0] - path.vertices[:, 1])
        assert np.log1p(np.exp(-margin)) == pytest.approx(level, abs=1e-3)


def hand(chosen: float, rejected: float, beta: float) -> byhand.ByHand:
    """A pair of one token an answer, with these log-ratios."""
    policy = {"chosen": torch.tensor([chosen]), "rejected": torch.tensor([rejected])}
    return byhand.ByHand(policy, dict.fromkeys(policy, torch.zeros(1)), beta)


def test_weights_in_memory_are_what_the_plan_and_the_model_say(tiny_cfg, tiny_llama3):
    from transformers import AutoConfig

    from scripts.plan_memory import model_sizes, stored

    cfg = tiny_cfg(load_in_4bit=True, dtype="bfloat16")
    parts = stored(cfg, model_sizes(cfg))
    planned = parts["weights"]
    counted = compression.weights_gb(AutoConfig.from_pretrained(tiny_llama3))
    assert counted["GB in NF4"] * compression.GB == pytest.approx(planned, rel=1e-3)
    full = counted["GB in NF4"] / counted["NF4 / 16 bits"]
    assert counted["GB in 16 bits"] == pytest.approx(full)


@pytest.fixture
def many_pairs(tmp_path):
    """Pairs of many lengths, of which every third has the longer answer chosen, and a folder for
    them; what was asked, with what counts as right, stands beside."""
    rows = []
    for i in range(4):
        for n, (prompt, brief, long) in enumerate(PAIRS):
            right, wrong = (long, brief) if n % 3 == 0 else (brief, long * (1 + i % 3))
            asked = {"question": prompt, "accept": [right], "wrong": ["nothing"]}
            asked["answerable"] = n != 1
            rows.append(explicit(f"Question {i}: {prompt}", right, wrong) | asked)
    write_jsonl(tmp_path / "pairs" / "train.jsonl", rows[:18])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", rows[18:])
    return tmp_path / "pairs"


def test_one_command_runs_the_arms_and_the_figures_draw_its_file(tiny_cfg, many_pairs, tmp_path):
    cfg = tiny_cfg(dataset_name=str(many_pairs), max_steps=-1)
    cfg.save(tmp_path / "config.yaml")
    from scripts.cli import parse

    words = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "lessons.json")]
    sizes = {"pairs": 6, "held-out": 4, "epochs": 1, "prompts": 2, "max-new-tokens": 4}
    words += [f"--{name}={number}" for name, number in sizes.items()]
    lessons(parse("lessons", words))
    results = json.loads((tmp_path / "lessons.json").read_text())
    assert list(results["arms"]) == list(failures.ARMS)
    assert results["command"].startswith("python -m scripts.lessons")
    assert results["machine"]["torch"] == torch.__version__
    alone, sft, fifth, lopsided, norm = results["arms"].values()
    for arm in (alone, lopsided, norm):
        assert arm["steps"]["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    terms = [arm["steps"]["loss"][0] - math.log(2) for arm in (sft, fifth)]
    assert terms[0] > 2  # a random model's loss a token
    assert terms[1] == pytest.approx(terms[0] / 5, rel=1e-3)
    apart = [abs(math.log(a["pairs"]["rejected"] / a["pairs"]["chosen"])) for a in (alone, norm)]
    assert apart[0] < apart[1]
    assert {arm["pairs"]["count"] for arm in (alone, norm)} == {6}
    for arm in (alone, norm):
        held = arm["held_out"]
        assert np.sign(held["length_gap"]).sum() == 0  # half of them one way, half the other
        for name, side in (("chosen longer", -1), ("chosen shorter", 1)):
            won = [m > 0 for m, g in zip(held["margin"], held["length_gap"], strict=True)
                   if np.sign(g) == side]  # fmt: skip
            assert held["accuracy"][name] == pytest.approx(np.mean(won))
    whole = np.subtract(alone["held_out"]["chosen"], alone["held_out"]["rejected"])
    assert alone["held_out"]["margin"] == pytest.approx(whole, abs=2e-3)
    assert np.abs(norm["held_out"]["margin"]).max() < np.abs(norm["held_out"]["chosen"]).max()
    frame = failures.table(results)
    assert list(frame.index) == ["before training", *(a.title for a in failures.ARMS.values())]
    assert frame["key facts"].notna().all()
    fell = "rose" if np.mean(alone["held_out"]["chosen"]) > 0 else "fell"
    assert f"DPO alone: held-out chosen answers {fell}" in failures.displacement_in_words(results)
    share = lopsided["held_out"]["accuracy"]["chosen longer"]
    assert f"lopsided pairs: {share:.0%} right where" in failures.length_in_words(results)
    for figure in (plots.displacement(results), plots.length_hacking(results)):
        assert "DPO alone" in figure.get_label() or "pairs of like length" in figure.get_label()


def test_questions_without_an_answer_are_left_out(tiny_cfg, many_pairs):
    from scripts.data import load_preferences

    cfg = tiny_cfg(dataset_name=str(many_pairs))
    pairs = load_preferences(cfg)
    kept = failures.answered(pairs)
    assert len(kept["train"]) < 18
    assert all(kept["train"]["answerable"])


def test_a_right_reply_has_the_answer_and_no_wrong_one():
    from datasets import Dataset

    from scripts.pairs.generation import Reply

    row = {"question": "When?", "accept": ["Monday"], "wrong": ["Friday"], "answerable": True}
    texts = ["On Monday.", "On Friday.", "On Monday or Friday.", ""]
    replies = [Reply(text, [1], True, [1]) for text in texts]
    assert failures._right(Dataset.from_list([row] * 4), replies) == 0.25
    facts = Dataset.from_list([{"facts": [["Monday"], ["noon"]]}] * 4)
    assert failures._right(facts, replies) == 0.25
    assert failures._right(Dataset.from_list([{"id": 1}] * 4), replies) is None


def test_an_unknown_arm_is_named(tmp_path):
    from scripts.cli import parse

    with pytest.raises(RecipeError, match="no arm `wine`; there are alone"):
        lessons(parse("lessons", ["--arms", "wine", "--out", str(tmp_path / "x.json")]))


def test_a_layer_that_is_not_there_is_not_adapted(tiny_trainer):
    model = tiny_trainer().model
    assert compression.is_adapted(model, "layers.0.self_attn.q_proj")
    assert not compression.is_adapted(model, "layers.15.self_attn.q_proj")
