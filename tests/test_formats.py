"""Every format gives the same tokens as its twin in TRL's explicit form."""

import csv
import json

import pytest
from conftest import BOT, EOT, pairs_of, write_jsonl

from scripts.data import check_preferences
from scripts.model import load_tokenizer
from scripts.pairs.formats import detect, further_columns, to_pair
from scripts.pairs.messages import BadRow
from scripts.pairs.sources import DataError
from scripts.pairs.tokens import IDS, SIDES


def turns(*texts: str, system: str = "") -> list[dict]:
    roles = ["user", "assistant"] * len(texts)
    talk = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *talk] if system else talk


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def human(*texts: str) -> str:
    return "".join(
        f"\n\n{who}: {t}" for who, t in zip(["Human", "Assistant"] * 9, texts, strict=False)
    )


def sharegpt(talk: list[dict]) -> list[dict]:
    speakers = {"user": "human", "assistant": "gpt"}
    return [{"from": speakers[m["role"]], "value": m["content"]} for m in talk]


YES, NO = "Yes, water is wet.", "That is a matter of debate."
Q = "Is water wet?"
ANSWERS = {"chosen": YES, "rejected": NO}
BRIEF = {"system": "Be brief."}
EARLIER = ("Hello.", "Hello! What is it?")
PLAIN = {"prompt": turns(Q), "chosen": answer(YES), "rejected": answer(NO)}
WITH_SYSTEM = PLAIN | {"prompt": turns(Q, **BRIEF)}
TALK = PLAIN | {"prompt": turns(*EARLIER, Q)}
TALK_WITH_SYSTEM = PLAIN | {"prompt": turns(*EARLIER, Q, **BRIEF)}
WHOLE = {side: TALK["prompt"] + answer(text) for side, text in ANSWERS.items()}
TWO_SCORED = [{"text": NO, "score": "1.5"}, {"text": YES, "score": 9}]

# A name, a row in that format, and its twin in TRL's explicit conversational form.
TWINS = {
    "explicit, text": ({"prompt": Q} | ANSWERS, PLAIN),
    "explicit, conversational": (TALK_WITH_SYSTEM, TALK_WITH_SYSTEM),
    "implicit, text": ({"chosen": f"{Q} {YES}", "rejected": f"{Q} {NO}"}, PLAIN),
    "implicit, answers that begin alike": (
        {"chosen": f"{Q} That is so.", "rejected": f"{Q} That is not so."},
        PLAIN | {"chosen": answer("That is so."), "rejected": answer("That is not so.")},
    ),
    "implicit, conversational": (WHOLE, TALK),
    "orca": ({"question": Q} | BRIEF | ANSWERS, WITH_SYSTEM),
    "orca, empty system": ({"system": "", "question": Q} | ANSWERS, PLAIN),
    "orca, null system": ({"system": None, "question": Q} | ANSWERS, PLAIN),
    "orca, whole conversations": ({"question": Q} | WHOLE, TALK),
    "ultrafeedback": ({"prompt": "Hello.", "prompt_id": "x", "score_chosen": 9.0} | WHOLE, TALK),
    "hh": (
        {side: human(*EARLIER, Q, text) for side, text in ANSWERS.items()},
        TALK,
    ),
    "alpaca": ({"instruction": Q, "input": "", "output": YES, "rejected": NO}, PLAIN),
    "alpaca, input": (
        {"instruction": "Answer.", "input": Q} | ANSWERS,
        PLAIN | {"prompt": turns(f"Answer.\n\n{Q}")},
    ),
    "alpaca, history and system": (
        {"instruction": Q, "history": [EARLIER]} | BRIEF | ANSWERS,
        TALK_WITH_SYSTEM,
    ),
    "alpaca, history of messages and two outputs": (
        {"instruction": Q, "history": turns(*EARLIER), "output": [YES, NO]},
        TALK,
    ),
    "sharegpt": (
        {
            "conversations": sharegpt(TALK["prompt"]),
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        },
        TALK,
    ),
    "messages, with the chosen answer at their end": (
        {
            "messages": TALK_WITH_SYSTEM["prompt"] + answer(YES),
            "chosen": answer(YES)[0],
            "rejected": answer(NO)[0],
        },
        TALK_WITH_SYSTEM,
    ),
    "messages, answers as whole conversations": ({"messages": TALK["prompt"]} | WHOLE, TALK),
    "responses": (
        {"instruction": Q, "chosen_response": YES, "rejected_response": NO} | BRIEF,
        WITH_SYSTEM,
    ),
    "responses, history": (
        {"question": Q, "history": [EARLIER], "response_chosen": YES, "response_rejected": NO},
        TALK,
    ),
    "llamafactory v1": (
        {
            f"{side}_messages": [
                {"role": m["role"], "content": [{"type": "text", "value": m["content"]}]}
                for m in WHOLE[side]
            ]
            for side in ANSWERS
        },
        TALK,
    ),
    "swift": (
        {"messages": TALK_WITH_SYSTEM["prompt"] + answer(YES), "rejected_response": NO},
        TALK_WITH_SYSTEM,
    ),
    "swift, rejected messages": (
        {"messages": WHOLE["chosen"], "rejected_messages": WHOLE["rejected"]},
        TALK,
    ),
    "swift, query": (
        {"query": Q, "response": YES, "rejected_response": NO, "history": [EARLIER]} | BRIEF,
        TALK_WITH_SYSTEM,
    ),
    "openai": (
        {
            "input": {"messages": TALK["prompt"], "tools": [], "parallel_tool_calls": True},
            "preferred_output": answer(YES),
            "non_preferred_output": answer(NO),
        },
        TALK,
    ),
    "stackexchange": ({"qid": 7, "question": Q, "response_j": YES, "response_k": NO}, PLAIN),
    "compared, HelpSteer2": (
        {"prompt": Q, "response_1": NO, "response_2": YES, "preference_strength": 2},
        PLAIN,
    ),
    "compared, HelpSteer2, several turns": (
        {
            "prompt": f"Hello.\n<extra_id_1>Assistant\nHello! What is it?\n<extra_id_1>User\n{Q}",
            "response_1": YES,
            "response_2": NO,
            "preference_strength": -3,
        },
        TALK,
    ),
    "compared, earlier turns": (
        {"prompt": Q, "history": [EARLIER], "response_a": NO, "response_b": YES, "winner": "B"}
        | BRIEF,
        TALK_WITH_SYSTEM,
    ),
    "compared, HelpSteer3": (
        {"context": TALK["prompt"], "response1": YES, "response2": NO, "overall_preference": -3},
        TALK,
    ),
    "compared, PKU-SafeRLHF": (
        {
            "prompt": Q,
            "response_0": NO,
            "response_1": YES,
            "response_2": None,
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        PLAIN,
    ),
    "compared, arena conversations": (
        {
            "conversation_a": WHOLE["rejected"],
            "conversation_b": WHOLE["chosen"],
            "winner": "model_b",
            "language": "English",
        },
        TALK,
    ),
    "compared, arena lists": (
        {
            "prompt": json.dumps([Q]),
            "response_a": json.dumps([YES]),
            "response_b": json.dumps([NO]),
            "winner_model_a": 1,
            "winner_model_b": 0,
            "winner_tie": 0,
        },
        PLAIN,
    ),
    "compared, SHP": (
        {"history": Q, "human_ref_A": NO, "human_ref_B": YES, "labels": 0, "score_ratio": 2.0},
        PLAIN,
    ),
    "compared, WebGPT": (
        {
            "question": {"full_text": Q, "dataset": "made up"},
            "answer_0": YES,
            "answer_1": NO,
            "score_0": 0.5,
            "score_1": -0.5,
        },
        PLAIN,
    ),
    "scored, the first best and the first worst": (
        {
            "instruction": Q,
            "completions": [
                {"response": "Perhaps.", "overall_score": 5},
                {"response": NO, "overall_score": "1.5"},
                {"response": YES, "overall_score": 9},
                {"response": "Yes!", "overall_score": 9},
                {"response": "No.", "overall_score": 1.5},
            ],
        },
        PLAIN,
    ),
    "scored, by rank": (
        {"prompt": turns(Q), "answers": [{"answer": NO, "rank": 3}, {"answer": YES, "rank": 1}]},
        PLAIN,
    ),
    "scored, scores apart": (
        {"question": Q, "responses": [NO, YES], "scores": [-1, 0.5]} | BRIEF,
        WITH_SYSTEM,
    ),
    "content in parts": (
        PLAIN | {"prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}]},
        PLAIN,
    ),
}


@pytest.fixture
def read(tiny_cfg, tiny_llama3):
    """All pairs of a file as token ids, by way of everything that loading does."""
    tokenizer = load_tokenizer(str(tiny_llama3))

    def ids(path, **overrides):
        cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, max_length=4096, **overrides)
        pairs, report = check_preferences(cfg, tokenizer)
        assert report.bad() == []
        return [{name: pair[name] for name in IDS} for split in pairs.values() for pair in split]

    return ids


def other(row):
    """`row` with another question, so that one can be trained on and one held out."""
    return json.loads(json.dumps(row).replace(Q, "Is fire hot?"))


@pytest.mark.parametrize("name", TWINS)
def test_every_format_gives_the_tokens_of_its_explicit_twin(name, read, tmp_path):
    row, twin = TWINS[name]
    got = read(write_jsonl(tmp_path / "row.jsonl", [row, other(row)]))
    assert got == read(write_jsonl(tmp_path / "twin.jsonl", [twin, other(twin)]))
    assert got[0]["prompt_ids"].count(BOT) == 1
    assert got[0]["chosen_ids"][-1] == EOT


def test_messages_survive_in_a_csv_and_words_like_none_stay_words(read, tmp_path):
    rows = [TALK_WITH_SYSTEM, other(TALK_WITH_SYSTEM)]
    want = read(write_jsonl(tmp_path / "a.jsonl", rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) for k, v in row.items()} for row in rows)
    assert read(tmp_path / "a.csv") == want
    (tmp_path / "b.csv").write_text(
        'prompt,chosen,rejected\nHow many?,None,4\nWhich?,NA,"{""a"": 1}"\n'
    )
    plain = [
        {"prompt": "How many?", "chosen": "None", "rejected": "4"},
        {"prompt": "Which?", "chosen": "NA", "rejected": '{"a": 1}'},
    ]
    assert read(tmp_path / "b.csv") == read(write_jsonl(tmp_path / "b.jsonl", plain))


def test_columns_are_renamed_by_the_config(read, tmp_path, tiny_cfg):
    row = {"query": Q, "good": YES, "bad": NO}
    path = write_jsonl(tmp_path / "a.jsonl", [row, other(row)])
    names = {"query": "prompt", "good": "chosen", "bad": "rejected"}
    want = read(write_jsonl(tmp_path / "b.jsonl", [PLAIN, other(PLAIN)]))
    assert read(path, dataset_columns=names) == want
    with pytest.raises(DataError, match=r"renames 'goood'.*did you mean 'good'"):
        check_preferences(
            tiny_cfg(dataset_name=str(path), dataset_columns=names | {"goood": "chosen"})
        )


def test_a_named_format_wins_over_the_columns(read, tmp_path):
    row = {"prompt": "No part of it.", "question": Q} | ANSWERS
    path = write_jsonl(tmp_path / "a.jsonl", [row, other(row)])
    want = read(write_jsonl(tmp_path / "b.jsonl", [PLAIN, other(PLAIN)]))
    assert read(path, dataset_format="orca") == want


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Is water wet?", " Surely not.", " Sure."),
        ("is water wet", " Surely not.", " Sure."),  # no end of a sentence, but one of a word
        ("Surely", " not.", " so."),
        ("pi begins with", " 3.14", " 3.15"),
        ("水是湿的吗？", "是的。", "是不是呢。"),
        ("The list:\n", "- one", "- other"),
    ],
)
def test_a_shared_beginning_is_split_between_sentences_or_at_least_words(prompt, chosen, rejected):
    pair = to_pair({"chosen": prompt + chosen, "rejected": prompt + rejected}, "implicit")
    assert pair["prompt"] == turns(prompt.strip())
    assert pair["chosen"] == answer(chosen.strip())
    assert pair["rejected"] == answer(rejected.strip())
    with pytest.raises(BadRow, match="no common prompt of whole words"):
        to_pair({"chosen": "Surely not.", "rejected": "Sure."}, "implicit")


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_is_the_system_message_by_either_name(name):
    row = {"prompt": Q, name: "Be brief."} | ANSWERS
    assert further_columns(row, "explicit") | to_pair(row, "explicit") == WITH_SYSTEM


def test_roles_are_read_in_any_case_and_a_single_function_call_is_a_tool_call():
    row = {
        "prompt": [{"role": "User", "content": Q}],
        "chosen": [{"role": "AI", "content": None, "function_call": {"name": "add"}}],
        "rejected": [{"role": "ASSISTANT", "content": NO}],
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert to_pair(row, "explicit") == PLAIN | {"chosen": chosen}


def test_sharegpt_function_calls_are_tool_calls():
    called = '{"name": "add", "arguments": {"a": 1}}'
    talk = [*sharegpt(turns(Q)), {"from": "function_call", "value": called},
            {"from": "observation", "value": "2"}]  # fmt: skip
    call, reply = to_pair({"conversations": talk} | ANSWERS, "sharegpt")["prompt"][1:]
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert reply == {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("name", "row", "kept"),
    [
        ("explicit", {"prompt": Q, "input": "raw", "history": ["h"], "question": "q"} | BRIEF,
         {"input", "history", "question"}),
        ("alpaca", {"instruction": Q, "input": "in", "question": "q", "topic": "t"},
         {"question", "topic"}),
        ("orca", {"question": Q, "input": "raw"}, {"input"}),
    ],
)  # fmt: skip
def test_only_the_columns_that_the_format_reads_are_used_up(name, row, kept, tiny_cfg, tmp_path):
    row = row | ANSWERS
    path = write_jsonl(tmp_path / "a.jsonl", [row, other(row)])
    cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, dataset_format=name)
    pairs = pairs_of(cfg)["train"]
    assert set(pairs.column_names) == {*SIDES, *IDS} | kept
    assert all(pairs[0][column] == row[column] for column in kept)


def test_further_columns_are_kept_where_they_have_one_type(tiny_cfg, tmp_path, capsys):
    rows = [
        {"prompt": f"Q{i}?", "facts": [[str(i)]], "mixed": mixed} | ANSWERS
        for i, mixed in enumerate([1, "two", 3, "four", 5, "six"])
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.3))
    for split in pairs.values():
        for row in split:
            assert row["prompt"][0]["content"] == f"Q{row['facts'][0][0]}?"
    assert "mixed" not in pairs["train"].column_names
    assert "Column 'mixed' holds values of several types" in capsys.readouterr().out


def test_one_answer_a_row_with_a_label_is_told_as_kto(tiny_cfg, tmp_path):
    rows = [{"prompt": Q, "completion": text, "label": text == YES} for text in (YES, NO)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"completion, label, prompt: .*TRL's KTOTrainer"):
        check_preferences(tiny_cfg(dataset_name=str(path)))


def test_a_named_format_that_the_columns_do_not_fit_is_refused(tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": Q} | ANSWERS])
    with pytest.raises(DataError, match="dataset_format orca needs columns question, chosen"):
        check_preferences(tiny_cfg(dataset_name=str(path), dataset_format="orca"))


def test_a_prompt_in_a_column_of_no_known_name_is_asked_for_and_not_made_up(tiny_cfg, tmp_path):
    answers = [("So it is.", "That may be."), ("So it is, yes.", "So it is not, no.")] * 5
    rows = [{"input": f"Q{i}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"columns chosen, input, rejected: .*{its_name: prompt}"):
        check_preferences(tiny_cfg(dataset_name=str(path)))
    cfg = tiny_cfg(dataset_name=str(path), dataset_columns={"input": "prompt"})
    assert check_preferences(cfg)[1].bad() == []


def test_the_margin_of_scores_is_an_option(tiny_cfg, tmp_path):
    rows = [
        {"prompt": f"{i}?", "responses": ["So.", "No."], "scores": [float(i), 0.0]}
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for margin, left in ((0.0, 5), (3.5, 2)):
        cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, score_margin=margin)
        pairs, report = check_preferences(cfg)
        assert sum(map(len, pairs.values())) == left
        assert {f.kind for f in report.bad()} == {"equal"}
    assert f"not more than {margin:g} (score_margin) apart" in report.bad()[0].detail


BOTH = {"prompt": Q, "response_a": YES, "response_b": NO}
ONE_TWO = {"prompt": Q, "response_1": YES, "response_2": NO}
ZERO_ONE = {"prompt": Q, "response_0": YES, "response_1": NO}


# A verdict on other answers than its own, which may count otherwise; and a `rejected` of no format.
@pytest.mark.parametrize(
    "row",
    [
        ZERO_ONE | {"response_2": "Perhaps.", "score_0": 9, "score_1": 1, "score_2": 5},
        ZERO_ONE | {"labels": 1},
        ONE_TWO | {"better_response_id": 1},
        BOTH | {"preference_strength": 2, "preferred": "A"},
        {"query": Q, "chosen": YES, "rejected": NO},
    ],
)
def test_what_is_not_told_for_certain_is_no_format(row):
    assert detect(set(row), [row] * 3) is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"query": Q, "chosen": turns(Q, YES), "rejected": turns(Q, NO)}, "implicit"),
        ({"query": Q, "chosen": human(Q, YES), "rejected": human(Q, NO)}, "hh"),
        ({"instruction": Q, "query": Q, "label": True, "answers": ["x"]} | ANSWERS, "alpaca"),
        ({"instruction": Q, "output": YES, "rejected": NO, "messages": turns(Q)}, "alpaca"),
        ({"query": Q, "response": YES, "rejected": NO}, "swift"),
        ({"messages": turns(Q, YES), "rejected": NO}, "swift"),
        (ZERO_ONE | {"response_2": "Perhaps.", "better_response_id": 0}, "compared"),
        ({"prompt": Q, "completions": TWO_SCORED}, "scored"),
    ],
)
def test_the_format_is_the_one_that_has_the_answers(row, name):
    assert detect(set(row), [row] * 3) == name
    assert to_pair(row, name) == PLAIN


@pytest.mark.parametrize(
    ("row", "name", "told"),
    [
        ({"prompt": Q, "responses": [YES], "scores": [1]}, "scored", "not two answers to choose"),
        ({"prompt": Q, "responses": [YES, NO], "scores": [1]}, "scored", "one number for each"),
        ({"prompt": Q, "responses": [YES, NO], "scores": [1, None]}, "scored", "is not a number"),
        ({"prompt": Q, "answers": [{"text": YES}] * 2}, "scored", "rating is missing or null"),
        ({"messages": turns(Q), "rejected_response": NO}, "swift", "not end with the assistant"),
        (
            {"input": Q, "preferred_output": [], "non_preferred_output": []},
            "openai",
            "not an object",
        ),
        (
            {"chosen_response": YES, "rejected_response": NO},
            "responses",
            "conversations is missing",
        ),
        (PLAIN | {"prompt": [*turns(Q), None]}, "explicit", "prompt has None among its messages"),
        (
            {"chosen": turns("A?", "Yes."), "rejected": turns("B?", "No.")},
            "implicit",
            "conversations that begin differently",
        ),
        ({"instruction": Q, "history": "Hello."} | ANSWERS, "alpaca", "history is not a list"),
        (BOTH | {"winner": "maybe"}, "compared", "winner is 'maybe': not model_a"),
        (BOTH | {"winner": "tie"}, "compared", "equally good"),
        (BOTH | {"response_a": None, "winner": "a"}, "compared", "are not two answers"),
        (BOTH | {"winner": "a", "context": "It rains."}, "compared", "context beside the prompt"),
    ],
)
def test_a_row_that_lacks_something_says_what(row, name, told):
    with pytest.raises(BadRow, match=told):
        to_pair(row, name)


def test_the_tools_of_an_openai_file_are_kept(tiny_cfg, tmp_path):
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    row, _ = TWINS["openai"]
    rows = [row | {"input": row["input"] | {"tools": [tool]}}, other(row)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.5))
    kept = [pair.get("tools") for split in pairs.values() for pair in split]
    assert [json.loads(tools) for tools in kept if tools] == [[tool]]
