"""Data in the shape of each tool that people come from: read, checked, and trained on.

The rows were written for this test. `python -m pytest -s tests/test_real_shapes.py` prints the
table.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import LLAMA3_TEMPLATE
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.data import check_preferences
from scripts.pairs.formats import detect
from scripts.training import assemble

N = 8  # rows of a file, unless it says otherwise
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory) -> Path:
    """A random two-layer Llama over bytes, in Llama 3's chat format: loaded in a moment."""
    folder = tmp_path_factory.mktemp("byte-llama")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1],
        chat_template=LLAMA3_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(alphabet) + len(SPECIAL), hidden_size=32, intermediate_size=64,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            bos_token_id=len(alphabet), eos_token_id=len(alphabet) + 1, tie_word_embeddings=False,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def q(i: int) -> str:
    return f"What is {i} times seven?"


def yes(i: int) -> str:
    return f"It is {7 * i}."


def no(i: int) -> str:
    return f"Seven is a number, {i} is another, and much has been said of both."


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict:
    return {"from": "gpt", "value": text}


def value(role: str, text: str) -> dict:
    """A message of LLaMA-Factory v1."""
    return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": 1.0}


def rows(make, count: int = N) -> list[dict]:
    return [make(i) for i in range(count)]


def lines(some: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some).encode()


def table(path: Path, some: list[dict], encoding: str = "utf-8", delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(some[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(some)


PLAIN = rows(lambda i: {"prompt": q(i), "chosen": yes(i), "rejected": no(i)})
EVERY = {
    "TRL, explicit": ("explicit", PLAIN),
    "TRL, implicit": (
        "implicit",
        rows(lambda i: {
            "chosen": [user(q(i)), said(yes(i))], "rejected": [user(q(i)), said(no(i))],
        }),
    ),
    "Intel/orca_dpo_pairs": (
        "orca",
        rows(lambda i: {"system": "", "question": q(i), "chosen": yes(i), "rejected": no(i)}),
    ),
    "UltraFeedback binarized": (
        "explicit",
        rows(lambda i: {
            "prompt": q(i), "prompt_id": f"{i:x}", "chosen": [user(q(i)), said(yes(i))],
            "rejected": [user(q(i)), said(no(i))], "messages": [user(q(i)), said(yes(i))],
            "score_chosen": 8.0, "score_rejected": 4.5,
        }),
    ),
    "Anthropic HH-RLHF": (
        "hh",
        rows(lambda i: {
            side: f"\n\nHuman: {q(i)}\n\nAssistant: {text(i)}"
            for side, text in (("chosen", yes), ("rejected", no))
        }),
    ),
    "LLaMA-Factory, alpaca": (
        "alpaca",
        rows(lambda i: {"instruction": q(i), "input": "", "chosen": yes(i), "rejected": no(i)}),
    ),
    "LLaMA-Factory, sharegpt": (
        "sharegpt",
        rows(lambda i: {
            "conversations": [human(q(i))], "chosen": gpt(yes(i)), "rejected": gpt(no(i)),
        }),
    ),
    "LLaMA-Factory v1": (
        "llamafactory",
        rows(lambda i: {
            "chosen_messages": [value("user", q(i)), value("assistant", yes(i))],
            "rejected_messages": [value("user", q(i)), value("assistant", no(i))],
        }),
    ),
    "LLaMA-Factory, KTO messages": (
        "unpaired",
        rows(lambda i: {
            "messages": [user(q(i // 2)), said((no if i % 2 else yes)(i // 2))],
            "label": i % 2 == 0,
        }, 16),
    ),
    "LLaMA-Factory, KTO alpaca": (
        "unpaired",
        rows(lambda i: {
            "instruction": q(i // 2), "input": "", "output": (no if i % 2 else yes)(i // 2),
            "kto_tag": i % 2 == 0,
        }, 17),
    ),
    "LLaMA-Factory, KTO sharegpt": (
        "unpaired",
        rows(lambda i: {
            "conversations": [human(q(i // 2)), gpt((no if i % 2 else yes)(i // 2))],
            "kto_tag": i % 2 == 0,
        }, 16),
    ),
    "TRL, unpaired": (
        "unpaired",
        rows(lambda i: {
            "prompt": q(i // 2), "completion": (no if i % 2 else yes)(i // 2), "label": i % 2 == 0,
        }, 16),
    ),
    "axolotl, chat_template": (
        "messages",
        rows(lambda i: {
            "messages": [user("Hi."), said("Hi!"), user(q(i))],
            "chosen": said(yes(i)), "rejected": said(no(i)),
        }),
    ),
    "axolotl, chatml.argilla": (
        "responses",
        rows(lambda i: {
            "system": "Be brief.", "instruction": q(i), "chosen_response": yes(i),
            "rejected_response": no(i),
        }),
    ),
    "MedicalGPT": (
        "responses",
        rows(lambda i: {
            "system": "", "history": [["Hi.", "Hi!"]], "question": q(i),
            "response_chosen": yes(i), "response_rejected": no(i),
        }),
    ),
    "ms-swift": (
        "swift",
        rows(lambda i: {"messages": [user(q(i)), said(yes(i))], "rejected_response": no(i)}),
    ),
    "ms-swift, rejected_messages": (
        "swift",
        rows(lambda i: {
            "messages": [user(q(i)), said(yes(i))],
            "rejected_messages": [user(q(i)), said(no(i))],
        }),
    ),
    "ms-swift, query": (
        "swift",
        rows(lambda i: {
            "query": q(i), "response": yes(i), "rejected_response": no(i),
            "history": [["Hi.", "Hi!"]],
        }),
    ),
    "OpenAI preference file": (
        "openai",
        rows(lambda i: {
            "input": {"messages": [user(q(i))], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [said(yes(i))], "non_preferred_output": [said(no(i))],
        }),
    ),
    "Stack Exchange, paired": (
        "stackexchange",
        rows(lambda i: {
            "qid": i, "question": q(i), "date": "2020-02-02", "metadata": ["https://example.org"],
            "response_j": yes(i), "response_k": no(i),
        }),
    ),
    "messages and rejected": (
        "swift", rows(lambda i: {"messages": [user(q(i)), said(yes(i))], "rejected": no(i)}),
    ),
    "HelpSteer2, preferences": (
        "compared",
        rows(lambda i: {
            "split": "train", "prompt": q(i), "preference_strength": 2 if i else 0,
            "response_1": no(i), "response_2": yes(i), "preference_statement": "made up",
        }),
    ),
    "HelpSteer3, preferences": (
        "compared",
        rows(lambda i: {
            "domain": "general", "context": [user(q(i))], "response1": yes(i), "response2": no(i),
            "overall_preference": -1, "individual_preference": [{"score": -1}],
        }),
    ),
    "PKU-SafeRLHF": (
        "compared",
        rows(lambda i: {
            "prompt": q(i), "response_0": yes(i), "response_1": no(i), "is_response_0_safe": True,
            "better_response_id": 0, "safer_response_id": 1,
        }),
    ),
    "Chatbot Arena, conversations": (
        "compared",
        rows(lambda i: {
            "question_id": str(i), "model_a": "a", "model_b": "b", "turn": 1,
            "winner": "model_a" if i else "tie (bothbad)",
            "conversation_a": [user(q(i)), said(yes(i))],
            "conversation_b": [user(q(i)), said(no(i))],
        }),
    ),
    "Chatbot Arena, lists": (
        "compared",
        rows(lambda i: {
            "id": i, "prompt": json.dumps([q(i)]), "response_a": json.dumps([no(i)]),
            "response_b": json.dumps([yes(i)]),
            "winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0,
        }),
    ),
    "SHP": (
        "compared",
        rows(lambda i: {
            "post_id": str(i), "history": q(i), "human_ref_A": yes(i), "human_ref_B": no(i),
            "labels": 1, "score_A": 9, "score_B": 2,
        }),
    ),
    "WebGPT": (
        "compared",
        rows(lambda i: {
            "question": {"id": str(i), "full_text": q(i)},
            "answer_0": no(i), "answer_1": yes(i), "score_0": -1.0, "score_1": 1.0,
        }),
    ),
    "Stack Exchange, scores": (
        "scored",
        rows(lambda i: {
            "qid": i, "question": q(i),
            "answers": [
                {"answer_id": 3 * i + n, "pm_score": score, "selected": n == 1, "text": text}
                for n, (score, text) in enumerate([(0, no(i)), (3, yes(i)), (1, "Who knows?")])
            ],
        }),
    ),
    "UltraFeedback": (
        "scored",
        rows(lambda i: {
            "source": "made up", "instruction": q(i), "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": no(i), "overall_score": 4.0 if i else 8.5},
                {"model": "b", "response": yes(i), "overall_score": 8.5},
            ],
        }),
    ),
    "ranked answers": (
        "scored",
        rows(lambda i: {
            "prompt": q(i),
            "answers": [{"answer": no(i), "rank": 2}, {"answer": yes(i), "rank": 1}],
        }),
    ),
    "answers and rewards": (
        "scored",
        rows(lambda i: {"prompt": q(i), "responses": [yes(i), no(i)], "rewards": [1.5, -0.5]}),
    ),
}  # fmt: skip
# Files rather than formats: how the plain rows are written.
FILES = {
    "pairs.JSONL.gz": lambda path: path.write_bytes(gzip.compress(lines(PLAIN))),
    "excel.csv": lambda path: table(
        path, [PLAIN[0] | {"prompt": "Für 5 €?"}, *PLAIN[1:]], "cp1252", ";"
    ),
    "pairs.parquet": lambda path: pd.DataFrame(PLAIN).to_parquet(path),
    "saved": lambda path: Dataset.from_list(PLAIN).save_to_disk(path),
    "damaged.jsonl": lambda path: path.write_bytes(lines(PLAIN) + b'{"prompt": "Cut sh'),
}
# How many rows of a file are left out, and what is said of the first.
LEFT_OUT = {
    "UltraFeedback": (
        1,
        "the best score is 8.5, the worst 8.5: not more than 0 (score_margin) apart",
    ),
    "HelpSteer2, preferences": (1, "the two answers were found equally good"),
    "Chatbot Arena, conversations": (1, "the two answers were found equally good"),
    "LLaMA-Factory, KTO alpaca": (1, "no answer labelled bad is left for the same prompt"),
    "damaged.jsonl": (1, "not JSON"),
}


@pytest.fixture(scope="module")
def printed():
    shown = [
        "",
        "| file | format | rows | pairs | left out, why | trained 3 steps |",
        "|---" * 6 + "|",
    ]
    yield shown
    print("\n".join(shown))


@pytest.mark.parametrize("name", [*EVERY, *FILES])
def test_data_in_the_shape_of_each_tool_is_read_and_trained_on(
    name, byte_llama, tiny_cfg, tmp_path, printed
):
    path, form, some = tmp_path / "pairs.jsonl", *EVERY.get(name, ("explicit", PLAIN))
    if name in FILES:
        path = tmp_path / name
        FILES[name](path)
    else:
        path.write_bytes(lines(some))
        assert detect({column for row in some for column in row}, some) == form
    cfg = tiny_cfg(
        model_name_or_path=str(byte_llama), dataset_name=str(path), max_length=512, max_steps=3,
        test_split_size=0.25, per_device_train_batch_size=2,
    )  # fmt: skip
    _, report = check_preferences(cfg)
    bad, (count, why) = report.bad(), LEFT_OUT.get(name, (0, ""))
    assert len(bad) == count and (not bad or why in bad[0].detail), bad
    run = assemble(cfg)
    pairs = [pair for split in run.pairs.values() for pair in split]
    for pair in pairs:  # the right way round, and to the right question
        number = pair["prompt"][-1]["content"].split()[2]
        if number.isdigit():
            assert pair["chosen"] == [said(yes(int(number)))]
            assert pair["rejected"] == [said(no(int(number)))]
    run.trainer.train()
    assert run.trainer.state.global_step == 3
    losses = [row["loss"] for row in run.trainer.state.log_history if "loss" in row]
    assert len(losses) == 3 and all(loss == loss for loss in losses)
    total = sum(report.rows.values())
    assert len(pairs) == (total // 2 if form == "unpaired" else N if name in FILES else N - count)
    left = f"{len(bad)}: {bad[0].detail}" if bad else "0"
    printed.append(f"| {name} | {form} | {total} | {len(pairs)} | {left} | yes |")


def test_there_are_enough_of_them():
    assert len(EVERY) + len(FILES) >= 20
