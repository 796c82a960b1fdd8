"""The judge of the default pairs: what it chooses, and what each rejected answer fails for."""

import json
from collections import Counter

import pytest

from scripts.base import ROOT
from scripts.pairs.build import read_prompts
from scripts.pairs.checker import Checker
from scripts.pairs.grounded import check
from scripts.pairs.passages import read_questions
from scripts.pairs.provenance import read_jsonl
from scripts.pairs.sampling import styled

PASSAGE = (
    "The Velno blender has a glass jug that holds 1.8 litres. A new blade costs 14 dollars and a "
    "new jug costs 22 dollars."
)
BLADE = {
    "id": "b", "passage": PASSAGE, "question": "How much does a new blade cost?",
    "answerable": True, "accept": ["14 dollars"], "wrong": ["22 dollars"],
}  # fmt: skip
COLOUR = BLADE | {
    "question": "What colour is it?", "answerable": False, "accept": [], "wrong": ["red"],
}  # fmt: skip


def answer(text: str, style: str = "text", finished: bool = True) -> dict:
    tokens = len(text.split())
    return {"text": text, "style": style, "finished": finished, "tokens": tokens}


GOOD = answer("A new blade costs 14 dollars.")
FAULTS = {
    "wrong": answer("A new blade costs 22 dollars."),
    "beside": answer("A new blade costs 14 dollars, and it was made in Toledo."),
    "rambling": answer("To find out what a new blade costs, " + "we look, " * 20, "plain", False),
    "declined": answer("The text does not say."),
}


def kinds(prompt: dict, *answers: dict) -> dict[str, str]:
    return {p.kind: p.rejected["text"] for p in Checker()(prompt, list(answers))}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_rejected_answer_fails_for_the_reason_that_its_kind_names(kind):
    assert kinds(BLADE, FAULTS[kind], GOOD) == {kind: FAULTS[kind]["text"]}


def test_every_fault_makes_a_pair_with_the_same_chosen_answer():
    pairs = Checker()(BLADE, [*FAULTS.values(), GOOD])
    assert {p.kind for p in pairs} == set(FAULTS)
    assert {p.chosen["text"] for p in pairs} == {GOOD["text"]}


@pytest.mark.parametrize(
    "off",
    [
        answer("A new blade costs 14 dollars.", finished=False),
        answer("A new blade costs 14 dollars. " * 2),
        answer("14 dollars " + "for the new blade " * 10),
        answer("A blade, mighty and bold and bright, costs 14 dollars."),
    ],
    ids=["not finished", "two sentences", "long", "words that the text lacks"],
)
def test_what_is_not_chosen_though_it_says_the_right_thing(off):
    assert kinds(BLADE, off, FAULTS["wrong"]) == {}


def test_of_right_answers_the_briefest_is_chosen():
    longer = answer("The new blade of the Velno blender costs 14 dollars.")
    (pair,) = Checker()(BLADE, [longer, GOOD, FAULTS["wrong"]])
    assert pair.chosen["text"] == GOOD["text"]


def test_length_does_not_explain_a_wrong_answer():
    far = answer("A new blade costs 22 dollars, as does a new jug of this very blender, it seems.")
    assert kinds(BLADE, far, GOOD) == {}


def test_where_the_text_does_not_tell_saying_so_is_chosen():
    made_up = answer("The blender is red.", "plain")
    declined = FAULTS["declined"]
    assert kinds(COLOUR, made_up, declined) == {"invented": made_up["text"]}
    assert kinds(COLOUR, made_up, answer("It is blue.")) == {}


def test_passages_are_prompts_question_by_question(tmp_path):
    path = ROOT / "data" / "passages.jsonl"
    prompts = read_prompts(path)
    assert len({p["id"] for p in prompts}) == len(prompts) > 1000
    by_id = {p["id"]: p for p in prompts}
    for row in read_questions(path, "test"):
        assert by_id[row["id"]]["messages"][0]["content"].endswith(f"\n\n{row['question']}")
    (tmp_path / "p.jsonl").write_text(json.dumps({"questions": [{}], "id": "a"}) + "\n")
    with pytest.raises(Exception, match="no passage with questions"):
        read_prompts(tmp_path / "p.jsonl")


def test_examples_stand_before_the_question_and_after_the_system_prompt():
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    shown = styled(talk, "shown")
    assert [m["role"] for m in shown] == ["system", *["user", "assistant"] * 4, "user"]
    assert (shown[0], shown[-1]) == (talk[0], talk[-1])


SHIPPED = {s: read_jsonl(ROOT / "data" / "grounded" / f"{s}.jsonl") for s in ("train", "test")}


@pytest.mark.parametrize("split", SHIPPED)
def test_shipped_pairs_are_what_the_judge_makes(split):
    """Every chosen answer is exact by today's checker, and every kind keeps its promise."""
    passages = {
        row["id"]: row["passage"]
        for row in read_questions(ROOT / "data" / "passages.jsonl", split, "plain")
    }
    plain = [
        [row[side] for side in ("prompt", "chosen", "rejected")]
        for row in read_jsonl(ROOT / "data" / "concise" / f"{split}.jsonl")
    ]
    found = Counter()
    for row in SHIPPED[split]:
        if row["kind"] == "no text":
            assert [row[side] for side in ("prompt", "chosen", "rejected")] in plain
            continue
        passage = passages[row["id"]]  # also: a pair stands in the split of its passage
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert row["prompt"][0]["content"] == f"{passage}\n\n{row['question']}"
        assert check(chosen, passage, row).exact, row
        verdict, kind = check(rejected, passage, row), row["kind"]
        found[kind] += 1
        if kind == "wrong":
            assert not verdict.right
            assert 0.5 <= row["rejected_tokens"] / row["chosen_tokens"] <= 2
        elif kind == "beside":
            assert verdict.mentioned and not verdict.exact
        elif kind == "rambling":
            assert row["rejected_tokens"] >= 1.5 * row["chosen_tokens"]
        elif kind == "declined":
            assert verdict.declined and row["answerable"]
        else:
            assert kind == "invented" and not row["answerable"] and not verdict.declined
    assert min(found[k] for k in ("wrong", "rambling", "invented")) >= 5, found


def test_no_shipped_pair_stands_twice():
    for rows in SHIPPED.values():
        pairs = [json.dumps([row["prompt"], row["chosen"], row["rejected"]]) for row in rows]
        assert len(set(pairs)) == len(pairs)


def test_no_passage_is_in_both_splits():
    train, test = ({row.get("passage_id") for row in SHIPPED[s]} - {None} for s in SHIPPED)
    assert train and test and not train & test
