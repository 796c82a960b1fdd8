"""Pairs are read right, and the default ones are what their card says."""

import re

import pytest
from conftest import BOT, EOT, explicit, pairs_in, pairs_of, write_jsonl

from scripts.base import ROOT, InputError
from scripts.config import ConfigError
from scripts.data import check_preferences, length_table, token_lengths
from scripts.model import load_tokenizer
from scripts.pairs.provenance import read_jsonl
from scripts.pairs.sources import DataError
from scripts.pairs.tokens import templated

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
    return {
        split: read_jsonl(ROOT / "data" / "concise" / f"{split}.jsonl")
        for split in ("train", "test")
    }


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


def test_the_shipped_pairs_load(tiny_cfg, shipped):
    pairs = pairs_of(tiny_cfg(dataset_name="data/concise"))
    assert {k: len(v) for k, v in pairs.items()} == {k: len(v) for k, v in shipped.items()}
    assert pairs["test"][0]["prompt"] == shipped["test"][0]["prompt"]
    assert pairs["test"][0]["facts"] == shipped["test"][0]["facts"]


def test_limits_draw_the_same_rows_again(tiny_cfg):
    cfg = tiny_cfg(train_samples=2, eval_samples=1)
    first, second = pairs_of(cfg), pairs_of(cfg)
    assert (len(first["train"]), len(first["test"])) == (2, 1)
    assert first["train"]["prompt"][:] == second["train"]["prompt"][:]


def test_bad_rows_can_be_an_error(tiny_cfg, tmp_path):
    folder = pairs_in(tmp_path, [explicit("A?", "Same.", "Same.")], [explicit("C?", "Yes.", "No.")])
    with pytest.raises(DataError, match=r"1 bad row.*train.jsonl:1, the two answers are the same"):
        pairs_of(tiny_cfg(dataset_name=folder, on_bad_rows="error"))
    with pytest.raises(DataError, match="none of the 1 rows of train is a usable pair"):
        pairs_of(tiny_cfg(dataset_name=folder))
    with pytest.raises(ConfigError, match="on_bad_rows"):
        tiny_cfg(on_bad_rows="skip")


def test_pairs_of_one_prompt_are_held_out_together(tiny_cfg, tmp_path):
    rows = [explicit(f"Q{i // 3}?", f"Yes {i}.", "No.") for i in range(30)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.3)
    pairs = pairs_of(cfg)
    prompts = {k: {r["prompt"][0]["content"] for r in v} for k, v in pairs.items()}
    assert (len(pairs["train"]), len(pairs["test"])) == (21, 9)
    assert not prompts["train"] & prompts["test"]


def test_unknown_columns_are_named(tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"query": "A?", "good": "b", "bad": "c"}] * 4)
    with pytest.raises(DataError, match=r"columns bad, good, query fit no known format"):
        pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.5))


def test_a_dataset_that_is_not_there_is_one_clear_error(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # spares the retries
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot load dataset 'no/such-pairs'"):
        pairs_of(tiny_cfg(dataset_name="no/such-pairs"))


def test_missing_split_is_named(tiny_cfg):
    with pytest.raises(InputError, match="no split 'train_prefs', only train, test"):
        pairs_of(tiny_cfg(dataset_train_split="train_prefs"))


def test_lengths_count_the_template_and_the_end_of_turn(tiny_cfg, tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    pairs = pairs_of(tiny_cfg())["train"]
    lengths = token_lengths(pairs)
    first = pairs[0]["chosen"][0]["content"]
    assert lengths["chosen"][0] == len(first.encode()) + 1  # bytes, and the end of turn
    assert list(length_table(lengths).columns) == ["median", "p95", "max"]
    whole = tokenizer(templated(pairs[0], tokenizer)["prompt"], add_special_tokens=False)
    assert whole["input_ids"].count(BOT) == 1
    assert whole["input_ids"].count(EOT) == 1
    assert lengths["prompt"][0] == len(whole["input_ids"])


def test_a_rename_onto_a_column_that_is_there_is_refused(tiny_cfg, tmp_path):
    row = {"question": "Why?", "prompt": "template-7", "chosen": "So.", "rejected": "No."}
    path = write_jsonl(tmp_path / "two.jsonl", [row])
    names = {"dataset_name": str(path), "dataset_columns": {"question": "prompt"}}
    with pytest.raises(DataError, match="'prompt', and there is one of that name"):
        check_preferences(tiny_cfg(**names))
    names["dataset_columns"] = {"question": "prompt", "prompt": "template"}
    assert check_preferences(tiny_cfg(**names))[1].rows["test"] == 1
