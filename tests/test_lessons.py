"""The tutorial: its cells against TRL and the definitions, its runs, and the whole of it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import PAIRS, explicit, write_jsonl
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from scripts import lessons, plots
from scripts.adapter import save_adapter
from scripts.base import ROOT, RecipeError
from scripts.evaluate import reference
from scripts.plan_memory import model_sizes
from tests.tutorial import TUTORIAL, run_cells

ROW = ("prompt_ids", "chosen_ids", "rejected_ids")
by_hand = run_cells("logps", "dpo")
four_bits = run_cells("nf4")


def scored(trainer) -> tuple[dict, dict, dict]:
    """The first pair that `trainer` trains on, and both models' log-probabilities of it."""
    row = {name: trainer.train_dataset[0][name] for name in ROW}
    trainer.model.eval()
    with reference(trainer) as model, torch.no_grad():
        before = by_hand.score(model, row)
    return row, by_hand.score(trainer.model, row), before


@pytest.mark.parametrize("max_steps", [0, 3])
def test_by_hand_is_what_trl_says(tiny_trainer, max_steps):
    trainer = tiny_trainer(max_steps=max_steps or 1, prefix_sharing=False)
    if max_steps:
        trainer.train()
    _, policy, before = scored(trainer)
    hand = by_hand.dpo(policy, before, trainer.beta)
    theirs = trainer.evaluate(trainer.train_dataset.select([0]))
    names = {"DPO loss": "loss", "margin": "rewards/margins", "chosen reward": "rewards/chosen",
             "rejected reward": "rewards/rejected", "chosen log-probability": "logps/chosen",
             "rejected log-probability": "logps/rejected"}  # fmt: skip
    for name, key in names.items():
        assert hand[name].item() == pytest.approx(theirs[f"eval_{key}"], abs=2e-4), name
    assert hand["weight of the gradient"].item() == pytest.approx(
        1 / (1 + math.exp(hand["margin"].item())), abs=1e-6
    )
    if max_steps:
        assert abs(hand["margin"]) > 1e-2
    else:
        assert hand["margin"] == 0 and hand["DPO loss"].item() == pytest.approx(math.log(2))


def test_the_gradient_is_the_papers_weight_times_the_difference(tiny_trainer):
    """Section 4: grad = -beta sigma(-margin) (grad log pi(chosen) - grad log pi(rejected))."""
    trainer = tiny_trainer(max_steps=2)
    trainer.train()
    row, policy, before = scored(trainer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    weight = by_hand.dpo(policy, before, trainer.beta)["weight of the gradient"].detach()
    chosen, rejected = (
        torch.autograd.grad(policy[side].sum(), parameters) for side in ("chosen", "rejected")
    )
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator([row]))
    theirs = torch.autograd.grad(loss, parameters)
    scale = max(t.abs().max() for t in theirs)
    for c, r, t in zip(chosen, rejected, theirs, strict=True):
        assert torch.allclose(-trainer.beta * weight * (c - r), t, atol=1e-4 * scale)


def test_nf4_beats_int4_on_bell_shaped_weights_and_the_second_rounding_costs_little():
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    once, twice = (four_bits.error(four_bits.to_nf4(weight, d), weight) for d in (False, True))
    assert once < 0.95 * four_bits.error(four_bits.to_int4(weight), weight)
    assert once < twice < 1.02 * once
    assert pytest.approx(4.127, abs=1e-3) == four_bits.TWICE


def test_a_weight_is_read_from_one_file_or_from_shards(tiny_llama3, tmp_path):
    read = run_cells("weight").read_weight
    name = "model.layers.0.self_attn.q_proj.weight"
    assert read(str(tiny_llama3), name).shape == (64, 64)
    assert read(str(tiny_llama3), "nosuch") is None
    assert read(str(tmp_path), "a") is None
    save_file({"a": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read(str(tmp_path), "a").sum() == 4


def sizes_in_gb(config) -> dict[str, float]:
    """The cell's count, which ends with a table of the run's model; here `config` is the run's."""
    given = {"torch": torch, "pd": pd, "AutoModelForCausalLM": AutoModelForCausalLM}
    given |= {"base": SimpleNamespace(config=config), "TWICE": four_bits.TWICE}
    return run_cells("sizes", **given).weights_gb(config)


def test_weights_in_memory_are_what_the_plan_says(tiny_cfg, tiny_llama3):
    sizes = model_sizes(tiny_cfg())
    counted = sizes_in_gb(AutoConfig.from_pretrained(tiny_llama3))
    in_4_bits = sizes.linear * four_bits.TWICE / 8 + 2 * sizes.other
    assert counted["GB in NF4"] * 1024**3 == pytest.approx(in_4_bits)
    assert counted["GB in 16 bits"] * 1024**3 == pytest.approx(2 * (sizes.linear + sizes.other))
    small = AutoConfig.from_pretrained(ROOT / "configs/architectures/SmolLM2-135M-Instruct.json")
    assert sizes_in_gb(small)["GB in NF4"] == pytest.approx(0.102, abs=2e-3)


def test_spectrum_is_that_of_the_whole_update(tiny_trainer):
    cell = run_cells("spectrum")
    trainer = tiny_trainer(max_steps=2)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert cell.spectrum(layer).max() == 0
    trainer.train()
    values = cell.spectrum(layer)
    whole = torch.linalg.svdvals(layer.get_delta_weight("default").detach().float())
    assert torch.allclose(values, whole[: len(values)], atol=1e-5)
    assert cell.directions(torch.tensor([4.0, 1.0, 0.1])) == 1
    assert cell.directions(torch.tensor([1.0, 1.0, 1.0])) == 3


def test_tokens_are_coloured_by_sign_and_size_and_escaped():
    text = plots.coloured_answers({"after": (["<b>", "\n", "x"], [1.0, 0.0, -3.0])}, scale=2)
    assert "&lt;b&gt;" in text and "<b>after</b>" in text and "sum -2.00 nats" in text
    up, down = (text[text.index(f'title="{n}') :][:150] for n in ("+1.00", "-3.00"))
    assert "0.28)" in up and "solid #0072B2" in up  # half of the strongest
    assert "0.55)" in down and "dotted #D55E00" in down
    assert "style" not in text[text.index('title="+0.00') :].split(">")[0]


def test_beta_surface_is_the_loss_and_flat_along_the_diagonal():
    figure = plots.beta_surface((0.1,), points={"chosen": [1.0], "rejected": [-2.0]})
    axis = figure.axes[0]
    (dots,) = [line for line in axis.lines if line.get_marker() == "o"]
    assert (dots.get_xdata()[0], dots.get_ydata()[0]) == (1.0, -2.0)
    drawn = axis.collections[-1]
    for level, path in zip(drawn.levels, drawn.get_paths(), strict=True):
        margin = 0.1 * (path.vertices[:, 0] - path.vertices[:, 1])
        assert np.log1p(np.exp(-margin)) == pytest.approx(level, abs=1e-3)


@pytest.fixture
def many_pairs(tmp_path):
    """A folder of pairs of many lengths, of which every third has the longer answer chosen."""
    rows = []
    for i in range(4):
        for n, (prompt, brief, long) in enumerate(PAIRS):
            right, wrong = (long, brief) if n % 3 == 0 else (brief, long * (1 + i % 3))
            rows.append(explicit(f"Question {i}: {prompt}", right, wrong) | {"facts": [[right]]})
    write_jsonl(tmp_path / "pairs" / "train.jsonl", rows[:18])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", rows[18:])
    return tmp_path / "pairs"


def test_the_arms_run_and_the_tutorial_draws_them(tiny_cfg, many_pairs, tmp_path):
    tiny_cfg(dataset_name=str(many_pairs), max_steps=-1).save(tmp_path / "config.yaml")
    size = lessons.Size(pairs=6, held_out=4, epochs=1, prompts=2, max_new_tokens=4)
    *_, last = lessons.run_arms(str(tmp_path / "config.yaml"), {}, size, list(lessons.ARMS))
    results = json.loads(json.dumps(last))
    assert list(results["arms"]) == list(lessons.ARMS)
    assert results["machine"]["torch"] == torch.__version__
    alone, sft, fifth, lopsided, norm = results["arms"].values()
    for arm in (alone, lopsided, norm):
        assert arm["steps"]["loss"][0] == pytest.approx(math.log(2), abs=1e-4)
    terms = [arm["steps"]["loss"][0] - math.log(2) for arm in (sft, fifth)]
    assert terms[0] > 2  # a random model's loss a token
    assert terms[1] == pytest.approx(terms[0] / 5, rel=1e-3)
    apart = [abs(math.log(a["pairs"]["rejected"] / a["pairs"]["chosen"])) for a in (alone, norm)]
    assert apart[0] < apart[1]
    for arm in (alone, norm):
        held = arm["held_out"]
        assert arm["pairs"]["count"] == 6
        assert np.sign(held["length_gap"]).sum() == 0  # half of them one way, half the other
        for name, side in (("chosen longer", -1), ("chosen shorter", 1)):
            won = [m > 0 for m, g in zip(held["margin"], held["length_gap"], strict=True)
                   if np.sign(g) == side]  # fmt: skip
            assert held["accuracy"][name] == pytest.approx(np.mean(won))
    whole = np.subtract(alone["held_out"]["chosen"], alone["held_out"]["rejected"])
    assert alone["held_out"]["margin"] == pytest.approx(whole, abs=2e-3)
    assert np.abs(norm["held_out"]["margin"]).max() < np.abs(norm["held_out"]["chosen"]).max()
    drawn = {"plots": plots, "lessons": results, "arms": results["arms"], "np": np, "pd": pd}
    rows = run_cells("displacement", "length", "table", **drawn).rows
    assert list(rows) == ["before training", *(a.title for a in lessons.ARMS.values())]
    assert all(row["key facts"] is not None for row in rows.values())


RUNS = {
    "as the default": {"load_in_4bit": True, "dtype": "bfloat16", "bf16": True,
                       "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "another loss": {"loss_type": "sigmoid_norm", "beta": 5.0},
    "all weights": {"use_peft": False, "learning_rate": 1e-3, "loss_type": "ipo"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_the_tutorial_takes_a_finished_run_of_any_kind(tiny_run, tmp_path, kind):
    trainer, cfg = tiny_run(**RUNS[kind])
    cfg.save(cfg.run_dir / "config.yaml")
    trainer.train()
    save_adapter(trainer, cfg)
    left = {path: path.read_bytes() for path in cfg.run_dir.rglob("*") if path.is_file()}
    executed = papermill.execute_notebook(
        str(TUTORIAL), str(tmp_path / "out.ipynb"), parameters={"run": str(cfg.run_dir)},
        cwd=str(ROOT), kernel_name="python3", progress_bar=False,
    )  # fmt: skip
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    assert not [o for cell in outputs.values() for o in cell if o.get("name") == "stderr"]
    (table,) = (o["data"]["text/html"] for o in outputs["against"] if "data" in o)
    assert "margin" in table
    said = "".join(o.get("text", "") for name in ("trl", "lora", "rank") for o in outputs[name])
    assert ("compared here is the DPO loss" in said) == (kind != "as the default")
    assert ("all weights were trained" in said) == (kind == "all weights")
    sizes = model_sizes(cfg)
    share = sizes.trained / (sizes.base + sizes.trained)
    assert (f"{sizes.trained:,} parameters trained:\n{share:.2%} of" in said) == cfg.model.use_peft
    now = {path: path.read_bytes() for path in cfg.run_dir.rglob("*") if path.is_file()}
    assert now == left


def test_without_a_finished_run_it_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RecipeError, match=r"no finished run in .*; make one: .*scripts.training"):
        run_cells("setup", run=str(tmp_path))


def test_figures_of_the_tutorial_read_the_committed_runs():
    results = json.loads((TUTORIAL.parent / "lessons.json").read_text())
    assert set(results["arms"]) == set(lessons.ARMS)
    assert "DPO alone" in plots.displacement(results).get_label()
    assert "pairs of like length" in plots.length_hacking(results).get_label()
