"""The tokens of checks, views and export are those of TRL's trainer, whatever the chat template."""

import itertools
import json
from functools import partial

import pytest
import torch
from conftest import explicit, pairs_in
from datasets import Dataset
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from scripts.data import check_preferences
from scripts.pairs.generation import Unrepeated, generate_replies
from scripts.pairs.tokens import IDS, end_tokens, templated, tokenize_pairs, tokenize_prompts
from scripts.sharing.trainer import PrefixSharedDPOTrainer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each family's way of writing a conversation: its eos_token, its other special tokens, the token
# that ends a turn, and a template of that shape.
FAMILIES = {
    "gemma": (
        "<eos>", "<bos> <start_of_turn> <end_of_turn>", "<end_of_turn>",
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "chatml": ("<|im_end|>", "<|im_start|>", "<|im_end|>", CHATML),
    "chatml of a base tokenizer": ("<|eod|>", "<|im_start|> <|im_end|>", "<|im_end|>", CHATML),
    "llama 3": (
        "<|eot_id|>", "<|bot|> <|start_header_id|> <|end_header_id|>", "<|eot_id|>",
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
        "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "mistral": (
        "</s>", "<s>", "</s>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        " {{ m.content }}{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}",
    ),
    "phi 3": (
        "<|endoftext|>", "<|user|> <|assistant|> <|system|> <|end|>", "<|end|>",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    ),
    "cohere": (
        "<eos>", "<|turn|> <|response|> <|/response|> <|/turn|>", "<|/turn|>",
        "{% for m in messages %}<|turn|>{{ m.role }}{% if m.role == 'assistant' %}<|response|>"
        "{{ m.content }}<|/response|>{% else %}{{ m.content }}{% endif %}<|/turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant<|response|>{% endif %}",
    ),
    "qwen, thinking can be switched off": (
        "<|im_end|>", "<|im_start|>", "<|im_end|>",
        "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and "
        "m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    "an empty think block before the answer only": (
        "<|im_end|>", "<|im_start|>", "<|im_end|>", CHATML[:-len("{% endif %}")]
        + "<think>\n\n</think>\n\n{% endif %}",
    ),
    "deepseek, thinking begun": (
        "<|end_of_sentence|>", "<|begin_of_sentence|> <|User|> <|Assistant|>",
        "<|end_of_sentence|>",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
        "{{ m.content }}{{ eos_token }}{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    ),
}  # fmt: skip
PROMPT_IS_NO_PREFIX = {
    "an empty think block before the answer only",
    "deepseek, thinking begun",
}
ROWS = [
    explicit("Is water wet?", "Yes, it is.", "That is debated."),
    explicit("Why?", "Because.", "Because it is so."),  # answers that begin alike
    explicit("What is <2 + 2>?", "4", "\n5 "),
]


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens and the chat template of a family."""
    eos, others, _, template = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [eos, *others.split()]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, bos_token=names[1], pad_token=eos,
        chat_template=template,
    )  # fmt: skip


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    size["initializer_range"] = 1.0  # so that every token of the prompt shows in the answer
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **size))


def trl_rows(pairs: Dataset, tokenizer, folder, trainer=DPOTrainer, **args) -> list[dict]:
    """The tokens that TRL's own trainer has made of `pairs`."""
    args = {"max_length": None, "report_to": "none", "bf16": False, "use_cpu": True} | args
    built = trainer(
        model=tiny_model(tokenizer), args=DPOConfig(output_dir=str(folder), **args),
        processing_class=tokenizer, train_dataset=pairs,
        peft_config=LoraConfig(r=1, target_modules=["q_proj"]),
    )  # fmt: skip
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return built.train_dataset.select_columns(columns).to_list()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_trls_trainer(family, tmp_path):
    tokenizer = tokenizer_of(family)
    rows = tokenize_pairs(ROWS, tokenizer)
    assert rows == trl_rows(Dataset.from_list(ROWS), tokenizer, tmp_path)
    prompts = tokenize_prompts([row["prompt"] for row in ROWS], tokenizer)
    cut = [len(row["prompt_ids"]) < len(ids) for row, ids in zip(rows, prompts, strict=True)]
    assert cut == [family in PROMPT_IS_NO_PREFIX] * len(ROWS)
    for pair, row in zip(ROWS, rows, strict=True):
        whole = tokenizer.apply_chat_template(pair["prompt"] + pair["rejected"], tokenize=False)
        assert tokenizer.decode(row["prompt_ids"] + row["rejected_ids"]) == whole


@pytest.mark.parametrize("family", ["llama 3", "chatml", "deepseek, thinking begun"])
def test_the_trainer_takes_tokens_that_are_there_and_makes_none_itself(family, tmp_path):
    tokenizer = tokenizer_of(family)
    ids = [
        row | {"prompt_ids": row["prompt_ids"] + [65]} for row in tokenize_pairs(ROWS, tokenizer)
    ]
    pairs = Dataset.from_list([pair | row for pair, row in zip(ROWS, ids, strict=True)])
    assert trl_rows(pairs, tokenizer, tmp_path, trainer=PrefixSharedDPOTrainer) == ids


TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "integer"}}}},
    {"type": "function", "function": {"name": "now", "description": "The time."}},
]


def test_a_rows_tools_and_template_options_reach_check_and_trainer_alike(tiny_cfg, tmp_path):
    tokenizer = tokenizer_of("qwen, thinking can be switched off")
    options = [
        {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}},
        {"tools": json.dumps(TOOLS), "chat_template_kwargs": None},
        {"tools": "", "chat_template_kwargs": {"enable_thinking": True}},
        {"tools": [], "images": [], "ref_chosen_logps": -1.5, "ref_rejected_logps": "-2"},
        {"tools": None, "images": None, "prompt_ids": [1]},
        {},
    ]
    rows = [explicit(f"Q{i}?", "Yes.", "No.") | more for i, more in enumerate(options)]
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, rows), max_length=None)
    pairs, report = check_preferences(cfg, tokenizer)
    assert report.findings == []
    for split, data in pairs.items():
        assert "ref_chosen_logps" not in data.column_names  # another reference's
        trained_on = trl_rows(data.remove_columns(IDS), tokenizer, tmp_path)
        assert trained_on == tokenize_pairs(data.to_list(), tokenizer)
        lengths = [[len(ids) for ids in row.values()] for row in trained_on]
        assert report.lengths[split].tolist() == lengths
    prompts = [templated(pair, tokenizer)["prompt"] for pair in pairs["train"]]
    assert ["Tools: " in text for text in prompts] == [True, True] + [False] * 4
    assert [text.endswith("</think>\n\n") for text in prompts] == [True] + [False] * 5


def test_tools_and_images_that_the_trainer_would_stumble_over_are_bad_rows(tiny_cfg, tmp_path):
    extras = [
        {"tools": "add(a, b)"},
        {"tools": ["add"]},
        {"tools": {"name": "add"}},
        {"tools": [{"type": "function", "function": "add"}]},
        {"tools": [{"type": "function", "function": {"name": 5}}]},
        {"chat_template_kwargs": "enable_thinking"},
        {"images": ["cat.png"]},
        {"image": {"path": "cat.png"}},
        {"kept": 1},
    ]
    rows = [explicit(f"Q{i}?", "Yes.", "No.") | more for i, more in enumerate(extras)]
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, rows))
    tokenizer = tokenizer_of("chatml")
    pairs, report = check_preferences(cfg, tokenizer)
    assert [f.kind for f in report.bad()] == ["type"] * 8
    for finding, row in zip(report.bad(), rows, strict=False):
        assert finding.detail.startswith(list(row)[-1])  # names the column
    assert len(trl_rows(pairs["train"], tokenizer, tmp_path)) == 1


@pytest.mark.parametrize("family", ["chatml", "deepseek, thinking begun"])
def test_check_and_trainer_drop_the_same_rows_at_max_length(family, tiny_cfg, tmp_path):
    tokenizer = tokenizer_of(family)
    rows = [explicit("s" * n, "ab", "c" * 30) for n in range(1, 60, 2)]
    kept = {"dataset_name": pairs_in(tmp_path, rows), "max_length": 40}
    pairs, report = check_preferences(tiny_cfg(**kept), tokenizer)
    assert {f.kind for f in report.bad()} == {"no_room"}
    raw = trl_rows(Dataset.from_list(rows), tokenizer, tmp_path, max_length=40)
    assert 0 < len(raw) < len(rows)
    assert tokenize_pairs(pairs["train"].to_list(), tokenizer) == raw


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_turn_is_what_the_template_writes_after_an_answer(family, tiny_cfg, tmp_path):
    tokenizer = tokenizer_of(family)
    eos, _, end, _ = FAMILIES[family]
    assert end_tokens(tokenizer) == set(tokenizer.convert_tokens_to_ids([eos, end]))
    _, report = check_preferences(tiny_cfg(dataset_name=pairs_in(tmp_path, ROWS)), tokenizer)
    assert report.findings == []


def test_ends_come_from_the_generation_config_too_and_a_template_without_one_is_noticed(
    tiny_cfg, tmp_path
):
    tokenizer = tokenizer_of("chatml")
    eos = tokenizer.eos_token_id
    for stops, ends in ((None, {eos}), (65, {eos, 65}), ([65, 66], {eos, 65, 66})):
        assert end_tokens(tokenizer, GenerationConfig(eos_token_id=stops)) == ends
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\n###")
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, ROWS))
    _, report = check_preferences(cfg, tokenizer)
    assert [f.kind for f in report.bad()] == ["unended"] * 8
    # The folder of the model says that generation stops at "#": so do its turns.
    GenerationConfig(eos_token_id=tokenizer.convert_tokens_to_ids("#")).save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    _, report = check_preferences(cfg, tokenizer)
    assert report.findings == []


@pytest.mark.parametrize("family", ["gemma", "phi 3"])
def test_generation_stops_at_the_end_of_turn_of_the_template(family):
    tokenizer = tokenizer_of(family)
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family][2])
    model = tiny_model(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    with torch.no_grad():  # a model that ends its turn at once, whatever it is asked
        model.model.norm.weight.zero_()
        model.model.norm.register_forward_hook(lambda *args: torch.ones_like(args[-1]))
        model.lm_head.weight.zero_()[end] = 1
    prompts = [row["prompt"] for row in ROWS]
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
    assert [(r.ids, r.finished, r.length, r.text) for r in replies] == [([end], True, 0, "")] * 3


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tiny_cfg, tmp_path):
    rows = [ROWS[0], ROWS[1] | {"prompt": [{"role": "system", "content": "Be brief."}]
            + ROWS[1]["prompt"]}, ROWS[2]]  # fmt: skip
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, rows))
    pairs, report = check_preferences(cfg, tokenizer_of("gemma"))
    assert [tuple(f) for f in report.bad()] == [
        ("train", "train.jsonl:2", "template", "the chat template says: no system role here")
    ]
    assert [row["prompt"] for row in pairs["train"]] == [ROWS[0]["prompt"], ROWS[2]["prompt"]]
    assert report.lengths["train"].shape == (2, 3)


def test_replies_are_to_the_prompt_with_its_rows_options():
    tokenizer = tokenizer_of("qwen, thinking can be switched off")
    model = tiny_model(tokenizer)
    options = [{"tools": TOOLS, "enable_thinking": False}, {"tools": None}]
    prompts = [ROWS[0]["prompt"]] * 2
    replies = generate_replies(
        model, tokenizer, prompts, options=options, max_new_tokens=8, batch_size=2
    )
    for reply, prompt, more in zip(replies, prompts, options, strict=True):
        text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True, **more
        )
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.eos_token_id
        )[0]
        assert reply.ids == ids[inputs["input_ids"].shape[1] :].tolist()
    assert replies[0].ids != replies[1].ids


def test_unrepeated_replies_have_no_run_twice_and_may_quote_the_prompt():
    tokenizer = tokenizer_of("chatml")
    model = tiny_model(tokenizer)
    ask = partial(
        generate_replies, model, tokenizer, [ROWS[0]["prompt"]], max_new_tokens=60, batch_size=1
    )

    def runs(ids):
        return list(itertools.pairwise(ids))

    plain, once = ask()[0], ask(unrepeated=2)[0]
    assert len(set(runs(plain.ids))) < len(runs(plain.ids))  # a random model goes in circles
    assert len(set(runs(once.ids))) == len(runs(once.ids))
    scores = torch.zeros(1, 9)
    rule = Unrepeated(3, prompt_length=3)
    assert rule(torch.tensor([[5, 6, 7, 5, 6]]), scores)[0, 7] == 0  # quoted from the prompt
    assert rule(torch.tensor([[1, 2, 3, 5, 6, 7, 5, 6]]), scores)[0, 7] == -torch.inf
