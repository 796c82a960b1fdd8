"""Prefix sharing equals TRL's own trainer: losses, log-probabilities, gradients, whole runs."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import yaml
from conftest import PAIRS, explicit, write_jsonl
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    TrainerCallback,
)
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from scripts.base import ROOT
from scripts.model import load_tokenizer
from scripts.sharing.attention import (
    FLEX_BLOCK,
    attend,
    attention_arguments,
    causal_blocks,
    causal_fused,
    compiled_block_mask,
    dense_mask,
    may_attend,
)
from scripts.sharing.forward import share_prefixes
from scripts.sharing.head import AnswerLogps
from scripts.sharing.lora import fuse_adapter
from scripts.sharing.reference_cache import COLUMNS as REFERENCE
from scripts.sharing.reference_cache import cache_folder as reference_cache
from scripts.sharing.row import fill_up, pack
from scripts.sharing.support import PrefixSharingError
from scripts.sharing.trainer import PrefixSharedDPOTrainer

LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "cache")


@pytest.fixture
def both(tiny_trainer):
    """TRL's trainer and ours, over the same weights, with an adapter that is not zero."""

    def make(attention: str = "", **overrides) -> tuple[DPOTrainer, ...]:
        trainers = [tiny_trainer(prefix_sharing=shared, **overrides) for shared in (False, True)]
        assert [isinstance(t, PrefixSharedDPOTrainer) for t in trainers] == [False, True]
        if attention:  # as PrefixSharedDPOTrainer(prefix_attention=...) has it from the start
            ours = trainers[1]
            ours._unshare()
            ours.prefix_attention, ours._undo = attention, None
            ours._share_if_equal()
            assert ours.refusal is None
        for trainer in trainers:
            stir(trainer)
            trainer.current_gradient_accumulation_steps = 1
        return tuple(trainers)

    return make


def stir(trainer, seed: int = 0) -> None:
    """Give every LoRA matrix random values: at the start B is 0, and so is A's gradient."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in trainer.model.named_parameters():
        if "lora_" in name:
            value = torch.randn(weight.shape, generator=generator) * 0.05
            weight.data.copy_(value)


def tokens(sizes, seed: int = 0, vocabulary: int = 1000) -> list[dict]:
    """Random pairs whose prompt, chosen and rejected have the given numbers of tokens."""
    random = np.random.default_rng(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: random.integers(5, vocabulary, n).tolist() for name, n in zip(names, size)}  # noqa: B905
        for size in sizes
    ]


def scored(trainer, rows: list[dict]) -> tuple[float, dict, dict]:
    """Loss, logged metrics and gradients of one batch."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    metrics.pop("num_tokens")
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), metrics, grads


def assert_equal(one, two, relative=2e-5) -> None:
    (loss, metrics, grads), (own_loss, own_metrics, own_grads) = one, two
    assert own_loss == pytest.approx(loss, rel=relative, abs=1e-6)
    for name in [name for name in own_metrics if name.startswith("loss/")]:
        own_metrics.pop(name)  # the terms apart, which TRL does not log; tests/test_terms.py
    assert own_metrics == pytest.approx(metrics, rel=relative, abs=1e-5)
    assert grads.keys() == own_grads.keys()
    # A gradient may be nothing: a single token attends to itself, whatever its query and key.
    floor = 1e-3 * max(gradient.norm() for gradient in grads.values())
    for name, gradient in grads.items():
        distance = (own_grads[name] - gradient).norm()
        assert distance <= relative * max(gradient.norm(), floor), (name, distance, gradient.norm())


# Ordinary pairs, answers of one token, equal lengths, very unequal ones, a prompt of one token, and
# pairs that max_length cuts, down to a single token of the answer.
SIZES = [(5, 9, 14), (12, 1, 1), (8, 6, 6), (3, 1, 60), (1, 7, 2), (40, 40, 9), (63, 9, 5)]


def test_loss_metrics_and_every_gradient_are_trls(both):
    stock, shared = both(max_length=64)
    assert_equal(scored(stock, tokens(SIZES)), scored(shared, tokens(SIZES)))


def test_so_they_are_over_llama_3s_whole_vocabulary(both, llama3_vocabulary):
    stock, shared = both(model_name_or_path=str(llama3_vocabulary), max_length=64)
    assert_equal(scored(stock, tokens(SIZES)), scored(shared, tokens(SIZES)))


def test_the_head_is_as_near_to_the_truth_as_trls():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 64), torch.randn(128_256, 64) * 0.02
    targets = torch.randint(0, len(weight), (2,))
    exact = hidden.double().requires_grad_()
    logps = (exact @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])
    logps.sum().backward()
    errors = {}
    for name, head in (
        ("ours", lambda h: AnswerLogps.apply(h, weight, None, targets, True)),
        ("trl", lambda h: ChunkedLogProbFunction.apply(h, weight, None, targets, 1.0, 8192)),
    ):
        own = hidden.clone().requires_grad_()
        found = head(own)[0]
        found.sum().backward()
        assert found.tolist() == pytest.approx(logps[:, 0].tolist(), rel=1e-6)
        errors[name] = ((own.grad - exact.grad).norm() / exact.grad.norm()).item()
    assert errors["ours"] < errors["trl"] < 1e-5


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_pairs_of_any_lengths_give_the_same(both, data):
    if not hasattr(both, "made"):
        both.made = both(max_length=64)
    size = st.tuples(st.integers(1, 63), st.integers(1, 70), st.integers(1, 70))
    rows = tokens(data.draw(st.lists(size, min_size=1, max_size=3)), data.draw(st.integers(0, 99)))
    assert_equal(*(scored(trainer, rows) for trainer in both.made))


def test_the_text_of_a_pair_with_an_empty_system_message_gives_the_same(both, tmp_path):
    rows = [explicit(*pair) for pair in PAIRS]
    for row in rows[:3]:
        row["prompt"].insert(0, {"role": "system", "content": ""})
    write_jsonl(tmp_path / "p" / "train.jsonl", rows[:4])
    write_jsonl(tmp_path / "p" / "test.jsonl", rows[4:])
    stock, shared = both(dataset_name=str(tmp_path / "p"))
    rows = stock.train_dataset.to_list()
    assert rows == shared.train_dataset.to_list()
    assert_equal(scored(stock, rows), scored(shared, rows))


@pytest.mark.parametrize("loss", [*LOSSES, ["sigmoid", "sft"]], ids=str)
def test_every_loss_is_trls(both, loss):
    weights = [1.0, 0.5] if isinstance(loss, list) else None
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    stock, shared = both(loss_type=loss, loss_weights=weights, label_smoothing=smoothing)
    rows = tokens(SIZES[:5])
    # discopop's weight of a pair is steep near a margin of 0: it multiplies what rounding does
    relative = 1e-4 if loss == "discopop" else 2e-5
    assert_equal(scored(stock, rows), scored(shared, rows), relative)


@pytest.mark.parametrize(
    "setting",
    [
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"truncation_mode": "keep_end", "max_length": 30},
        {"activation_checkpointing": True},
        {"lora_target_modules": ["q_proj", "down_proj"]},
    ],
    ids=lambda setting: "-".join(setting),
)
def test_every_setting_is_trls(both, setting):
    rows = tokens(SIZES[:5])
    assert_equal(*(scored(trainer, rows) for trainer in both(**setting)))


@pytest.mark.parametrize("attention", ["mask", "segments"])
def test_either_attention_is_trls(both, attention):
    assert_equal(*(scored(trainer, tokens(SIZES[:6])) for trainer in both(attention=attention)))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 999), changed=st.integers(0, 999))
def test_chosen_never_reaches_rejected(both, seed, changed):
    if not hasattr(both, "made"):
        both.made = both()
    shared = both.made[1]
    rows = tokens([(6, 9, 7), (3, 4, 12)], seed)
    others = tokens([(6, 9, 7), (3, 4, 12)], 1000 + changed)
    swapped = [row | {"chosen_ids": o["chosen_ids"]} for row, o in zip(rows, others, strict=True)]
    found = [answers(shared, some) for some in (rows, swapped)]
    half = len(rows)
    assert torch.equal(found[0][half:], found[1][half:])  # to the last bit
    assert not torch.equal(found[0][:half], found[1][:half])


def answers(trainer, rows) -> torch.Tensor:
    """The policy's log-probability of every token of the chosen answers, then of the rejected."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with torch.no_grad():
        return trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels,
            fused_lm_head=True, use_cache=False,
        ).log_probs  # fmt: skip


def weights(trainer) -> torch.Tensor:
    parameters = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    return torch.cat([p.detach().flatten().float() for p in parameters])


def test_a_run_of_twenty_steps_is_trls(both, tmp_path):
    runs = both(
        max_steps=20, learning_rate=1e-3, gradient_accumulation_steps=2,
        logging_steps=1, per_device_train_batch_size=1, eval_strategy="steps",
        eval_steps=10, output_dir=str(tmp_path),
    )  # fmt: skip
    logs = []
    for trainer in runs:
        trainer.train()
        logs.append(
            [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
        )
    assert len(logs[0]) == len(logs[1]) == 22
    for one, two in zip(*logs, strict=True):
        for name in one.keys() - {k for k in one if "runtime" in k or "per_second" in k}:
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-4), (one["step"], name)
    stock, shared = map(weights, runs)
    start = both()[0]
    assert (stock - weights(start)).norm() > 0.1 * stock.norm()  # they went somewhere
    assert (stock - shared).norm() <= 1e-4 * stock.norm()


def test_in_nf4_and_bfloat16_the_error_is_that_of_the_format(both, any_cpu_in_bfloat16):
    """What 16 bits do to TRL's own numbers is the yardstick for what sharing does to them."""
    rows = tokens(SIZES[:6])
    exact, _ = both(load_in_4bit=True, dtype="float32", bf16=False)
    stock, shared = both(load_in_4bit=True, dtype="bfloat16", bf16=True)
    truth = scored(exact, rows)
    errors = [], []
    for trainer, error in zip((stock, shared), errors, strict=True):
        loss, _, grads = scored(trainer, rows)
        error.append(abs(loss - truth[0]))
        error += [((grads[n].float() - g).norm() / g.norm()).item() for n, g in truth[2].items()]
    noise, ours = np.array(errors[0]), np.array(errors[1])
    assert noise[1:].mean() > 1e-3  # there is something to compare with
    assert ours[1:].mean() <= 1.5 * noise[1:].mean()
    assert ours[1:].max() <= 2 * noise[1:].max()
    assert ours[0] <= 2 * noise[0] + 1e-2


def test_nothing_is_padded_and_the_prompt_is_there_once():
    collator = DataCollatorForPreference(pad_token_id=0)
    batch = collator(tokens(SIZES[:3]))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    row = pack(batch["input_ids"], batch["attention_mask"], labels)
    # The last token of an answer predicts nothing; the last one of the prompt stands there twice.
    assert row.input_ids_1T.shape[1] == sum(p + c - 1 + r for p, c, r in SIZES[:3])
    assert len(row.targets_N) == sum(c + r for _, c, r in SIZES[:3])
    assert row.position_ids_1T[0, :13].tolist() == list(range(13))
    assert row.position_ids_1T[0, 13:27].tolist() == list(range(4, 18))  # rejected restarts
    mask = dense_mask(row)[0, 0]
    assert mask[13, :4].all()  # rejected sees the prompt,
    assert not mask[13, 4:13].any()  # nothing of chosen,
    assert not mask[27:, :27].any()  # and no other pair's tokens


def test_generation_goes_the_way_it_went(both):
    stock, shared = both()
    tokenizer = stock.processing_class
    inputs = tokenizer(
        ["Why?", "Is water wet, or is it not?"], return_tensors="pt", padding=True,
        padding_side="left",
    )  # fmt: skip
    found = [
        trainer.model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True)
        for trainer in (stock, shared)
    ]
    assert torch.equal(*found)


def test_a_run_that_was_stopped_goes_on_the_same(tiny_trainer, tmp_path):
    common = {"max_steps": 6, "save_steps": 3, "save_total_limit": 2, "logging_steps": 1}
    whole = tiny_trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    again = tiny_trainer(output_dir=str(tmp_path / "again"), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.global_step == 6
    assert torch.allclose(weights(whole), weights(again), atol=1e-6)


def reference(trainer) -> np.ndarray:
    return np.array([trainer.train_dataset[name][:] for name in REFERENCE])


def test_reference_logps_are_kept_and_read_again(tiny_trainer):
    live = tiny_trainer()
    first = tiny_trainer(precompute_ref_log_probs=True)
    files = sorted(reference_cache().glob("*.npz"))
    assert len(files) == 2  # the training pairs and the held-out ones
    batch = live._prepare_inputs(live.data_collator(live.train_dataset.to_list()))
    computed = [x.tolist() for x in live.compute_ref_log_probs(live.model, batch)]
    assert reference(first) == pytest.approx(np.array(computed), abs=1e-3)
    kept = np.load(files[0])  # what stands in the files is what the next trainer takes
    for file in files:
        np.savez(file, **{name: np.load(file)[name] - 5 for name in REFERENCE})
    second = tiny_trainer(precompute_ref_log_probs=True, lora_r=4, seed=7, beta=0.3)
    assert reference(second) == pytest.approx(reference(first) - 5, abs=1e-4)
    assert sorted(reference_cache().glob("*.npz")) == files
    assert set(kept) == set(REFERENCE)


@pytest.mark.parametrize("changed", ["max_length", "data", "model", "rope"])
def test_reference_logps_of_something_else_are_not_taken(
    tiny_trainer, tiny_llama3, tmp_path, changed
):
    tiny_trainer(precompute_ref_log_probs=True)
    before = set(reference_cache().glob("*.npz"))
    other = {"max_length": {"max_length": 100}}.get(changed)
    if changed == "data":
        write_jsonl(tmp_path / "p" / "train.jsonl", [explicit(*PAIRS[1])])
        write_jsonl(tmp_path / "p" / "test.jsonl", [explicit(*PAIRS[0])])
        other = {"dataset_name": str(tmp_path / "p")}
    if changed == "model":
        model = AutoModelForCausalLM.from_pretrained(tiny_llama3)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.5
        model.save_pretrained(tmp_path / "m")
        load_tokenizer(str(tiny_llama3)).save_pretrained(tmp_path / "m")
        other = {"model_name_or_path": str(tmp_path / "m")}
    if changed == "rope":  # the same weights, read at other positions
        shutil.copytree(tiny_llama3, tmp_path / "m")
        config = LlamaConfig.from_pretrained(tiny_llama3)
        config.rope_parameters["rope_theta"] *= 50
        config.save_pretrained(tmp_path / "m")
        other = {"model_name_or_path": str(tmp_path / "m")}
    tiny_trainer(precompute_ref_log_probs=True, **other)
    assert len(set(reference_cache().glob("*.npz")) - before) == 2


def test_reference_logps_are_found_again_in_another_folder(tiny_trainer, tiny_llama3, tmp_path):
    tiny_trainer(precompute_ref_log_probs=True)
    before = set(reference_cache().glob("*.npz"))
    shutil.copytree(tiny_llama3, tmp_path / "m")
    tiny_trainer(precompute_ref_log_probs=True, model_name_or_path=str(tmp_path / "m"))
    assert set(reference_cache().glob("*.npz")) == before


def test_training_from_kept_reference_logps_is_the_same(tiny_trainer, tmp_path):
    runs = [
        tiny_trainer(max_steps=4, precompute_ref_log_probs=kept, output_dir=str(tmp_path / "r"))
        for kept in (False, True)
    ]
    for trainer in runs:
        trainer.train()
    assert torch.allclose(*map(weights, runs), atol=1e-5)


TRAINING = """
from accelerate import PartialState
from scripts import cli
from scripts.training import main
main(cli.parse("training"))
print(f"one of {PartialState().num_processes}", flush=True)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_run, tmp_path):
    """TRL's way and ours under `accelerate launch`: what one process makes of as many pairs."""
    common = {"max_steps": 3, "logging_steps": 1, "adam_epsilon": 1e-5}
    one, cfg = tiny_run(
        prefix_sharing=False, per_device_train_batch_size=4, output_dir=str(tmp_path), **common
    )
    one.train()
    values = cfg.given | {"per_device_train_batch_size": 2, "report_to": "wandb"}
    del values["output_dir"]
    (tmp_path / "training.py").write_text(TRAINING)
    for shared in (False, True):
        out = tmp_path / str(shared)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"prefix_sharing": shared}))
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch",
             "--config_file=configs/accelerate/cpu-2.yaml", tmp_path / "training.py",
             f"--config={tmp_path / 'run.yaml'}", f"--output-dir={out}"],
            cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
        )  # fmt: skip
        assert done.stdout.count("one of 2") == 2, done.stderr[-3000:]
        log = [json.loads(line) for line in (out / "metrics.jsonl").open()]
        stock = [row for row in one.state.log_history if "loss" in row]
        assert len(log) == len(stock) + 1 == 4  # each step once, and the whole
        for row, own in zip(stock, log, strict=False):
            for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
                assert own[name] == pytest.approx(row[name], rel=1e-4, abs=1e-5), name
        adapter = load_peft_weights(str(out / "adapter"), device="cpu")
        for name, weight in get_peft_model_state_dict(one.model).items():
            assert (adapter[name] - weight).norm() <= 1e-3 * weight.norm(), name
        # The first process alone prints, writes and opens a W&B run.
        assert [done.stdout.count(word) for word in ("no login", "step    3/3", "saved:")] == [
            1
        ] * 3
        assert len(list((out / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "biased", "switched off", "dropout"])
def test_the_fused_adapter_is_pefts(tiny_llama3, kind):
    torch.manual_seed(0)
    more = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "biased": {"lora_bias": True},
    }
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False,
        lora_dropout=0.3 if kind == "dropout" else 0.0, **more.get(kind, {}),
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama3), config)
    ids = torch.randint(0, 1000, (2, 9))
    found = []
    for fused in (False, True):
        if fused:
            assert fuse_adapter(model) == 4
        model.zero_grad()
        torch.manual_seed(1)  # of the dropout
        with model.disable_adapter() if kind == "switched off" else nullcontext():
            logits = model(ids).logits
        if logits.requires_grad:
            logits.square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([logits.detach(), *grads])
    assert len(found[0]) == len(found[1]) == (1 if kind == "switched off" else len(found[0]))
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 3e-5 * one.norm()


def tiny(config_class, model_class, **more):
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return model_class(config_class(**sizes, num_attention_heads=2, num_key_value_heads=1, **more))


def test_models_that_cannot_share_are_refused_by_name(tiny_cfg, tiny_llama3, capsys):
    with pytest.raises(PrefixSharingError, match=r"sliding windows \(16\)"):
        share_prefixes(tiny(MistralConfig, MistralForCausalLM, sliding_window=16))
    other = tiny(MistralConfig, MistralForCausalLM, sliding_window=None)
    other.config.attn_logit_softcapping = 50.0
    with pytest.raises(PrefixSharingError, match="capped attention scores"):
        share_prefixes(other)
    other.config.attn_logit_softcapping = None
    other.config.rope_parameters |= {"rope_type": "dynamic"}
    with pytest.raises(PrefixSharingError, match="dynamic positions"):
        share_prefixes(other)
    other.config.rope_parameters |= {"rope_type": "default"}
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        PrefixSharingError, match="attn_implementation: sdpa, not flash_attention_2"
    ):
        share_prefixes(other)
    tokenizer = load_tokenizer(str(tiny_llama3))
    pairs = Dataset.from_list([explicit(*PAIRS[0])] * 2)
    moe = tiny(
        MixtralConfig, MixtralForCausalLM, sliding_window=None, num_local_experts=2,
        output_router_logits=True,
    )  # fmt: skip
    moe.resize_token_embeddings(len(tokenizer))
    common = {"processing_class": tokenizer, "train_dataset": pairs}
    trainer = PrefixSharedDPOTrainer(
        model=moe, ref_model=moe.__class__(moe.config), args=tiny_cfg().dpo, **common
    )
    assert "mixture-of-experts models are not supported" in trainer.refusal
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    trainer = PrefixSharedDPOTrainer(
        model=model, args=tiny_cfg().dpo, peft_config=prompts, **common
    )
    assert "prompt tuning is not supported" in trainer.refusal
    assert model.config._attn_implementation == "sdpa"  # as it was
    assert "TRL's own way" in capsys.readouterr().out


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_other_llama_like_models_share_as_well(trained):
    """Mistral without its window: head and attention are looked up, not assumed. A head that is
    trained goes TRL's way, over the shared row."""
    torch.manual_seed(0)
    model = tiny(MistralConfig, MistralForCausalLM, sliding_window=None)
    model.lm_head.requires_grad_(trained)
    collator = DataCollatorForPreference(pad_token_id=0)
    batch = collator(tokens([(5, 4, 7), (3, 8, 2)], vocabulary=99))
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    add_fused_lm_head(model)
    found = []
    for shared in (False, True):
        if shared:
            share_prefixes(model)
        model.zero_grad()
        logps = model(**batch, fused_lm_head=True).log_probs
        logps.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logps.detach(), grads))
    (stock, one), (own, two) = found
    assert torch.allclose(own, stock, atol=1e-5)
    assert one.keys() == two.keys()
    assert ("lm_head.weight" in one) == trained
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_with_a_bias_gives_what_trls_gives(trained, dtype):
    """Phi's head has a bias, which may be of another dtype than the rest, as after k-bit set-up."""
    torch.manual_seed(0)
    model = tiny(PhiConfig, PhiForCausalLM, bos_token_id=1, eos_token_id=2).to(dtype)
    torch.nn.init.normal_(model.lm_head.bias)
    model.lm_head.bias.data = model.lm_head.bias.data.float()
    model.lm_head.requires_grad_(trained)
    batch = DataCollatorForPreference(pad_token_id=0)(tokens([(5, 4, 7), (3, 8, 2)], vocabulary=99))
    batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    add_fused_lm_head(model)
    found = []
    for shared in (False, True):
        if shared:
            share_prefixes(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            logps = model(**batch, fused_lm_head=True).log_probs
        logps.sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logps.detach(), grads))
    (stock, one), (own, two) = found
    noise = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(own, stock, atol=noise)
    assert one.keys() == two.keys()
    whole = max(g.norm() for g in one.values())
    for name, gradient in one.items():
        assert (two[name] - gradient).norm() <= noise * max(gradient.norm(), whole), name


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many keys", "fewer keys"])
@pytest.mark.parametrize("sizes", [(300, 300), (7, 290), (1, 5)], ids=str)
def test_the_fused_attention_of_a_gpu_is_that_of_a_cpu(heads, sizes):
    """Chosen has as many keys as queries, rejected its prompt's more: values and gradients."""
    torch.manual_seed(0)
    queries, keys = sizes
    shapes = [(heads[0], queries), (heads[1], keys), (heads[1], keys)]
    tensors = [torch.randn(1, *shape, 16, requires_grad=True) for shape in shapes]
    weight = torch.randn(1, heads[0], queries, 16)
    found = []
    for attention in (causal_blocks, causal_fused):
        out = attention(*tensors, scale=0.3)
        found.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    for one, two in zip(*found, strict=True):
        assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [SIZES[:4], [(60, 40, 30), (90, 200, 100)]],
    ids=["one block", "several blocks"],
)
def test_flex_attention_over_a_filled_row_is_attention_pair_by_pair(sizes):
    """FlexAttention as torch runs it without a compiler, over rows of whole blocks."""
    torch.manual_seed(0)
    batch = DataCollatorForPreference(pad_token_id=0)(tokens(sizes))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    row = pack(batch["input_ids"], batch["attention_mask"], labels)
    filled = fill_up(row, FLEX_BLOCK)
    length, whole = row.input_ids_1T.shape[1], filled.input_ids_1T.shape[1]
    assert whole % FLEX_BLOCK == 0
    assert 0 <= whole - length < FLEX_BLOCK
    tensors = [torch.randn(1, heads, whole, 16) for heads in (4, 2, 2)]
    out = flex_attention(
        *tensors, scale=0.3, enable_gqa=True,
        block_mask=attention_arguments(filled, "flex")["attention_mask"],
    )  # fmt: skip
    assert out.isfinite().all()  # a token that sees nothing would make none
    expected = attend(*(t[:, :, :length] for t in tensors), 0.3, row.pairs)
    assert torch.allclose(out[:, :, :length], expected, atol=1e-5)


def filled_row(sizes):
    batch = DataCollatorForPreference(pad_token_id=0)(tokens(sizes))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return fill_up(pack(batch["input_ids"], batch["attention_mask"], labels), FLEX_BLOCK)


def test_the_block_mask_is_made_once_for_reference_and_policy():
    """It follows from the pairs' lengths and the row's alone; another batch has another."""

    def mask(sizes):
        return attention_arguments(filled_row(sizes), "flex")["attention_mask"]

    sizes = [(60, 40, 30), (90, 200, 100)]
    first = mask(sizes)
    assert mask(sizes) is first
    assert mask(sizes[::-1]) is not first and mask(sizes[:1]) is not first


@pytest.mark.slow
def test_the_compiled_block_mask_is_the_plain_one_for_every_length():
    """One kernel, compiled here for a CPU, for rows of three lengths of several blocks."""
    graphs = torch._dynamo.utils.counters["stats"]
    batches = [[(60, 40, 30), (90, 200, 100)], [(190, 300, 200)], [(150, 60, 90), (40, 30, 20)]]
    for number, sizes in enumerate(batches):
        row = filled_row(sizes)
        whole = row.input_ids_1T.shape[1]
        described = may_attend(tuple(row.pairs), whole, torch.device("cpu"))
        before = graphs["unique_graphs"]
        mask = compiled_block_mask()(described, None, None, whole, whole, "cpu")
        assert graphs["unique_graphs"] - before == (number == 0)
        plain = attention_arguments(row, "flex")["attention_mask"]
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            assert torch.equal(getattr(mask, name), getattr(plain, name)), name


def test_full_fine_tuning_shares_in_policy_and_reference(tiny_trainer):
    """Without LoRA the reference is a second model: steps and metrics are TRL's."""
    runs = [
        tiny_trainer(
            use_peft=False, prefix_sharing=shared, max_steps=3, logging_steps=1, learning_rate=1e-4
        )
        for shared in (False, True)
    ]
    assert runs[1].refusal is None
    for trainer in runs:
        trainer.train()
    stock, own = ([row for row in t.state.log_history if "loss" in row] for t in runs)
    assert len(stock) == len(own) == 3
    for one, two in zip(stock, own, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm", "logps/rejected"):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert stock[-1]["rewards/margins"] > 0.01  # policy and reference are two


NF4 = {"load_in_4bit": True, "dtype": "bfloat16", "bf16": True}


@pytest.mark.parametrize("shared", [False, True], ids=["trl", "shared"])
def test_the_adapter_is_trained_saved_and_resumed_in_float32(tiny_trainer, tmp_path, shared):
    """At a learning rate that bfloat16 rounds away: entries are about 0.05, steps 1e-6."""
    common = {
        "prefix_sharing": shared, "learning_rate": 1e-6, "lr_scheduler_type": "constant",
        "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path), **NF4,
    }  # fmt: skip
    trainer = tiny_trainer(max_steps=2, **common)
    stir(trainer)
    start = adapter(trainer)
    assert {t.dtype for t in start.values()} == {torch.float32}
    trainer.train()
    for name, weight in adapter(trainer).items():
        assert (weight != start[name]).float().mean() > 0.9, name
        assert (weight.bfloat16() != start[name].bfloat16()).float().mean() < 0.05, name
    saved = load_peft_weights(str(tmp_path / "checkpoint-2"), device="cpu")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    moments = trainer.optimizer.state.values()
    assert {m["exp_avg"].dtype for m in moments} == {torch.float32}
    again = tiny_trainer(max_steps=3, **common)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, weight in adapter(again).items():
        assert weight.dtype == torch.float32
        assert 0 < (weight - adapter(trainer)[name]).abs().max() < 1e-5


def adapter(trainer) -> dict[str, torch.Tensor]:
    parameters = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in parameters if p.requires_grad}


@pytest.mark.parametrize("every", [None, 2], ids=["all layers", "every second layer"])
@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "TRL's way"])
def test_checkpointing_stays_as_it_is_set_up(tiny_trainer, every, sharing):
    """No hook piles up on the embeddings, the layers keep their flags, the numbers are the same."""
    common = {"max_steps": 4, "logging_steps": 1, "per_device_train_batch_size": 1}
    common["prefix_sharing"] = sharing
    kwargs = {"use_reentrant": False} | ({"every_n_layers": every} if every else {})
    plain = tiny_trainer(activation_checkpointing=False, **common)
    trainer = tiny_trainer(
        activation_checkpointing=True, activation_checkpointing_kwargs=kwargs, **common
    )
    states = []

    class Record(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            flags = [m.gradient_checkpointing for m in model.get_base_model().model.layers]
            states.append((len(model.get_input_embeddings()._forward_hooks), flags))

    trainer.add_callback(Record())
    trainer.train()
    plain.train()
    assert len(states) == 4
    assert states[0][1] == [True, not every]
    assert all(state == states[0] for state in states)
    assert torch.allclose(weights(trainer), weights(plain), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["segments", "mask", "flex"])
def test_on_a_gpu_every_attention_is_trls(both, attention):
    rows = tokens(SIZES[:6])
    setting = {"use_cpu": False, "bf16": False, "dtype": "float32"}
    assert_equal(
        *(scored(trainer, rows) for trainer in both(attention=attention, **setting)), relative=1e-3
    )
