"""The passages of data/passages.jsonl can be answered as they say, and not otherwise."""

import json
from collections import Counter

import pytest

from scripts.base import ROOT
from scripts.pairs.grounded import split_sentences
from scripts.pairs.text import mentions

ROWS = [json.loads(line) for line in (ROOT / "data" / "passages.jsonl").open(encoding="utf-8")]
QUESTIONS = [(row, question) for row in ROWS for question in row["questions"]]


def test_there_are_as_many_as_the_card_says():
    card = (ROOT / "data" / "README.md").read_text()
    splits = Counter(row["split"] for row in ROWS)
    unanswerable = sum(not question["answerable"] for _, question in QUESTIONS)
    numbers = (len(ROWS), len(QUESTIONS), unanswerable, splits["train"], splits["test"])
    text = " ".join(card.split())
    assert (
        "{:,} passages with {:,} questions, {:,} of which the passage does not answer; "
        "{:,} passages for training, {:,} held out".format(*numbers)
        in text
    )


@pytest.mark.parametrize("key", ["id", "passage"])
def test_no_passage_stands_twice(key):
    assert Counter(row[key] for row in ROWS).most_common(1)[0][1] == 1


def test_no_sentence_is_shared_by_training_and_held_out_passages():
    sentences = {
        split: {
            sentence
            for row in ROWS
            if row["split"] == split
            for sentence in split_sentences(row["passage"])
        }
        for split in ("train", "test")
    }
    assert not sentences["train"] & sentences["test"]


def test_an_accepted_answer_stands_in_its_passage_and_not_in_its_question():
    for row, question in QUESTIONS:
        accepted = question["accept"]
        assert bool(accepted) == question["answerable"], question
        if accepted:
            assert any(mentions(row["passage"], answer) for answer in accepted), question
            assert not any(mentions(question["question"], answer) for answer in accepted), question


def test_a_wrong_answer_is_never_part_of_an_accepted_one():
    for _, question in QUESTIONS:
        assert question["wrong"], question
        for wrong in question["wrong"]:
            for answer in question["accept"]:
                assert not mentions(answer, wrong) and not mentions(wrong, answer), question
