"""Pairs are read right, and the default ones are what their card says."""

import re

import pytest
from conftest import BOT, EOT, explicit, write_jsonl

from scripts.build_pairs import rank, read_jsonl
from scripts.config import ROOT
from scripts.data import (
    DataError,
    from_explicit,
    from_orca,
    length_table,
    load_preferences,
    templated,
    token_lengths,
)
from scripts.models import load_tokenizer

ORCA = {
    "system": "You are brief.",
    "question": "Is water wet?",
    "chosen": "Yes.",
    "rejected": "A matter of debate.",
}
WORDS_OF_NO_WEIGHT = set(
    re.findall(
        r"\w+",
        "a an the what is are was were do does did how why which who when where many much i my me "
        "you to of in on for and it from can should good best way make use used get have has with "
        "at be most difference between",
    )
)


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    return {split: read_jsonl(ROOT / "data" / f"{split}.jsonl") for split in ("train", "test")}


def test_enough_pairs_ship(shipped):
    assert len(shipped["train"]) >= 300
    assert len(shipped["test"]) >= 60


def test_shipped_pairs_keep_the_rule_of_the_card(shipped):
    for row in shipped["train"] + shipped["test"]:
        assert row["chosen_finished"], row["id"]
        assert row["chosen_recall"] > 0, row["id"]
        assert row["chosen"][0]["content"][-1] in ".!?", row["id"]
        if row["kind"] == "concise":
            assert row["rejected_tokens"] >= 1.5 * row["chosen_tokens"], row["id"]
        else:
            assert row["rejected_recall"] < row["chosen_recall"], row["id"]
            assert 1 / 1.5 <= row["rejected_tokens"] / row["chosen_tokens"] <= 1.5, row["id"]


def test_no_held_out_prompt_is_near_a_training_one(shipped):
    def words(row: dict) -> set[str]:
        text = row["prompt"][0]["content"].lower()
        return {w.rstrip("s") for w in re.findall(r"[a-z0-9]+", text)} - WORDS_OF_NO_WEIGHT

    train = [words(row) for row in shipped["train"]]
    for row in shipped["test"]:
        mine = words(row)
        nearest = max(len(mine & other) / len(mine | other) for other in train)
        assert nearest < 0.5, (row["prompt"], nearest)


def test_default_config_loads_the_shipped_pairs(tiny_cfg, shipped):
    pairs = load_preferences(tiny_cfg(dataset_name="data"))
    assert {k: len(v) for k, v in pairs.items()} == {k: len(v) for k, v in shipped.items()}
    assert pairs["test"][0]["prompt"] == shipped["test"][0]["prompt"]
    assert pairs["test"][0]["facts"] == shipped["test"][0]["facts"]


def test_orca_gives_the_same_text_as_its_explicit_twin(tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    twin = explicit("Is water wet?", "Yes.", "A matter of debate.")
    twin["prompt"].insert(0, {"role": "system", "content": "You are brief."})
    assert from_orca(ORCA) == from_explicit(twin)
    text = templated(from_orca(ORCA), tokenizer)
    assert text["prompt"].count("<|begin_of_text|>") == 1
    assert "system<|end_header_id|>\n\nYou are brief." in text["prompt"]
    assert text["chosen"] == "Yes.<|eot_id|>"


@pytest.mark.parametrize("system", ["", "  ", None])
def test_an_empty_system_prompt_is_left_out(system):
    assert [m["role"] for m in from_orca(ORCA | {"system": system})["prompt"]] == ["user"]


def test_orca_is_told_by_its_columns_and_split_when_it_has_no_test_split(tiny_cfg, tmp_path):
    rows = [ORCA | {"question": f"Question {i}?"} for i in range(20)]
    write_jsonl(tmp_path / "orca" / "train.jsonl", rows)
    cfg = tiny_cfg(dataset_name=str(tmp_path / "orca"), test_split_size=0.25)
    pairs = load_preferences(cfg)
    assert {k: len(v) for k, v in pairs.items()} == {"train": 15, "test": 5}
    questions = {k: {r["prompt"][-1]["content"] for r in v} for k, v in pairs.items()}
    assert not questions["train"] & questions["test"]


def test_limits_draw_the_same_rows_again(tiny_cfg):
    cfg = tiny_cfg(train_samples=2, eval_samples=1)
    first, second = load_preferences(cfg), load_preferences(cfg)
    assert (len(first["train"]), len(first["test"])) == (2, 1)
    assert first["train"]["prompt"][:] == second["train"]["prompt"][:]


def test_rows_that_teach_nothing_are_left_out_and_told(tiny_cfg, tmp_path, capsys):
    rows = [
        explicit("A?", "Same.", " Same. "),
        explicit("B?", "", "Long."),
        explicit("C?", "Yes.", "No."),
    ]
    write_jsonl(tmp_path / "p" / "train.jsonl", rows)
    write_jsonl(tmp_path / "p" / "test.jsonl", rows[2:])
    pairs = load_preferences(tiny_cfg(dataset_name=str(tmp_path / "p")))
    assert [row["prompt"][0]["content"] for row in pairs["train"]] == ["C?"]
    assert "Left out 2 pairs" in capsys.readouterr().out


def test_unknown_columns_are_named(tiny_cfg, tmp_path):
    write_jsonl(tmp_path / "p" / "train.jsonl", [{"query": "A?", "good": "b", "bad": "c"}] * 4)
    with pytest.raises(DataError, match=r"columns bad, good, query fit no known format"):
        load_preferences(tiny_cfg(dataset_name=str(tmp_path / "p"), test_split_size=0.5))


def test_a_dataset_that_is_not_there_is_one_clear_error(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # spares the retries
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot load dataset 'no/such-pairs'"):
        load_preferences(tiny_cfg(dataset_name="no/such-pairs"))


def test_missing_split_is_named(tiny_cfg):
    with pytest.raises(DataError, match="no split 'train_prefs', only train, test"):
        load_preferences(tiny_cfg(dataset_train_split="train_prefs"))


def test_lengths_count_the_template_and_the_end_of_turn(tiny_cfg, tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    pairs = load_preferences(tiny_cfg())["train"]
    lengths = token_lengths(pairs, tokenizer)
    first = pairs[0]["chosen"][0]["content"]
    assert lengths["chosen"][0] == len(first.encode()) + 1  # bytes, and the end of turn
    assert list(length_table(lengths).columns) == ["median", "p95", "max"]
    whole = tokenizer(templated(pairs[0], tokenizer)["prompt"], add_special_tokens=False)
    assert whole["input_ids"].count(BOT) == 1
    assert whole["input_ids"].count(EOT) == 1
    assert lengths["prompt"][0] == len(whole["input_ids"])


def answer(text: str, tokens: int, style: str = "plain", finished: bool = True) -> dict:
    return {"id": "x", "style": style, "text": text, "tokens": tokens, "finished": finished}


PROMPT = {"id": "x", "topic": "t", "prompt": "Capital of France?", "facts": [["Paris"], ["Seine"]]}


def test_rank_prefers_the_fullest_answer_within_the_limit():
    answers = [
        answer("Paris, on the Seine.", 8),
        answer("It is Paris, which lies on the Seine.", 14),
        answer("Paris is the capital of France, and it lies on the river Seine.", 81),
        answer("Paris on the Seine and on and on", 192, finished=False),
        answer("Paris is the capital of France.", 15),
        answer("Lyon.", 3),
    ]
    concise, content = rank(PROMPT, answers)
    assert (concise["kind"], content["kind"]) == ("concise", "content")
    assert concise["chosen"][0]["content"] == "It is Paris, which lies on the Seine."
    assert concise["rejected_tokens"] == 192
    assert content["rejected"][0]["content"] == "Paris is the capital of France."
    assert (content["chosen_recall"], content["rejected_recall"]) == (1.0, 0.5)


def test_rank_gives_nothing_when_no_answer_knows_or_finishes():
    assert rank(PROMPT, [answer("Lyon.", 3), answer("Berlin.", 3)]) == []
    assert rank(PROMPT, [answer("Paris on the Seine and", 192, finished=False)]) == []
    assert rank(PROMPT, [answer("Paris, on the Seine", 7)]) == []  # breaks off
    assert rank(PROMPT, [answer("Paris, on the Seine.", 81)]) == []  # too long to learn from
    loop = "Paris on the Seine " * 5 + "."
    assert rank(PROMPT, [answer(loop, 30)]) == []
