"""The checker of replies to questions on a given text, against readers' verdicts."""

import json

import pytest

from scripts.base import ROOT, RecipeError
from scripts.pairs.grounded import check, is_supported, split_sentences
from scripts.pairs.passages import ask, read_questions

PASSAGE = (
    "Mr. Abel sells two bags in Port Lund. The red bag costs 9 dollars and holds 20 litres. "
    "The blue bag costs seven dollars. Repairs take three weeks, at the harbour, not in the shop."
)
BLUE = {
    "question": "How much does the blue bag cost?", "answerable": True,
    "accept": ["seven dollars", "$7"], "wrong": ["9 dollars", "20"],
}  # fmt: skip
MAKER = {
    "question": "Who sews the bags?", "answerable": False,
    "accept": [], "wrong": ["Abel", "a tailor"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("The blue bag costs seven dollars.", "exact"),
        ("It costs 7 dollars.", "exact"),
        ("Seven Dollars", "exact"),
        ("Sure! The blue bag costs $7.", "exact later"),
        ("The blue bag costs seven dollars. Mr. Abel sells it in Port Lund.", "exact"),
        ("The blue bag costs seven dollars and the red one 9 dollars.", "wrong"),
        ("The blue bag costs 17 dollars.", "wrong"),
        ("It costs 70 dollars.", "wrong"),
        ("The blue bag costs 9 dollars.", "wrong"),
        ("The text does not say.", "declined"),
        ("The text does not give a discount, so it is seven dollars.", "exact"),
        ("The blue bag costs seven dollars. It was sewn in 1987.", "made up"),
        ("The blue bag costs seven dollars. Anna Berg designed it.", "made up"),
        ("It costs seven dollars. Customers love shopping for luggage nowadays.", "made up"),
        ("", "wrong"),
    ],
)  # fmt: skip
def test_a_reply_to_a_question_that_the_text_answers(reply, verdict):
    found = check(reply, PASSAGE, BLUE)
    assert found.exact == verdict.startswith("exact")
    assert found.right == (found.exact or verdict == "made up")
    assert found.declined == (verdict == "declined")
    assert found.first == (found.mentioned and verdict != "exact later")
    assert (found.unsupported > 0) == (verdict == "made up" or "70" in reply or "17" in reply)


@pytest.mark.parametrize(
    "reply",
    [
        "The text does not say.", "The text doesn't mention who sews the bags.",
        "That is not stated in the passage.", "There is no information about that.",
        "It is unclear.", "The passage does not actually say who sews them.",
        "I cannot determine that from the text.", "I don't know.",
    ],
)  # fmt: skip
def test_saying_that_the_text_does_not_tell_is_right_where_it_does_not(reply):
    assert check(reply, PASSAGE, MAKER).exact
    assert check(reply, PASSAGE, BLUE).declined and not check(reply, PASSAGE, BLUE).right


@pytest.mark.parametrize("reply", ["Mr. Abel sews the bags.", "A tailor does.", "At the harbour."])
def test_an_answer_that_the_text_does_not_hold_is_wrong(reply):
    assert not check(reply, PASSAGE, MAKER).right


def test_what_the_question_says_itself_is_no_wrong_answer():
    asked = BLUE | {"question": "Does the blue bag cost 9 dollars or seven?"}
    assert check("Not 9 dollars but seven dollars.", PASSAGE, asked).right


def test_sentences_end_where_readers_see_it():
    text = "Mr. Abel left at 8.30. He came back!\n- Bags\n2. Shoes at $3.95 a pair\nWhy? No. 7 is."
    assert split_sentences(text) == [
        "Mr. Abel left at 8.30.", "He came back!", "Bags", "Shoes at $3.95 a pair", "Why?",
        "No. 7 is.",
    ]  # fmt: skip


def test_a_sentence_out_of_the_texts_own_words_is_supported():
    assert is_supported("The bags are sold by Mr. Abel in Port Lund.", PASSAGE)
    assert is_supported("Repairing takes 3 weeks.", PASSAGE)
    assert not is_supported("Repairs take four weeks.", PASSAGE)
    assert not is_supported("The bags are sold in Tarsh.", PASSAGE)


def test_written_answers_pass_and_wrong_ones_fail():
    """Over every question of the project's own passages, by what each lists itself."""
    for split in ("train", "test"):
        for row in read_questions(ROOT / "data" / "passages.jsonl", split):
            for answer in row["accept"]:
                assert check(f"It is {answer}.", row["passage"], row).right, row
            for wrong in row["wrong"]:
                assert not check(f"It is {wrong}.", row["passage"], row).right, row


def test_a_question_is_put_below_its_text():
    (row, *_) = read_questions(ROOT / "data" / "passages.jsonl", "test", "plain")
    (message,) = ask(row)
    assert message["content"] == f"{row['passage']}\n\n{row['question']}"


def test_a_file_that_holds_no_questions_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(RecipeError, match="cannot be read"):
        read_questions(path, "test")
    path.write_text(json.dumps({"split": "test", "id": "a", "passage": "x"}) + "\n")
    with pytest.raises(RecipeError, match=r"q.jsonl:1 is no.*\(KeyError: 'questions'\)"):
        read_questions(path, "test")
    path.write_text(json.dumps({"split": "train"}) + "\n")
    with pytest.raises(RecipeError, match="no passages of the split `test`"):
        read_questions(path, "test")
