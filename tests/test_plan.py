"""The plan counts what is there, and its parts and advice follow the config."""

import re
import subprocess
import sys

import pytest

from scripts.cli import ROOT, RecipeError
from scripts.config import load_config
from scripts.data import load_preferences
from scripts.model import load_model, load_tokenizer
from scripts.planning.flops import step_flops
from scripts.planning.hardware import fit, gpus, memory_table, needs
from scripts.planning.lengths import parse_case, worst_lengths
from scripts.planning.memory import (
    GB,
    architecture,
    attention_bytes,
    layer_bytes,
    phases,
    shape,
    stored,
)
from scripts.training import build_trainer

A100 = "configs/llama3-8b-a100.yaml"


@pytest.fixture(scope="module")
def llama():
    cfg = load_config(A100, may_lack_gpu=True)
    return cfg, shape(cfg)


def test_llama_3_is_counted_from_the_shipped_architecture(llama):
    _, s = llama
    assert s.quantized + s.other == 8_030_261_248
    assert s.lora == 41_943_040
    assert s.other == 2 * 128_256 * 4096 + 65 * 4096  # embeddings, head, norms


def test_nf4_constants_are_part_of_the_weights(llama):
    cfg, s = llama
    linear = stored(cfg, s)["linear layers"]
    per_weight = linear * 8 / s.quantized
    assert per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))  # the QLoRA paper's 4.127
    cfg = load_config(A100, may_lack_gpu=True, overrides={"use_bnb_nested_quant": False})
    assert stored(cfg, s)["linear layers"] * 8 / s.quantized == pytest.approx(4.5)


def test_what_is_stored_is_what_a_loaded_model_stores(tiny_cfg, tiny_llama3):
    """The tiny Llama in NF4: weights, adapter and gradients as the real trainer holds them."""
    cfg = tiny_cfg(load_in_4bit=True, dtype="bfloat16", bf16=True)
    planned = stored(cfg, shape(cfg))
    model = load_model(cfg, str(tiny_llama3))
    weights = planned["linear layers"] + planned["embeddings, norms, head"]
    assert weights == pytest.approx(model.get_memory_footprint(), rel=0.03)
    trainer = build_trainer(cfg, model, load_tokenizer(str(tiny_llama3)), load_preferences(cfg))
    adapter = sum(
        p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad
    )
    assert planned["adapter"] == planned["gradients"] == adapter


def test_checkpointing_and_smaller_batches_need_less(llama):
    _, s = llama

    def step(**overrides):
        cfg = load_config(A100, overrides, may_lack_gpu=True)
        return phases(cfg, s, worst_lengths(cfg), True, 0)["step"]["activations"]

    base = step()
    assert step(activation_checkpointing=False) > 5 * base
    assert step(per_device_train_batch_size=1) < 0.6 * base
    assert step(max_length=512) < 0.6 * base
    assert step(prefix_sharing=False) > base


def test_a_layer_is_what_the_formula_says(llama):
    _, s = llama
    assert layer_bytes(s) == 12 * 4096 + 8 * 4096 + 8 * 14336 + 14 * 16
    # Two pairs on a CPU: probabilities of 2 x 2 blocks for chosen, 1 x 1 for rejected; 32 heads.
    lengths = (100, 300, 200)
    seen = 256 * 256 + 144 * 400 + 200 * 300
    shared = 2 * 2 * 4096 * (100 + 200)
    assert attention_bytes(s, lengths, 2, cuda=False) == 2 * (2 * 32 * seen + shared)
    assert attention_bytes(s, lengths, 2, cuda=True) == 2 * shared


def test_the_8b_run_fits_where_it_should(llama):
    cfg, s = llama
    table = gpus()["gpus"]
    assert fit(cfg, s, table["A100-80"]) == (True, "")
    assert fit(cfg, s, table["T4"])[0] is False
    small = fit(load_config("configs/llama3-8b-24gb.yaml", may_lack_gpu=True), s, table["L4"])
    assert small[0], small
    fits, change = fit(
        load_config(A100, may_lack_gpu=True, overrides={"activation_checkpointing": False}),
        s,
        table["A10"],
    )
    assert not fits
    assert change.startswith("activation_checkpointing: true")
    tight = gpus()["gpus"]["L4"] | {"memory_gb": 7.9}
    assert fit(cfg, s, tight) == (False, "per_device_train_batch_size: 1")  # it checkpoints already


def test_parts_add_up_to_the_peak(llama):
    table = memory_table(*llama)
    assert table.loc["peak"].round(6).equals(table.drop("peak").sum().round(6))
    assert list(table.columns) == ["load", "reference", "step", "merge"]
    assert table.loc["16-bit model", "merge"] == pytest.approx(2 * 8_030_261_248 / GB)


def test_flops_are_counted_by_hand(tiny_cfg):
    """One pair of one token each through the tiny Llama."""
    config = architecture(tiny_cfg())
    import numpy as np

    body = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    visible = 2 * 3 / 2 + 1 + 1
    by_hand = 6 * (body + 10) * 3 + 4 * 2 * 4 * 64 * visible + 6 * 64 * 128_256 * 2
    assert step_flops(config, np.array([[1, 1, 1]]), lora=10) == by_hand


def test_cases_are_read_and_others_refused():
    assert parse_case("512/128/256x2") == (512, 128, 256, 2)
    for case in ("512/128", "a/b/cx1", "1/2/3"):
        with pytest.raises(RecipeError, match="prompt/chosen/rejectedxpairs"):
            parse_case(case)


def test_a_cpu_plan_counts_this_process(tiny_cfg):
    found = needs(tiny_cfg(use_cpu=True))
    assert 0.2 * GB < found["step"]["runtime"] < 8 * GB


def test_every_gpu_of_the_table_is_whole():
    for name, gpu in gpus()["gpus"].items():
        assert set(gpu) == {"memory_gb", "tflops", "dollars_per_hour", "bf16"}, name


def test_the_command_needs_neither_weights_nor_network():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan", "--config", A100],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained 41,943,040 (0.52%)" in done.stdout
    assert re.search(r"A100-80 +79.2 +yes", done.stdout)
    assert "steps: 1,608 of 8 pairs" in done.stdout


def test_an_architecture_that_is_nowhere_is_one_line(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="no architecture of no/such-model"):
        architecture(tiny_cfg(model_name_or_path="no/such-model"))
