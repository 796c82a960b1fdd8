"""The plan against what is there (optimisers, saved tensors, checkpoints, steps, caches), against
peaks that were simulated apart from it, and against sums done by hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import llama3_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from scripts.base import ROOT, RecipeError
from scripts.config import load_config
from scripts.data import load_preferences
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.plan import report
from scripts.planning.dataset import dataset_size, kept_checkpoints, trained_pairs, training_steps
from scripts.planning.flops import step_flops
from scripts.planning.hardware import (
    checkpoint_bytes,
    fit,
    gpus,
    memory_table,
    needs,
    smaller,
    time_table,
)
from scripts.planning.lengths import Lengths, parse_case, worst_lengths
from scripts.planning.memory import (
    GB,
    PAGED,
    PROJECTIONS,
    ModelSizes,
    architecture,
    cache_bytes,
    kept_by_a_layer,
    model_sizes,
    phases,
    stored,
)
from scripts.planning.optimisers import FACTORED, STATE_BYTES, state_bytes
from scripts.planning.table import table
from scripts.planning.trial import random_pairs
from scripts.planning.validate import PlanError, compare, judge
from scripts.training import build_trainer

A100, RANK_416 = "configs/llama3-8b-a100.yaml", "configs/llama3-8b-a100-rank416.yaml"
SMALL_GPU = "configs/llama3-8b-24gb.yaml"
DEFAULT = "configs/smollm2-135m-cpu.yaml"


def planned(config: str, **overrides):
    return load_config(config, overrides, may_lack_gpu=True)


@pytest.fixture(scope="module")
def llama() -> ModelSizes:
    return model_sizes(planned(A100))


@pytest.fixture(scope="module")
def llama_416() -> ModelSizes:
    return model_sizes(planned(RANK_416))


def test_llama_3_is_counted_from_the_shipped_architecture(llama):
    assert llama.base == 8_030_261_248
    assert llama.trained == 41_943_040
    assert llama.other == 2 * 128_256 * 4096 + 65 * 4096  # embeddings, head, norms


def test_nf4_constants_are_part_of_the_weights(llama):
    linear = stored(planned(A100), llama)["linear layers"]
    per_weight = linear * 8 / llama.linear
    assert per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))  # the QLoRA paper's 4.127
    linear = stored(planned(A100, use_bnb_nested_quant=False), llama)["linear layers"]
    assert linear * 8 / llama.linear == pytest.approx(4.5)


def test_what_is_stored_is_what_a_loaded_model_stores(tiny_cfg, tiny_llama3):
    """The tiny Llama in NF4: weights, adapter and gradients as the real trainer holds them."""
    cfg = tiny_cfg(load_in_4bit=True, dtype="bfloat16", bf16=True)
    kept = stored(cfg, model_sizes(cfg))
    model = load_model(cfg, str(tiny_llama3))
    weights = kept["linear layers"] + kept["embeddings, norms, head"]
    assert weights == pytest.approx(model.get_memory_footprint(), rel=0.03)
    trainer = build_trainer(cfg, model, load_tokenizer(str(tiny_llama3)), load_preferences(cfg))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in trained)
    assert kept["adapter"] == kept["gradients"] == adapter


# Optimisers that run on a CPU here; the others want a GPU or a package of their own.
ON_A_CPU = [
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_bnb_8bit",
    "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_8bit",
    "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained_llama() -> LlamaForCausalLM:
    """A Llama of one layer with an adapter, with gradients; large enough for 8-bit state."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    adapter = LoraConfig(r=16, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config), adapter)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_the_state_of_an_optimiser_is_what_it_really_keeps(trained_llama, name, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
    make, options = Trainer.get_optimizer_cls_and_kwargs(args, trained_llama)
    trained = [p for p in trained_llama.parameters() if p.requires_grad]
    optimiser = make(trained, **options)
    optimiser.step()
    kept = sum(
        value.nbytes
        for state in optimiser.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith(("qmap", "step"))
    )
    sides = sum(sum(p.shape) for p in trained)
    expected = state_bytes(name, sum(p.numel() for p in trained), sides)
    assert kept == pytest.approx(expected, rel=0.01)


def test_every_optimiser_of_transformers_is_known():
    assert {name.value for name in OptimizerNames} == {*STATE_BYTES, *FACTORED}


def saved_bytes(tiny_run, tmp_path, layers: int, **settings) -> float:
    """Bytes that a real loss of a `layers` deep Llama in NF4 keeps for its backward, weights and
    copies of them left out."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=64, intermediate_size=192, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    folder = tmp_path / str(layers)
    LlamaForCausalLM(config).save_pretrained(folder)
    llama3_tokenizer().save_pretrained(folder)
    trainer, _ = tiny_run(**{
        "model_name_or_path": str(folder), "load_in_4bit": True, "dtype": "bfloat16", "bf16": True,
        "max_length": 1024, **settings,
    })  # fmt: skip
    rows = random_pairs(1000, LENGTHS, 2).to_list()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    shapes = {tuple(p.shape) for p in trainer.model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in shapes and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    trainer.model.train()
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, trainer.accelerator.autocast():  # as the prepared model has it in training
        trainer.compute_loss(trainer.model, batch)
    return sum(storage.nbytes() for storage in kept.values())


LENGTHS = Lengths(100, 310, 270)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": False},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": ["gate_proj", "o_proj"]},
        {"lora_target_modules": ["down_proj", "up_proj"], "bf16": False},
    ],
    ids=str,
)
def test_a_layer_keeps_what_the_plan_says(tiny_run, tiny_llama3, tmp_path, monkeypatch, settings):
    """Two more layers of a real model, counted with hooks on what autograd saves."""
    tokenizer = load_tokenizer(str(tiny_llama3))
    monkeypatch.setattr("scripts.training.load_tokenizer", lambda *_: tokenizer)
    deep, flat = (saved_bytes(tiny_run, tmp_path, layers, **settings) for layers in (3, 1))
    sizes = ModelSizes(
        linear=0, other=0, trained=0, trained_large=0, trained_sides=0, rank=16, width=64,
        attention_width=64, key_width=32, mlp_width=192, layers=2, heads=4, vocabulary=128_256,
    )  # fmt: skip
    cfg = load_config(DEFAULT, {"per_device_train_batch_size": 2, **settings})
    if targets := settings.get("lora_target_modules"):
        sizes = replace(sizes, adapted={name: float(name in targets) for name in PROJECTIONS})
    layer = kept_by_a_layer(cfg, sizes, LENGTHS, cuda=False)
    assert 2 * layer == pytest.approx(deep - flat, rel=0.1)


def test_the_adapters_places_are_counted_from_the_model(llama):
    assert llama.adapted == dict.fromkeys(PROJECTIONS, 1.0)
    some = model_sizes(planned(A100, lora_target_modules=["q_proj", "v_proj"])).adapted
    assert {name for name, share in some.items() if share} == {"q_proj", "v_proj"}
    last = [f"{layer}.mlp.down_proj" for layer in range(24, 32)]
    upper = model_sizes(planned(A100, lora_target_modules=last)).adapted
    assert upper == dict.fromkeys(PROJECTIONS, 0.0) | {"down_proj": 8 / 32}


# GB of a step's second micro-batch of the longest pairs, optimiser and all, without CUDA context:
# `python -m tests.gpu_simulation --all`, which runs the real trainer on tensors without data. That
# needs the CUDA build of torch; these numbers hold the plan where there is none.
SIMULATED = {
    (A100, 4, False, True): 48.24,
    (A100, 2, True, True): 7.70,
    (SMALL_GPU, 1, True, True): 6.43,
    (RANK_416, 2, False, True): 45.30,
    (A100, 4, False, False): 55.23,
    (SMALL_GPU, 1, True, False): 6.53,
    (RANK_416, 2, False, False): 48.87,
}


@pytest.mark.parametrize(("config", "batch", "checkpointing", "sharing"), SIMULATED)
def test_a_step_is_near_its_simulated_peak(llama, llama_416, config, batch, checkpointing, sharing):
    cfg = planned(
        config, per_device_train_batch_size=batch, activation_checkpointing=checkpointing,
        prefix_sharing=sharing,
    )  # fmt: skip
    sizes = llama_416 if config == RANK_416 else llama
    step = phases(cfg, sizes, worst_lengths(cfg), True, 0)["step"]
    simulated = SIMULATED[config, batch, checkpointing, sharing]
    assert sum(step.values()) / GB == pytest.approx(simulated, rel=0.02)


SOME = {"lora_target_modules": ["q_proj", "v_proj"]}
RECOMPUTED = {"activation_checkpointing": True}
# The same of llama3-8b-a100 with other settings (`--set` in place of `--all`).
SIMULATED_WITH = [
    ({"bf16": False}, 70.10),
    ({"bf16": False} | RECOMPUTED, 10.33),
    ({"bf16": False, "prefix_sharing": False}, 82.24),
    (SOME, 38.00),
    (SOME | RECOMPUTED, 8.80),
    (SOME | {"prefix_sharing": False}, 45.60),
]


@pytest.mark.parametrize(("settings", "simulated"), SIMULATED_WITH, ids=str)
def test_a_step_with_other_settings_is_near_its_simulated_peak(settings, simulated):
    cfg = planned(A100, **settings)
    step = phases(cfg, model_sizes(cfg), worst_lengths(cfg), True, 0)["step"]
    assert sum(step.values()) / GB == pytest.approx(simulated, rel=0.01)


IN_8_BITS = {"load_in_4bit": False, "load_in_8bit": True}


@pytest.mark.parametrize(
    ("settings", "reference", "simulated"),
    [
        (IN_8_BITS, 3.61, 5.56),
        (IN_8_BITS | RECOMPUTED, 3.61, 5.12),
        ({"load_in_4bit": False, "use_peft": False}, 20.18, 25.75),
    ],
    ids=str,
)
def test_two_layers_in_8_bits_or_without_an_adapter_are_near_theirs(
    tmp_path, settings, reference, simulated
):
    """The same of Llama 3's first two layers, `--set model_name_or_path=` a folder with these."""
    shipped = ROOT / "configs" / "architectures" / "Meta-Llama-3-8B-Instruct.json"
    two = json.loads(shipped.read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(two))
    cfg = planned(A100, model_name_or_path=str(tmp_path), **settings)
    by_phase = phases(cfg, model_sizes(cfg), worst_lengths(cfg), True, 0)
    for name, peak in (("reference", reference), ("step", simulated)):
        assert sum(by_phase[name].values()) / GB == pytest.approx(peak, rel=0.02), name


def test_the_advice_follows_from_the_simulated_peaks(llama):
    """The 80 GB default on smaller cards, a tenth left free, worked out from the peaks above.

    With the CUDA context about 0.6 GB come on top. On 40 GB (35.5 to use) 49 GB do not fit; two
    pairs, which take half of the 43 GB above weights and adapter less, do. On 24 GB (21.2) neither
    does, and one pair, a quarter of them, does. On 12 GB (10.8) only recomputing is left.
    """
    cfg = planned(A100)
    assert cfg.dpo.per_device_train_batch_size == 4 and not cfg.dpo.activation_checkpointing

    def advice(memory_gb: float) -> tuple[bool, str]:
        return fit(cfg, llama, gpus()["A100-40"] | {"memory_gb": memory_gb})

    assert fit(cfg, llama, gpus()["A100-80"]) == (True, "")
    two = "per_device_train_batch_size: 2, gradient_accumulation_steps: 4"
    assert fit(cfg, llama, gpus()["A100-40"]) == (False, two)
    one = "per_device_train_batch_size: 1, gradient_accumulation_steps: 8"
    assert advice(23.5) == (False, one)
    fits, change = advice(12.0)
    assert not fits and change.startswith("activation_checkpointing: true")
    assert change.endswith("merge in main memory: scripts.export --set use_cpu=true")
    assert advice(5.0) == (False, "not by these means")  # the weights alone are 5.3
    assert fit(cfg, llama, gpus()["T4"])[1].startswith("no bfloat16")


def test_the_paged_optimiser_moves_out_only_where_nothing_else_fits(llama_416):
    cfg = planned(RANK_416)
    assert fit(cfg, llama_416, gpus()["A100-80"]) == (True, "")
    one = "per_device_train_batch_size: 1, gradient_accumulation_steps: 8"
    assert fit(cfg, llama_416, gpus()["A100-40"]) == (False, one)
    assert "the optimiser pages" in fit(cfg, llama_416, gpus()["L4"])[1]
    assert "pages" not in fit(planned(RANK_416, optim="adamw_torch"), llama_416, gpus()["L4"])[1]


def test_advice_keeps_the_pairs_of_a_step_and_names_nothing_that_is_set():
    for cfg in (planned(A100), planned(SMALL_GPU), planned(A100, per_device_train_batch_size=3)):
        whole = cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps
        for change in smaller(cfg):
            assert all(getattr(cfg.dpo, name) != value for name, value in change.items())
            if "per_device_train_batch_size" in change:
                batch, steps = change["per_device_train_batch_size"], "gradient_accumulation_steps"
                assert batch * change[steps] == whole


def test_replies_that_do_not_fit_are_generated_fewer_at_a_time(llama):
    cfg = planned(SMALL_GPU, generation_batch_size=512)
    fits, change = fit(cfg, llama, gpus()["L4"])
    assert not fits and re.fullmatch(r"generation_batch_size: (32|64)", change)


def test_the_configs_leave_a_fifth_of_the_gpu_that_they_are_for(llama, llama_416):
    forty = "configs/llama3-8b-a100-40gb-short.yaml"
    for config, name in (
        (A100, "A100-80"), (RANK_416, "A100-80"), (SMALL_GPU, "L4"), (forty, "A100-40")
    ):  # fmt: skip
        sizes = llama_416 if config == RANK_416 else llama
        most = memory_table(planned(config), sizes).loc["peak"].max()
        assert most < 0.8 * gpus()[name]["memory_gb"], config


def test_checkpointing_and_smaller_batches_need_less(llama):
    def step(**overrides):
        cfg = planned(A100, **overrides)
        return phases(cfg, llama, worst_lengths(cfg), True, 0)["step"]["activations"]

    base = step()
    assert step(activation_checkpointing=True) < base / 5
    assert step(per_device_train_batch_size=1) < 0.3 * base
    assert step(max_length=512) < 0.6 * base
    assert step(prefix_sharing=False) > base


def test_large_tensors_of_a_paged_optimiser_are_apart(llama, llama_416):
    """bitsandbytes pages from 100,000 numbers on: of rank 16 the three matrices a layer that meet
    the feed-forward width (16 x 14,336), of rank 416 all."""
    kept = stored(planned(A100), llama)
    assert kept[PAGED] == 32 * 3 * 16 * 14_336 * 8
    assert kept["optimiser"] + kept[PAGED] == llama.trained * 8
    kept = stored(planned(RANK_416), llama_416)
    assert (kept["optimiser"], kept[PAGED]) == (0, llama_416.trained * 8)
    assert stored(planned(RANK_416), llama_416, cuda=False)[PAGED] == 0


def test_without_an_adapter_everything_is_trained_beside_a_reference(tiny_cfg):
    cfg = tiny_cfg(use_peft=False)
    sizes = model_sizes(cfg)
    assert sizes.trained == sizes.base and sizes.rank == 0
    kept = stored(cfg, sizes)
    assert kept["adapter"] == 0
    assert kept["reference model"] == kept["gradients"] == 4 * sizes.base
    assert kept["optimiser"] == 8 * sizes.base


def test_parts_add_up_to_the_peak(llama):
    frame = memory_table(planned(A100), llama)
    assert frame.loc["peak"].round(6).equals(frame.drop("peak").sum().round(6))
    assert list(frame.columns) == ["load", "reference", "step", "evaluate", "merge"]
    assert frame.loc["merged model", "merge"] == pytest.approx(2 * 8_030_261_248 / GB)


def test_the_cache_is_as_large_as_the_one_that_generation_leaves(trained_llama):
    model = trained_llama.get_base_model()
    ids = torch.ones(3, 5, dtype=torch.long)
    how = GenerationConfig(max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True,
                           pad_token_id=0)  # fmt: skip
    cache = model.generate(input_ids=ids, generation_config=how).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    sizes = ModelSizes(0, 0, 0, 0, 0, 0, 512, 512, 512, 1024, layers=1, heads=4, vocabulary=64)
    # The last token is not fed back, and one layer's keys are there twice while they grow.
    assert cache_bytes(sizes, 3, 12, word=4) == real * 3 / 2


def test_steps_and_checkpoints_are_those_of_a_real_run(tiny_run):
    """Half an epoch of four pairs in steps of one pair, three checkpoints wanted, one kept."""
    trainer, cfg = tiny_run(
        max_steps=-1, num_train_epochs=0.5, per_device_train_batch_size=1,
        save_strategy="steps", save_steps=1, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2
    assert training_steps(cfg, pairs=4) == 2
    assert trained_pairs(cfg, pairs=4) == 2
    assert kept_checkpoints(cfg, steps=2) == 2  # one, and the one that is being written
    (folder,) = Path(cfg.dpo.output_dir).glob("checkpoint-*")
    real = sum(
        (folder / name).stat().st_size for name in ("adapter_model.safetensors", "optimizer.pt")
    )  # fmt: skip
    assert checkpoint_bytes(cfg, model_sizes(cfg)) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ({"num_train_epochs": 1}, 1250),
        ({"num_train_epochs": 0.5}, 625),
        ({"num_train_epochs": 0.0001}, 1),
        ({"max_steps": 50}, 50),
    ],
)
def test_steps_by_epochs(overrides, steps):
    assert training_steps(planned(A100, **overrides), pairs=10_000) == steps


def test_checkpoints_by_strategy(llama):
    short = "configs/llama3-8b-a100-short.yaml"
    assert kept_checkpoints(planned(short), 50) == 3  # two, and the one that is being written
    assert kept_checkpoints(planned(short, save_strategy="no"), 50) == 0
    assert kept_checkpoints(planned(A100), 1592) == 3
    assert kept_checkpoints(planned(A100), 150) == 1
    assert kept_checkpoints(planned(A100, save_total_limit=None), 1592) == 8
    assert kept_checkpoints(planned(A100, save_strategy="epoch", num_train_epochs=2), 3000) == 2
    only = checkpoint_bytes(planned(A100, save_only_model=True), llama)
    assert only == 4 * llama.trained


def test_a_dataset_on_this_machine_tells_pairs_and_lengths(tiny_cfg):
    size = dataset_size(tiny_cfg())
    assert size.pairs == 4
    # "Paris." against 43 bytes, and so on: a handful of tokens, rejected the longer.
    assert size.usual.chosen < size.usual.rejected < 30
    assert dataset_size(tiny_cfg(train_samples=2)).pairs == 2
    assert dataset_size(tiny_cfg(max_length=10)).usual.rejected < 10


def test_a_known_dataset_is_less_what_is_held_out():
    size = dataset_size(planned(A100))
    assert size.pairs == 12_730  # 99% of 12,859
    assert sum(size.usual) < sum(worst_lengths(planned(A100))) / 2
    assert dataset_size(planned("configs/llama3-8b-a100-short.yaml")).pairs == 150
    unknown = dataset_size(planned(A100, dataset_name="someone/else"))
    assert unknown.usual is None and "--pairs" in unknown.source


def test_hours_and_cost_are_those_worked_out_by_hand(llama):
    """1,000 of the longest pairs, 256/768/768 tokens, at 35% of 312 TFLOP/s.

    Per pair 6 x (6.98 + 0.04) G parameters x 1,792 tokens = 75.5 TFLOP; head 6 x 4096 x 128,256 x
    1,536 = 4.84; attention 4 x 32 x 4 x 4096 x 1.017 M visible = 2.13: 82.4 TFLOP, and 82.4e15 /
    (0.35 x 312e12) = 755 s = 0.21 h; recomputing adds a third.
    """
    cfg = planned(A100)
    config = architecture(cfg)
    frame = time_table(cfg, llama, config, 1000, Lengths(232, 177, 177))
    row = frame.loc["A100-80"]
    assert row["hours worst"] == pytest.approx(0.21, abs=0.005)
    assert 0.05 < row["hours usual"] < 0.08  # a third of the tokens, less than a third of attention
    assert row["cost $"] == pytest.approx(row["hours usual"] * 5.07, abs=0.03)
    assert row["fits"] == "yes" and frame.loc["T4", "cost $"] == ""
    again = planned(A100, activation_checkpointing=True)
    recomputed = time_table(again, llama, config, 1000, None).loc["A100-80"]
    assert recomputed["hours worst"] == pytest.approx(0.28, abs=0.005)
    assert recomputed["hours usual"] == ""
    assert recomputed["cost $"] == pytest.approx(0.28 * 5.07, abs=0.03)


def test_flops_are_counted_by_hand(tiny_cfg):
    """One pair of one token each through the tiny Llama."""
    config = architecture(tiny_cfg())
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
    parts = needs(tiny_cfg(use_cpu=True))
    assert 0.2 * GB < parts["step"]["runtime"] < 8 * GB


def test_every_gpu_of_the_table_is_whole():
    for name, gpu in gpus().items():
        assert set(gpu) == {"memory_gb", "tflops", "dollars_per_hour", "bf16"}, name
    for name, known in table()["datasets"].items():
        assert known["pairs"] > 0 and len(known["usual_lengths"]) == 3, name


def test_a_prediction_is_held_against_a_measured_step(tmp_path):
    """Plan validation on a small model: a real step, in a process of its own."""
    tokenizer = load_tokenizer(resolve_model(load_config(DEFAULT).model.model_name_or_path)[0])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    frame = compare({"small": str(tmp_path)}, ranks=[8], lengths=[400])
    row = frame.loc["small, rank 8, 400 tokens"]
    assert row["activations GB"] > 0.1 * row["measured GB"]
    assert row["off"] == pytest.approx(row["predicted GB"] / row["measured GB"] - 1)
    assert abs(row["off"]) < 0.25  # of a process of a GB; larger ones come within a tenth
    assert judge(frame.assign(off=[-0.06])) == 0.06
    with pytest.raises(PlanError, match="small, rank 8, 400 tokens: off by 40%, more than 10%"):
        judge(frame.assign(off=[-0.4]))


def test_the_command_needs_neither_weights_nor_network():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.plan", "--config", A100],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "/bin", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trained 41,943,040 (0.52%)" in done.stdout
    assert re.search(r"A100-80 +79.2 +yes", done.stdout)
    assert "steps: 1,592 of 8 pairs" in done.stdout
    assert "optimiser, paged: managed memory, which torch does not count" in done.stdout


def test_on_a_cpu_the_plan_tells_what_a_run_comes_to_hold(tiny_cfg):
    cfg = tiny_cfg(use_cpu=True)
    text = report(cfg, dataset_size(cfg))
    step = float(text.split("\npeak ")[1].split()[2])
    told = float(re.search(r"as a step takes, ([\d.]+) GB, until the evaluation", text)[1])
    assert told == pytest.approx(1.5 * step, abs=0.06)
    assert "until the evaluation" not in report(planned(A100), dataset_size(planned(A100)))


def test_an_architecture_that_is_nowhere_is_one_line(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="no architecture of no/such-model"):
        architecture(tiny_cfg(model_name_or_path="no/such-model"))


def test_an_8_bit_optimiser_of_whole_weights_is_not_halved(llama):
    """bitsandbytes keeps its state in its own type, whatever the weights' is."""
    whole = {"use_peft": False, "load_in_4bit": False}
    sizes = model_sizes(planned(A100, **whole))
    eight, torchs = (
        stored(planned(A100, **whole, optim=name), sizes) for name in ("adamw_8bit", "adamw_torch")
    )
    assert eight["optimiser"] / sizes.trained == pytest.approx(2.03, rel=0.02)
    assert torchs["optimiser"] / sizes.trained == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        ({}, None),
        ({"bf16": False}, None),
        ({"lora_target_modules": ["q_proj"]}, None),
        ({"load_in_4bit": False, "load_in_8bit": True}, None),
        ({"bf16": False, "dtype": "float32"}, "WARNING: with dtype: float32 a step was not held"),
    ],
)
def test_the_plan_warns_where_it_was_not_held_against_a_simulation(overrides, warned):
    text = report(planned(A100, **overrides), dataset_size(planned(A100)))
    assert ("WARNING" in text) == bool(warned)
    assert (warned or "training alone") in text
