"""The plan against what is there (optimisers, saved tensors, checkpoints, steps, caches), against
peaks that were simulated apart from it, and against sums done by hand."""

import os
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, llama3_tokenizer, pairs_of
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import get_peft_config

from scripts import plan_memory
from scripts.base import ROOT, RecipeError
from scripts.benchmark import random_pairs
from scripts.config import cpu_computes_bfloat16, load_config
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.plan import (
    checkpoint_bytes,
    dataset_size,
    fit,
    hardware,
    kept_checkpoints,
    parse_case,
    plan_text,
    smaller,
    step_flops,
    time_table,
    trained_pairs,
    training_steps,
)
from scripts.plan_memory import (
    GB,
    PAGED,
    PROJECTIONS,
    Lengths,
    ModelSizes,
    RoomError,
    architecture,
    cache_bytes,
    layer_bytes,
    memory_table,
    model_sizes,
    needs,
    peak,
    phases,
    require_room,
    stored,
    worst_lengths,
)
from scripts.training import build_trainer
from tests.gpu.measured import STEP, in_a_process
from tests.gpu_simulation.__main__ import PEAKS

A100, RANK_416 = "configs/llama3-8b-a100.yaml", "configs/llama3-8b-a100-rank416.yaml"
SMALL_GPU, FORTY = "configs/llama3-8b-24gb.yaml", "configs/llama3-8b-a100-40gb-short.yaml"
DEFAULT = "configs/smollm2-135m-cpu.yaml"


def planned(config: str, **overrides):
    return load_config(config, overrides, may_lack_gpu=True)


@pytest.fixture(scope="module")
def llama() -> ModelSizes:
    return model_sizes(planned(A100))


@pytest.fixture(scope="module")
def llama_416() -> ModelSizes:
    return model_sizes(planned(RANK_416))


# What is stored.


def test_llama_3_is_counted_from_the_shipped_architecture(llama):
    assert (llama.base, llama.trained) == (8_030_261_248, 41_943_040)
    assert llama.other == 2 * 128_256 * 4096 + 65 * 4096  # embeddings, head, norms
    assert llama.adapted == dict.fromkeys(PROJECTIONS, 1.0)
    some = model_sizes(planned(A100, lora_target_modules=["q_proj", "v_proj"])).adapted
    assert {name for name, share in some.items() if share} == {"q_proj", "v_proj"}
    last = [f"{layer}.mlp.down_proj" for layer in range(24, 32)]
    upper = model_sizes(planned(A100, lora_target_modules=last)).adapted
    assert upper == dict.fromkeys(PROJECTIONS, 0.0) | {"down_proj": 8 / 32}


def test_nf4_constants_are_part_of_the_weights(llama):
    for nested, bits in ((True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)):
        weights = stored(planned(A100, use_bnb_nested_quant=nested), llama)["weights"]
        assert (weights - 2 * llama.other) * 8 / llama.linear == pytest.approx(bits)


def test_what_is_stored_is_what_a_loaded_model_stores(tiny_cfg, tiny_llama3, any_cpu_in_bfloat16):
    """The tiny Llama in NF4: weights, adapter and gradients as the real trainer holds them."""
    cfg = tiny_cfg(load_in_4bit=True, dtype="bfloat16", bf16=True)
    kept = stored(cfg, model_sizes(cfg))
    model = load_model(cfg, str(tiny_llama3))
    assert kept["weights"] == pytest.approx(model.get_memory_footprint(), rel=0.03)
    trainer = build_trainer(cfg, model, load_tokenizer(str(tiny_llama3)), pairs_of(cfg))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in trained)
    assert kept["adapter"] == kept["gradients"] == adapter


def test_without_an_adapter_everything_is_trained_beside_a_reference(tiny_cfg):
    cfg = tiny_cfg(use_peft=False)
    sizes = model_sizes(cfg)
    assert sizes.trained == sizes.base and sizes.rank == 0
    kept = stored(cfg, sizes)
    assert kept["adapter"] == 0
    assert kept["reference model"] == kept["gradients"] == 4 * sizes.base
    assert kept["optimiser"] == 8 * sizes.base


@pytest.fixture(scope="module")
def trained_llama() -> LlamaForCausalLM:
    """A Llama of one layer with an adapter, with gradients; large enough for 8-bit state."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear")
    )  # fmt: skip
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return model


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_32bit"])
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
    sizes = ModelSizes(0, 0, sum(p.numel() for p in trained), 0, 16, 512, 512, 512, 1024, 1, 4, 64)
    expected = stored(planned(DEFAULT, optim=name), sizes, cuda=False)["optimiser"]
    assert kept == pytest.approx(expected, rel=0.01)


def test_large_tensors_of_a_paged_optimiser_are_apart(llama, llama_416):
    """bitsandbytes pages from 100,000 numbers on: of rank 16 the three matrices a layer that meet
    the feed-forward width (16 x 14,336), of rank 416 all."""
    kept = stored(planned(A100), llama)
    assert kept[PAGED] == 32 * 3 * 16 * 14_336 * 8
    assert kept["optimiser"] + kept[PAGED] == llama.trained * 8
    kept = stored(planned(RANK_416), llama_416)
    assert (kept["optimiser"], kept[PAGED]) == (0, llama_416.trained * 8)
    assert stored(planned(RANK_416), llama_416, cuda=False)[PAGED] == 0


# What a step takes.

LENGTHS = Lengths(100, 310, 270)


def saved_bytes(tiny_run, tmp_path, layers: int, **settings) -> float:
    """Bytes that a real loss of a `layers` deep Llama in NF4 keeps for its backward, weights and
    copies of them left out."""
    folder = tiny_model(tmp_path / str(layers), 64, 192, layers, heads=4, key_heads=2)
    trainer, _ = tiny_run(**{
        "model_name_or_path": str(folder), "load_in_4bit": True, "dtype": "bfloat16", "bf16": True,
        "max_length": 1024, **settings,
    })  # fmt: skip
    batch = trainer._prepare_inputs(trainer.data_collator(random_pairs(1000, LENGTHS, 2).to_list()))
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


def tiny_model(
    folder: Path, width: int, mlp: int, layers: int, heads: int, key_heads: int
) -> Path:  # fmt: skip
    """Write a Llama of this shape with random weights, and the tests' tokenizer."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    llama3_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": False}, {"bf16": False, "dtype": "float32"},
     {"lora_target_modules": ["q_proj", "v_proj"]},
     {"lora_target_modules": ["down_proj", "up_proj"], "bf16": False}],
    ids=str,
)  # fmt: skip
def test_a_layer_keeps_what_the_plan_says(tiny_run, tmp_path, any_cpu_in_bfloat16, settings):
    """Two more layers of a real model, counted with hooks on what autograd saves."""
    deep, flat = (saved_bytes(tiny_run, tmp_path, layers, **settings) for layers in (3, 1))
    sizes = ModelSizes(
        linear=0, other=0, trained=0, trained_large=0, rank=16, width=64, attention_width=64,
        key_width=32, mlp_width=192, layers=2, heads=4, vocabulary=VOCABULARY,
    )  # fmt: skip
    if targets := settings.get("lora_target_modules"):
        sizes = replace(sizes, adapted={name: float(name in targets) for name in PROJECTIONS})
    cfg = load_config(DEFAULT, {"per_device_train_batch_size": 2, **settings})
    layer = layer_bytes(cfg, sizes, LENGTHS, cuda=False)
    assert 2 * layer == pytest.approx(deep - flat, rel=0.1)


@pytest.mark.parametrize(("config", "settings", "reference", "step"), PEAKS, ids=str)
def test_the_plan_is_within_5_percent_of_the_simulated_peaks(config, settings, reference, step):
    cfg = planned(config, **settings)
    by_phase = phases(cfg, model_sizes(cfg), worst_lengths(cfg), True, 0)
    assert peak(by_phase["reference"]) == pytest.approx(reference, rel=0.05)
    assert peak(by_phase["step"]) == pytest.approx(step, rel=0.05)


DEEP, WIDE = (128, 512, 24, 8, 8), (512, 1408, 8, 8, 2)
FLOAT32 = {"dtype": "float32", "bf16": False}


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (DEEP, {"max_length": 640, "per_device_train_batch_size": 2, "lora_r": 8, **FLOAT32}),
        (WIDE, {"max_length": 256, "per_device_train_batch_size": 4, "lora_r": 64, **FLOAT32}),
        pytest.param(
            WIDE, {"max_length": 640, "per_device_train_batch_size": 2},
            marks=pytest.mark.skipif(not cpu_computes_bfloat16(), reason="a CPU without bfloat16"),
        ),
        pytest.param(
            None, {"max_length": 256, "per_device_train_batch_size": 2, "lora_r": 8, **FLOAT32},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["deep", "wide", "wide in bfloat16", "SmolLM2-135M"],
)  # fmt: skip
def test_the_plan_is_near_measured_steps(tmp_path, shape, settings):
    """Real steps in a process of their own, by the peak of its memory.

    bash scripts/test.sh -k near_measured -n 0 -s
    """
    if shape:
        model = tiny_model(tmp_path / "model", *shape)
    else:
        model, _ = resolve_model(load_config(DEFAULT).model.model_name_or_path)
    values = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "run"), **settings}
    values["gradient_accumulation_steps"] = 1
    found = in_a_process("plan_against_measured", DEFAULT, STEP | values)
    off = found["planned"] / found["measured"] - 1
    print(f"\nplanned {found['planned']:.2f}, measured {found['measured']:.2f} GB ({off:+.1%})")
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)


def test_a_cpu_plan_counts_this_process(tiny_cfg):
    parts = needs(tiny_cfg(use_cpu=True))
    assert 0.2 * GB < parts["step"]["runtime"] < 8 * GB


def test_the_cache_is_as_large_as_the_one_that_generation_leaves(trained_llama):
    model = trained_llama.get_base_model()
    ids = torch.ones(3, 5, dtype=torch.long)
    how = GenerationConfig(max_new_tokens=8, min_new_tokens=8, return_dict_in_generate=True,
                           pad_token_id=0)  # fmt: skip
    cache = model.generate(input_ids=ids, generation_config=how).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    sizes = ModelSizes(0, 0, 0, 0, 0, 512, 512, 512, 1024, layers=1, heads=4, vocabulary=64)
    # The last token is not fed back, and one layer's keys are there twice while they grow.
    assert cache_bytes(sizes, 3, 12, word=4) == real * 3 / 2


# The merge.


def test_a_merge_holds_the_4_bit_weights_beside_the_merged_model(llama):
    cfg = planned(A100)
    merged = 2 * 8_030_261_248 / GB
    table = memory_table(cfg, llama)["merge"]
    assert table["merged model"] == pytest.approx(merged)
    assert table["weights"] == pytest.approx(3.35, abs=0.01)
    assert table["adapter"] == pytest.approx(2 * 4 * llama.trained / GB)
    cfg.recipe.merge_into = "original"
    assert memory_table(cfg, llama).loc["peak", "merge"] == pytest.approx(merged + 1.35, abs=0.1)


Free = namedtuple("Free", "available free")


@pytest.mark.parametrize(
    ("memory", "disk", "told"),
    [
        (1, 1e15, r"the merge needs .* GB of main memory, 0\.0 are free\. Nothing was begun"),
        (1e15, 1, r"the merge needs .* GB on the disk of .*, 0\.0 are free\. Nothing was begun"),
        (1, 1, r"main memory, .*; and .* on the disk"),
    ],
)
def test_a_merge_without_room_is_refused(tiny_cfg, monkeypatch, memory, disk, told):
    """No machine here lacks room; what it says of itself is set instead."""
    monkeypatch.setattr(plan_memory.psutil, "virtual_memory", lambda: Free(memory, 0))
    monkeypatch.setattr(plan_memory.shutil, "disk_usage", lambda path: Free(0, disk))
    with pytest.raises(RoomError, match=told):
        require_room(tiny_cfg(use_cpu=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_merge_takes_the_memory_that_was_planned(tmp_path):
    """SmolLM2's on a CPU, by the peak of its process; it varies with what else the machine does.

    bash scripts/test.sh -k merge_takes -n 0 -s
    """
    cfg = load_config(DEFAULT, {"report_to": "none"}, output_dir=str(tmp_path / "run"))
    path, _ = resolve_model(cfg.model.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = get_peft_model(model, get_peft_config(cfg.model))
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.float().normal_(std=0.02)
    model.save_pretrained(cfg.run_dir / "adapter")
    load_tokenizer(path).save_pretrained(cfg.run_dir / "adapter")
    cfg.save(cfg.run_dir / "config.yaml")
    code = "import scripts.export as _; from scripts.plan_memory import process_gb as p; print(p())"
    runtime = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    command = [sys.executable, "-m", "scripts.export", "--config", str(cfg.run_dir / "config.yaml")]
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0 and (cfg.run_dir / "merged" / "model.safetensors").is_file()
    merge = phases(cfg, model_sizes(cfg), worst_lengths(cfg), False, runtime * GB)["merge"]
    print(f"\nplanned {peak(merge):.2f}, measured {used.ru_maxrss / 1024**2:.2f} GB")
    assert peak(merge) == pytest.approx(used.ru_maxrss / 1024**2, rel=0.25)


# The data.


def test_steps_and_checkpoints_are_those_of_a_real_run(tiny_run):
    """Half an epoch of four pairs in steps of one pair, three checkpoints wanted, one kept."""
    trainer, cfg = tiny_run(
        max_steps=-1, num_train_epochs=0.5, per_device_train_batch_size=1,
        save_strategy="steps", save_steps=1, save_total_limit=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == training_steps(cfg, pairs=4) == 2
    assert trained_pairs(cfg, pairs=4) == 2
    assert kept_checkpoints(cfg, steps=2) == 2  # one, and the one that is being written
    (folder,) = Path(cfg.dpo.output_dir).glob("checkpoint-*")
    files = ("adapter_model.safetensors", "optimizer.pt")
    real = sum((folder / name).stat().st_size for name in files)
    assert checkpoint_bytes(cfg, model_sizes(cfg)) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [({"num_train_epochs": 1}, 1250), ({"num_train_epochs": 0.0001}, 1), ({"max_steps": 50}, 50)],
)
def test_steps_by_epochs(overrides, steps):
    assert training_steps(planned(A100, **overrides), pairs=10_000) == steps


def test_checkpoints_by_strategy(llama):
    assert kept_checkpoints(planned(A100), 1592) == 3  # two, and the one that is being written
    assert kept_checkpoints(planned(A100), 150) == 1
    assert kept_checkpoints(planned(A100, save_strategy="no"), 50) == 0
    assert kept_checkpoints(planned(A100, save_total_limit=None), 1592) == 8
    assert kept_checkpoints(planned(A100, save_strategy="epoch", num_train_epochs=2), 3000) == 2
    assert checkpoint_bytes(planned(A100, save_only_model=True), llama) == 4 * llama.trained


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


def test_cases_are_read_and_others_refused():
    assert parse_case("512/128/256x2") == (512, 128, 256, 2)
    for case in ("512/128", "a/b/cx1", "1/2/3"):
        with pytest.raises(RecipeError, match="prompt/chosen/rejectedxpairs"):
            parse_case(case)


# Fit, time and cost.


def test_the_advice_follows_from_the_simulated_peaks(llama, llama_416):
    """The 80 GB default on smaller cards, a tenth left free, worked out from the peaks above.

    With the CUDA context about 0.6 GB come on top. On 40 GB (35.5 to use) 49 GB do not fit; two
    pairs, which take half of the 43 GB above weights and adapter less, do. On 24 GB (21.2) neither
    does, and one pair, a quarter of them, does. On 12 GB (10.8) only recomputing is left.
    """
    gpus = hardware()["gpus"]

    def advice(memory_gb: float) -> tuple[bool, str]:
        return fit(planned(A100), llama, gpus["A100-40"] | {"memory_gb": memory_gb})

    assert fit(planned(A100), llama, gpus["A100-80"]) == (True, "")
    two = "per_device_train_batch_size: 2, gradient_accumulation_steps: 4"
    assert fit(planned(A100), llama, gpus["A100-40"]) == (False, two)
    fits, change = advice(23.5)
    assert not fits and change == "per_device_train_batch_size: 1, gradient_accumulation_steps: 8"
    fits, change = advice(12.0)
    assert not fits and change.startswith("activation_checkpointing: true")
    assert change.endswith("merge in main memory: scripts.export --set use_cpu=true")
    assert advice(5.0)[1].startswith("does not fit, even with")  # the weights alone are 5.3
    assert fit(planned(A100), llama, gpus["T4"])[1].startswith("no bfloat16")
    paged = fit(planned(RANK_416), llama_416, gpus["L4"])
    assert not paged[0] and "the optimiser pages" in paged[1]
    assert "pages" not in fit(planned(RANK_416, optim="adamw_torch"), llama_416, gpus["L4"])[1]


def test_advice_keeps_the_pairs_of_a_step_and_names_nothing_that_is_set():
    for cfg in (planned(A100), planned(SMALL_GPU), planned(A100, per_device_train_batch_size=3)):
        whole = cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps
        for change in smaller(cfg):
            assert all(getattr(cfg.dpo, name) != value for name, value in change.items())
            if "per_device_train_batch_size" in change:
                batch, steps = change["per_device_train_batch_size"], "gradient_accumulation_steps"
                assert batch * change[steps] == whole


@pytest.mark.parametrize(
    ("config", "gpu"),
    [(A100, "A100-80"), (RANK_416, "A100-80"), (SMALL_GPU, "L4"), (FORTY, "A100-40")],
)
def test_the_configs_leave_a_fifth_of_the_gpu_that_they_are_for(config, gpu):
    peaks = memory_table(planned(config)).loc["peak"]
    room = hardware()["gpus"][gpu]["memory_gb"]
    assert peaks.drop("merge").max() < 0.8 * room
    assert peaks["merge"] < room  # which may go through main memory instead


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
    by_hand = 6 * (body + 10) * 3 + 4 * 2 * 4 * 64 * visible + 6 * 64 * VOCABULARY * 2
    assert step_flops(config, np.array([[1, 1, 1]]), lora=10) == by_hand


# The command.


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
    text = plan_text(cfg, dataset_size(cfg))
    step = float(text.split("\npeak ")[1].split()[2])
    told = float(re.search(r"half as much again, ([\d.]+) GB, until the evaluation", text)[1])
    assert told == pytest.approx(1.5 * step, abs=0.06)


@pytest.mark.parametrize(
    ("overrides", "remark"),
    [
        ({"bf16": False, "dtype": "float32"}, "WARNING: with dtype: float32 the plan was not"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "WARNING: with load_in_8bit"),
        ({"optim": "adafactor"}, "optim: adafactor is counted as AdamW"),
    ],
)
def test_the_plan_says_what_it_was_not_held_against(overrides, remark):
    text = plan_text(planned(A100, **overrides), dataset_size(planned(A100)))
    assert remark in text


def test_an_architecture_that_is_nowhere_is_one_line(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="no architecture of no/such-model") as refused:
        architecture(tiny_cfg(model_name_or_path="no/such-model"))
    assert "\n" not in str(refused.value)
