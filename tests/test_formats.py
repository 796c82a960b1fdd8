"""Every format gives the same tokens as its twin in TRL's explicit form, from every file type."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from conftest import BOT, EOT, pairs_of, write_jsonl

from scripts.config import parse_overrides
from scripts.data import check_preferences
from scripts.model import load_tokenizer
from scripts.pairs.files import read_file
from scripts.pairs.formats import detect, further_columns, to_pair
from scripts.pairs.messages import BadRow
from scripts.pairs.sources import DataError
from scripts.pairs.tokens import IDS, SIDES, templated


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


YES, NO = "Yes, water is wet.", "That is a matter of debate."
Q = "Is water wet?"
PLAIN = {"prompt": turns(Q), "chosen": answer(YES), "rejected": answer(NO)}
WITH_SYSTEM = PLAIN | {"prompt": turns(Q, system="Be brief.")}
TALK = PLAIN | {"prompt": turns("Hello.", "Hello! What is it?", Q)}
TALK_WITH_SYSTEM = PLAIN | {"prompt": turns("Hello.", "Hello! What is it?", Q, system="Be brief.")}

# A name, a row in that format, and its twin in TRL's explicit conversational form.
TWINS = {
    "explicit, standard": ({"prompt": Q, "chosen": YES, "rejected": NO}, PLAIN),
    "explicit, standard, with a system column": (
        {"system": "Be brief.", "prompt": Q, "chosen": YES, "rejected": NO},
        WITH_SYSTEM,
    ),
    "explicit, conversational": (TALK_WITH_SYSTEM, TALK_WITH_SYSTEM),
    "implicit, standard": ({"chosen": f"{Q} {YES}", "rejected": f"{Q} {NO}"}, PLAIN),
    "implicit, answers that begin alike": (
        {"chosen": f"{Q} That is so.", "rejected": f"{Q} That is not so."},
        PLAIN | {"chosen": answer("That is so."), "rejected": answer("That is not so.")},
    ),
    "implicit, conversational": (
        {
            "chosen": TALK_WITH_SYSTEM["prompt"] + answer(YES),
            "rejected": TALK_WITH_SYSTEM["prompt"] + answer(NO),
        },
        TALK_WITH_SYSTEM,
    ),
    "orca": ({"system": "Be brief.", "question": Q, "chosen": YES, "rejected": NO}, WITH_SYSTEM),
    "orca, empty system": ({"system": "", "question": Q, "chosen": YES, "rejected": NO}, PLAIN),
    "orca, null system": ({"system": None, "question": Q, "chosen": YES, "rejected": NO}, PLAIN),
    "ultrafeedback": (
        {
            "prompt": "Hello.",
            "prompt_id": "x",
            "chosen": TALK["prompt"] + answer(YES),
            "rejected": TALK["prompt"] + answer(NO),
            "score_chosen": 9.0,
        },
        TALK,
    ),
    "hh": ({"chosen": human(Q, YES), "rejected": human(Q, NO)}, PLAIN),
    "hh, several turns": (
        {
            "chosen": human("Hello.", "Hello! What is it?", Q, YES),
            "rejected": human("Hello.", "Hello! What is it?", Q, NO),
        },
        TALK,
    ),
    "alpaca": ({"instruction": Q, "input": "", "output": YES, "rejected": NO}, PLAIN),
    "alpaca, chosen": ({"instruction": Q, "chosen": YES, "rejected": NO}, PLAIN),
    "alpaca, input": (
        {"instruction": "Answer.", "input": Q, "output": YES, "rejected": NO},
        PLAIN | {"prompt": turns(f"Answer.\n\n{Q}")},
    ),
    "alpaca, two outputs": ({"instruction": Q, "output": [YES, NO]}, PLAIN),
    "alpaca, history and system": (
        {
            "instruction": Q,
            "history": [["Hello.", "Hello! What is it?"]],
            "system": "Be brief.",
            "chosen": YES,
            "rejected": NO,
        },
        TALK_WITH_SYSTEM,
    ),
    "alpaca, history of messages": (
        {
            "instruction": Q,
            "history": turns("Hello.", "Hello! What is it?"),
            "output": [YES, NO],
        },
        TALK,
    ),
    "orca, whole conversations": (
        {"question": Q, "chosen": turns(Q, YES), "rejected": turns(Q, NO)},
        PLAIN,
    ),
    "sharegpt, with the chosen answer at the end": (
        {
            "conversations": [
                {"from": "human", "value": Q},
                {"from": "gpt", "value": YES},
            ],
            "chosen": {"from": "gpt", "value": YES},
            "rejected": {"from": "gpt", "value": NO},
        },
        PLAIN,
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "Hello."},
                {"from": "gpt", "value": "Hello! What is it?"},
                {"from": "human", "value": Q},
            ],
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
    "messages, answers as whole conversations": (
        {
            "messages": TALK["prompt"],
            "chosen": TALK["prompt"] + answer(YES),
            "rejected": TALK["prompt"] + answer(NO),
        },
        TALK,
    ),
    "responses": (
        {"system": "Be brief.", "instruction": Q, "chosen_response": YES, "rejected_response": NO},
        WITH_SYSTEM,
    ),
    "responses, to messages": (
        {"messages": TALK["prompt"], "chosen_response": YES, "rejected_response": NO},
        TALK,
    ),
    "responses, history and system": (
        {
            "question": Q,
            "history": [["Hello.", "Hello! What is it?"]],
            "system": "Be brief.",
            "response_chosen": YES,
            "response_rejected": NO,
        },
        TALK_WITH_SYSTEM,
    ),
    "llamafactory v1": (
        {
            f"{side}_messages": [
                {"role": m["role"], "content": [{"type": "text", "value": m["content"]}]}
                for m in [*TALK_WITH_SYSTEM["prompt"], *answer(text)]
            ]
            for side, text in (("chosen", YES), ("rejected", NO))
        },
        TALK_WITH_SYSTEM,
    ),
    "swift": (
        {"messages": TALK_WITH_SYSTEM["prompt"] + answer(YES), "rejected_response": NO},
        TALK_WITH_SYSTEM,
    ),
    "swift, rejected messages": (
        {
            "messages": TALK["prompt"] + answer(YES),
            "rejected_messages": TALK["prompt"] + answer(NO),
        },
        TALK,
    ),
    "swift, query": (
        {
            "system": "Be brief.",
            "query": Q,
            "response": YES,
            "rejected_response": NO,
            "history": [["Hello.", "Hello! What is it?"]],
        },
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
    "stackexchange": (
        {"qid": 7, "question": Q, "response_j": YES, "response_k": NO},
        PLAIN,
    ),
    "swift, called rejected": ({"messages": turns(Q, YES), "rejected": NO}, PLAIN),
    "compared, HelpSteer2": (
        {"prompt": Q, "response_1": NO, "response_2": YES, "preference_strength": 2},
        PLAIN,
    ),
    "compared, HelpSteer2, the first": (
        {"prompt": Q, "response_1": YES, "response_2": NO, "preference_strength": -1},
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
        {
            "prompt": Q,
            "history": [["Hello.", "Hello! What is it?"]],
            "system": "Be brief.",
            "response_a": NO,
            "response_b": YES,
            "winner": "B",
        },
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
            "conversation_a": turns("Hello.", "Hello! What is it?", Q, NO),
            "conversation_b": turns("Hello.", "Hello! What is it?", Q, YES),
            "winner": "model_b",
            "model_a": "x",
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
    "scored, Stack Exchange": (
        {
            "qid": 7,
            "question": Q,
            "answers": [
                {"answer_id": 1, "pm_score": 0, "selected": False, "text": NO},
                {"answer_id": 2, "pm_score": 3, "selected": True, "text": YES},
                {"answer_id": 3, "pm_score": 1, "selected": False, "text": "Who knows?"},
            ],
        },
        PLAIN,
    ),
    "scored, by rank": (
        {"prompt": turns(Q), "answers": [{"answer": NO, "rank": 3}, {"answer": YES, "rank": 1}]},
        PLAIN,
    ),
    "scored, scores apart": (
        {"system": "Be brief.", "question": Q, "responses": [NO, YES], "scores": [-1, 0.5]},
        WITH_SYSTEM,
    ),
    "content in parts": (
        PLAIN | {"prompt": [{"role": "user", "content": [{"type": "text", "text": Q}]}]},
        PLAIN,
    ),
}


@pytest.fixture
def read(tiny_cfg, tmp_path, tiny_llama3):
    """The first training pair of a file as token ids, by way of everything that loading does."""
    tokenizer = load_tokenizer(str(tiny_llama3))

    def first(path, **overrides):
        cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, max_length=4096, **overrides)
        pairs, report = check_preferences(cfg, tokenizer)
        assert report.bad() == []
        texts = [templated(pair, tokenizer) for split in pairs.values() for pair in split]
        return [
            {side: tokenizer(t, add_special_tokens=False)["input_ids"] for side, t in text.items()}
            for text in texts
        ]

    return first


def other(row):
    """`row` with another question, so that one can be trained on and one held out."""
    return json.loads(json.dumps(row).replace(Q, "Is fire hot?"))


@pytest.mark.parametrize("name", TWINS)
def test_every_format_gives_the_tokens_of_its_explicit_twin(name, read, tmp_path):
    row, twin = TWINS[name]
    got = read(write_jsonl(tmp_path / "row.jsonl", [row, other(row)]))
    want = read(write_jsonl(tmp_path / "twin.jsonl", [twin, other(twin)]))
    assert got == want
    assert got[0]["prompt"].count(BOT) == 1
    assert got[0]["chosen"][-1] == EOT


def test_every_file_type_gives_the_same_tokens(read, tmp_path):
    row = {"system": "Be brief.", "question": Q, "chosen": YES, "rejected": NO}
    rows = [row, other(row)]
    want = read(write_jsonl(tmp_path / "a.jsonl", rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    (tmp_path / "parquet").mkdir()
    frame.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in (
        "a.json",
        "b.json",
        "lines.json",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "folder",
        "parquet",
    ):
        assert read(tmp_path / name) == want, name


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
    row = {"prompt": "No part of it.", "question": Q, "chosen": YES, "rejected": NO}
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
        ("2 + 2 =", " 4", " 5"),
        ("水是湿的吗？", "是的。", "是不是呢。"),
        ("The list:\n", "- one", "- other"),
    ],
)
def test_a_shared_beginning_is_split_between_sentences_or_at_least_words(prompt, chosen, rejected):
    pair = to_pair({"chosen": prompt + chosen, "rejected": prompt + rejected}, "implicit")
    assert pair["prompt"] == turns(prompt.strip())
    assert pair["chosen"] == answer(chosen.strip())
    assert pair["rejected"] == answer(rejected.strip())


@pytest.mark.parametrize("printed", [str, lambda talk: str(np.array(talk, dtype=object))])
def test_messages_that_pandas_printed_into_a_csv_are_messages(printed, tmp_path):
    talk = turns(f'{Q}\n}}\n{{ It\'s "wet".', "So it is.")
    pd.DataFrame([{"messages": talk, "n": 1}]).map(
        lambda cell: printed(cell) if isinstance(cell, list) else cell
    ).to_csv(tmp_path / "a.csv", index=False)
    ((_, row, _),) = read_file(tmp_path / "a.csv")
    assert row == {"messages": talk, "n": "1"}


def test_a_system_prompt_is_the_system_message_by_either_name():
    for name in ("system", "system_prompt"):
        row = {"prompt": Q, "chosen": YES, "rejected": NO, name: "Be brief."}
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


@pytest.mark.parametrize(("chosen", "rejected"), [("Surely not.", "Sure."), ("42", "43")])
def test_texts_that_share_no_whole_word_are_no_pair(chosen, rejected):
    with pytest.raises(BadRow, match="no common prompt of whole words"):
        to_pair({"chosen": chosen, "rejected": rejected}, "implicit")


def test_only_the_columns_that_the_format_reads_are_used_up(tiny_cfg, tmp_path):
    more = {"input": "raw", "output": "log", "history": ["h"], "question": "q", "instruction": "i"}
    alpaca = {"instruction": "Say.", "input": "in", "chosen": YES, "rejected": NO, "question": "q"}
    files = {
        "explicit": (PLAIN | more | {"system": "Be brief."}, set(more)),
        "alpaca": (alpaca | {"topic": "t"}, {"question", "topic"}),
        "orca": ({"question": Q, "chosen": YES, "rejected": NO, "input": "raw"}, {"input"}),
    }
    for name, (row, kept) in files.items():
        rows = [json.loads(json.dumps(row).replace(Q, f"Q{i}?")) for i in range(2)]
        rows = [r | {"instruction": f"Say {i}."} if name == "alpaca" else r
                for i, r in enumerate(rows)]  # fmt: skip
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, dataset_format=name)
        pairs = pairs_of(cfg)["train"]
        assert set(pairs.column_names) == {*SIDES, *IDS} | kept, name
        assert all(pairs[0][column] == row[column] for column in kept)


def test_further_columns_are_kept_where_they_have_one_type(tiny_cfg, tmp_path, capsys):
    rows = [
        json.loads(json.dumps(PLAIN).replace(Q, f"Q{i}?")) | {"facts": [[str(i)]], "mixed": mixed}
        for i, mixed in enumerate([1, "two", 3, "four", 5, "six"])
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.3))
    for split in pairs.values():
        for row in split:
            assert row["prompt"][0]["content"] == f"Q{row['facts'][0][0]}?"
    assert "mixed" not in pairs["train"].column_names
    assert "Column 'mixed' holds values of several types" in capsys.readouterr().out


def kto(prompt, text: str, label, **more) -> dict:
    return {"prompt": prompt, "completion": text, "label": label} | more


def test_unpaired_rows_with_the_same_prompt_are_put_together_by_the_stated_rule(
    tiny_cfg, tmp_path, capsys
):
    rows = [
        kto("A?", "bad 1", False, topic="t"),
        kto(" A? ", "good 1", True),
        kto("A?", "good 2", "true"),
        kto("B?", "good 3", 1),
        kto("A?", "good 3", True),
        kto("A?", "bad 2", 0),
        kto("B?", "bad of another system", False, system="Be brief."),
        kto("B?", "no label", None),
        kto("B?", "half", 0.5),
        kto("C?", "good 4", True),
        kto("C?", "bad 4", "False"),
    ]
    path = write_jsonl(tmp_path / "kto.jsonl", rows)
    cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5)
    pairs, report = check_preferences(cfg)
    found = {
        tuple(pair[side][-1]["content"].strip() for side in ("prompt", "chosen", "rejected"))
        for split in pairs.values()
        for pair in split
    }
    assert found == {
        ("A?", "good 1", "bad 1"), ("A?", "good 2", "bad 2"), ("C?", "good 4", "bad 4")
    }  # fmt: skip
    assert {f.where.split(":")[1]: f.detail for f in report.bad()} == {
        "4": "no answer labelled bad is left for the same prompt",
        "5": "no answer labelled bad is left for the same prompt",
        "7": "no answer labelled good is left for the same prompt",
        "8": "label or kto_tag is missing or null",
        "9": "label is 0.5, neither true nor false",
    }
    assert "11 rows give 3 pairs. To each prompt the first good" in capsys.readouterr().out
    assert sum(report.rows.values()) == len(rows)
    topics = {pair["chosen"][0]["content"]: pair["topic"] for s in pairs.values() for pair in s}
    assert topics == {"good 1": "t", "good 2": None, "good 4": None}  # of the earlier row


@pytest.mark.parametrize(
    "shape",
    [
        lambda text, good: {"messages": turns(Q, text), "label": good},
        lambda text, good: {"instruction": Q, "input": "", "output": text, "kto_tag": good},
        lambda text, good: {
            "conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": text}],
            "kto_tag": good,
        },
    ],
)
def test_unpaired_rows_of_other_tools_are_read(shape, tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "kto.jsonl", [shape(YES, True), shape(NO, False)])
    pairs, report = check_preferences(tiny_cfg(dataset_name=str(path)))
    assert report.formats["train"] == "unpaired"
    (pair,) = [pair for split in pairs.values() for pair in split]
    assert pair == PLAIN


def test_unpaired_data_without_partners_is_refused_and_says_what_to_do(tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "kto.jsonl", [kto(f"{i}?", "So.", i % 2 == 0) for i in range(6)])
    with pytest.raises(DataError, match=r"unpaired \(KTO\).*none of the 6 rows has a.*KTOTrainer"):
        check_preferences(tiny_cfg(dataset_name=str(path)))


def test_labels_of_one_and_minus_one_are_read_and_others_named(tiny_cfg, tmp_path):
    def rows(bad):
        labels = ((YES, 1), (NO, bad))
        return [kto(f"Q{i}?", text, label) for i in range(3) for text, label in labels]

    path = write_jsonl(tmp_path / "a.jsonl", rows(-1))
    pairs, report = check_preferences(tiny_cfg(dataset_name=str(path)))
    assert [report.rows[split] for split in pairs] == [2 * len(some) for some in pairs.values()]
    assert sum(report.rows.values()) == 6
    path = write_jsonl(tmp_path / "a.jsonl", rows("meh"))
    with pytest.raises(DataError, match=r"a.jsonl:2, which cannot be read: label is 'meh'"):
        check_preferences(tiny_cfg(dataset_name=str(path)))


def test_columns_that_nearly_fit_are_told_with_the_cure(tiny_cfg, tmp_path):
    rows = [{" Prompt": f"Q{i}?", "CHOSEN": YES, "rejected": NO} for i in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="but for case and spaces; set dataset_columns") as told:
        check_preferences(tiny_cfg(dataset_name=str(path)))
    names = parse_overrides([f"dataset_columns={str(told.value).partition('columns: ')[2]}"])
    assert len(check_preferences(tiny_cfg(dataset_name=str(path), **names))[0]["train"]) == 2
    with pytest.raises(DataError, match="dataset_format orca needs columns question, chosen"):
        check_preferences(tiny_cfg(dataset_name=str(path), dataset_format="orca"))


def test_scores_that_no_row_has_in_full_are_told_as_that(tiny_cfg, tmp_path):
    rows = [{"prompt": f"Q{i}?", "answers": [YES, NO], "scores": [1, None]} for i in range(3)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="would be scored, but no row can be read: scores is not a"):
        check_preferences(tiny_cfg(dataset_name=str(path)))


def test_a_prompt_in_a_column_of_no_known_name_is_asked_for_and_not_made_up(tiny_cfg, tmp_path):
    answers = [("So it is.", "That may be."), ("So it is, yes.", "So it is not, no.")] * 5
    rows = [{"input": f"Q{i}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"columns chosen, input, rejected: .*{its_name: prompt}"):
        check_preferences(tiny_cfg(dataset_name=str(path)))
    cfg = tiny_cfg(dataset_name=str(path), dataset_columns={"input": "prompt"})
    assert check_preferences(cfg)[1].bad() == []


def test_labels_and_answers_beside_pairs_are_no_sign_of_another_format(tiny_cfg, tmp_path):
    rows = [
        {"instruction": f"{Q} {i}", "chosen": YES, "rejected": NO, "label": True, "answers": ["x"]}
        for i in range(4)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    pairs = pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.5))
    assert len(pairs["train"]) == 2
    assert set(pairs["train"].column_names) == {*SIDES, *IDS, "label", "answers"}


def test_the_margin_of_scores_is_an_option(tiny_cfg, tmp_path):
    rows = [
        {"prompt": f"{i}?", "responses": ["So.", "No."], "scores": [float(i), 0.0]}
        for i in range(6)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for margin, left in ((0.0, 5), (2.0, 3), (3.5, 2)):
        cfg = tiny_cfg(dataset_name=str(path), test_split_size=0.5, score_margin=margin)
        pairs, report = check_preferences(cfg)
        assert sum(map(len, pairs.values())) == left
        assert {f.kind for f in report.bad()} == {"equal"}
    assert f"not more than {margin:g} (score_margin) apart" in report.bad()[0].detail


BOTH = {"prompt": Q, "response_a": YES, "response_b": NO}
ONE_TWO = {"prompt": Q, "response_1": YES, "response_2": NO}
ZERO_ONE = {"prompt": Q, "response_0": YES, "response_1": NO}


# A verdict on other answers than its own, which may count otherwise; and a `rejected` of no format.
OTHERS = {
    "scores of three": ZERO_ONE
    | {"response_2": "Perhaps.", "score_0": 9, "score_1": 1, "score_2": 5},
    "labels that are numbers of answers": ZERO_ONE | {"labels": 1},
    "numbers from one": ONE_TWO | {"better_response_id": 1},
    "a strength without a sign": BOTH | {"preference_strength": 2, "preferred": "A"},
    "a summary's columns": {"query": Q, "chosen": YES, "rejected": NO},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_told_for_certain_is_no_format(name):
    assert detect(set(OTHERS[name]), [OTHERS[name]] * 3) is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"query": Q, "chosen": turns(Q, YES), "rejected": turns(Q, NO)}, "implicit"),
        ({"query": Q, "chosen": human(Q, YES), "rejected": human(Q, NO)}, "hh"),
        ({"instruction": Q, "query": Q, "chosen": YES, "rejected": NO}, "alpaca"),
        ({"instruction": Q, "output": YES, "rejected": NO, "messages": turns(Q)}, "alpaca"),
        ({"query": Q, "response": YES, "rejected": NO}, "swift"),
        (ZERO_ONE | {"response_2": "Perhaps.", "better_response_id": 0}, "compared"),
    ],
)
def test_a_rejected_column_belongs_to_the_format_that_has_the_chosen_one(row, name):
    assert detect(set(row), [row] * 3) == name
    pair = to_pair(row, name)
    assert (pair["prompt"][-1]["content"], pair["chosen"], pair["rejected"]) == (
        Q, answer(YES), answer(NO)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("row", "name", "told"),
    [
        ({"prompt": Q, "responses": [YES], "scores": [1]}, "scored", "not two answers to choose"),
        ({"prompt": Q, "responses": [YES, NO], "scores": [1]}, "scored", "one number for each"),
        ({"prompt": Q, "responses": [YES, NO], "scores": [1, None]}, "scored", "is not a number"),
        (
            {"prompt": Q, "responses": [YES, NO]},
            "scored",
            "scores or rewards or ratings is missing",
        ),
        ({"prompt": Q, "answers": YES}, "scored", "answers is not a list but str"),
        ({"prompt": Q, "answers": [{"text": YES}] * 2}, "scored", "rating is missing or null"),
        (
            {"messages": turns(Q), "rejected_response": NO},
            "swift",
            "does not end with the assistant",
        ),
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
        (PLAIN | {"prompt": [*turns(Q), None]}, "explicit", "prompt has null among its messages"),
        (
            {"chosen": turns("A?", "Yes."), "rejected": turns("B?", "No.")},
            "implicit",
            "conversations that begin differently",
        ),
        (
            {"instruction": Q, "history": "Hello.", "output": [YES, NO]},
            "alpaca",
            "history is not a list of pairs",
        ),
        ({"prompt": Q, "label": True}, "unpaired", "does not end with the assistant"),
        (BOTH | {"winner": "maybe"}, "compared", "winner is 'maybe': not model_a"),
        (BOTH | {"winner": "tie"}, "compared", "equally good"),
        (
            ONE_TWO | {"preference_strength": "much"},
            "compared",
            "preference_strength is not a number",
        ),
        (
            ZERO_ONE | {"better_response_id": 2},
            "compared",
            "better_response_id is 2, neither 0 nor 1",
        ),
        (BOTH | {"winner": None}, "compared", "are not two answers and a verdict"),
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
    rows = [row | {"input": row["input"] | {"tools": [tool]}}, row]
    path = write_jsonl(tmp_path / "a.jsonl", [rows[0], other(rows[1])])
    pairs = pairs_of(tiny_cfg(dataset_name=str(path), test_split_size=0.5))
    kept = [pair.get("tools") for split in pairs.values() for pair in split]
    assert [json.loads(tools) for tools in kept if tools] == [[tool]]
