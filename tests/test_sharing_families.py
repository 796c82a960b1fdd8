"""Over every family of causal language models: what the trainer computes is what TRL computes."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, WORDS, tiny_family
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from scripts.sharing.forward import share_prefixes
from scripts.sharing.trainer import PrefixSharedDPOTrainer

SHARE = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3", "gpt2", "olmo2", "granite",
    "glm4",
}  # fmt: skip
REFUSED = {
    "stablelm", "nemotron", "falcon", "lfm2", "falcon_h1", "bamba", "qwen3_next",
    "gpt_neo",  # a window of another name in every second layer
}  # fmt: skip


# What the small numbers of families.py do not fit, by reason; all but Longcat, NemotronH and what
# is not text alone have a near relative that they do fit.
UNBUILT = {
    name: reason
    for reason, names in {
        "its defaults alone make no model": "dbrx dots1 emu3 llama4 musicgen musicgen_melody "
        "qwen3_5 qwen3_5_moe qwen4_exp gemma4_assistant gemma4_unified_assistant",
        "its layers are described by lists of their own": "bailing_hybrid cohere_compass_text "
        "dots3_note gemma3n gemma3n_text longcat_flash mimo_v2_flash nemotron_h qwen4_exp_text "
        "reformer xmod zamba zamba2",
        "it stays large, or has kernels of fixed size": "blt phi4_multimodal roc_bert xlstm",
    }.items()
    for name in names.split()
}
# Families whose model stands under a name that TRL's head does not ask for: TRL cannot train them.
NO_HEAD = {"llama4_text", "mllama"}
COVERED = [name for name in FAMILIES if name not in UNBUILT and name not in NO_HEAD]


@pytest.fixture(scope="module")
def tokenizer():
    """A word a token."""
    names = ["[unknown]", "[pad]", "[end]", *(f"w{i}" for i in range(3, WORDS))]
    words = {name: i for i, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(words, unk_token="[unknown]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", eos_token="[end]")


def random_rows(sizes, seed: int) -> list[list[np.ndarray]]:
    random = np.random.default_rng(seed)
    return [[random.integers(3, WORDS, size) for size in pair] for pair in sizes]


def make_trainer(model, tokenizer, folder, rows=None, **settings):
    """Full fine-tuning over a stream of pairs, with a reference model of its own."""
    rows = rows or random_rows([(60, 50, 40), (20, 9, 30)], seed=0)
    rows = [
        {name: "".join(f"w{i} " for i in ids) for name, ids in zip(COLUMNS, row, strict=True)}
        for row in rows
    ]
    settings = {
        "use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "max_length": None,
        "activation_checkpointing": False, "router_aux_loss_coef": 0.0, **settings,
    }  # fmt: skip
    args = DPOConfig(output_dir=str(folder), **settings)
    data = Dataset.from_list(rows)
    return PrefixSharedDPOTrainer(
        model=model, ref_model=copy.deepcopy(model), args=args, processing_class=tokenizer,
        train_dataset=data if args.precompute_ref_log_probs else data.to_iterable_dataset(),
    )  # fmt: skip


COLUMNS = ("prompt", "chosen", "rejected")
# Longer than the pairs that the trainer compares, and than any window of these models.
BATCH = [(150, 70, 40), (9, 1, 30), (1, 12, 5)]


def outcome(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of a batch under `model`, and every gradient."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: ids.tolist() for name, ids in zip(names, row, strict=True)}
        for row in random_rows(BATCH, seed=1)
    ]
    batch = DataCollatorForPreference(pad_token_id=1)(rows)
    labels = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
    model.eval()  # dropout that is no module of its own would differ by itself
    model.zero_grad()
    logps = model(**batch, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    signs = torch.tensor([1.0, -1.0]).repeat_interleave(len(rows))[:, None]
    (logps * signs).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def distance(one, two) -> float:
    """The larger of the difference in nats and of the gradients' difference, as a share of them."""
    (logps, grads), (own_logps, own_grads) = one, two
    if grads.keys() != own_grads.keys():
        return float("inf")
    whole = sum(g.square().sum() for g in grads.values()).sqrt()
    apart = sum((own_grads[n] - g).square().sum() for n, g in grads.items()).sqrt()
    return max((logps - own_logps).abs().max().item(), (apart / whole).item())


def stock_model(model) -> torch.nn.Module:
    """A copy of `model` with TRL's head, as its own trainer has it."""
    stock = copy.deepcopy(model)
    add_fused_lm_head(stock)
    return stock


@pytest.mark.parametrize(
    "name",
    [
        name if name in SHARE | REFUSED else pytest.param(name, marks=pytest.mark.slow)
        for name in COVERED
    ],
)
def test_the_trainer_computes_what_trl_computes(name, tokenizer, tmp_path):
    """By sharing prefixes, or by refusing to; and what the comparison refuses is wrong indeed."""
    model = tiny_family(name)
    stock = stock_model(model)
    truth = outcome(stock)
    trainer = make_trainer(model, tokenizer, tmp_path)
    assert distance(truth, outcome(trainer.model)) < 1e-4
    if name in SHARE:
        assert trainer.refusal is None
    if name in REFUSED:
        assert trainer.refusal
    if "prefix_sharing fails" in (trainer.refusal or ""):
        try:
            share_prefixes(stock)
            wrong = distance(truth, outcome(stock))
        except (ValueError, RuntimeError, AssertionError, TypeError):
            wrong = float("inf")
        assert wrong > 0.05


def test_the_lists_name_families_that_there_are():
    assert set(FAMILIES) >= NO_HEAD | set(UNBUILT)
    assert set(COVERED) >= SHARE | REFUSED


ALIKE = list(range(3, 40))  # an answer of which the comparison sees the beginning only
CASES = {
    "one pair": ([[[5, 6, 7], [8, 9], [10]]], {}),
    "a prompt of one token": ([[[5], [8, 9, 11], [10, 12]]], {}),
    "answers that begin alike": ([[[5, 6], [*ALIKE, 5], [*ALIKE, 9]]], {}),
    "answers cut short": (None, {"max_length": 24}),
    "answers kept at their end": (None, {"max_length": 8, "truncation_mode": "keep_end"}),
    "bfloat16": (None, {"bf16": True}),
    "float16": (None, {"fp16": True}),
    "a reference scored beforehand": (None, {"precompute_ref_log_probs": True}),
    "dropout": (None, {"disable_dropout": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_comparison_tells_right_from_wrong(case, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "cache")
    rows, settings = CASES[case]
    refusals = {}
    for name in ("llama", "seed_oss", "stablelm"):  # the second has dropout in its attention
        model = tiny_family(name).train()
        trainer = make_trainer(model, tokenizer, tmp_path, rows, **settings)
        refusals[name] = trainer.refusal
        assert trainer.model.training  # as it was
    assert refusals["llama"] is refusals["seed_oss"] is None
    assert "prefix_sharing fails for StableLmForCausalLM" in refusals["stablelm"]
