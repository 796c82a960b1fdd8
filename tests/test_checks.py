"""One file of bad rows of every kind, each reported right; and what the checks say of good ones."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import explicit, pairs_in, write_jsonl

from scripts.base import ROOT
from scripts.data import check_preferences, load_preferences
from scripts.model import load_tokenizer
from scripts.pairs.checks import KINDS, breaks_off, entity, near
from scripts.pairs.provenance import read_jsonl
from scripts.pairs.report import by_kind, length_bias, report_text

MAX_LENGTH = 160
YES, NO = "Yes, it is.", "That is debated."


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


def pair(prompt="Is it so?", chosen=YES, rejected=NO, **more) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} | more


def ask(number: int) -> str:
    return f"Question {number}?"


def talk(*roles: str) -> list[dict]:
    return [said(role, f"{role} speaks {n}.") for n, role in enumerate(roles)]


USER, ASSISTANT = [said("user", "Why so?")], [said("assistant", YES)]

# A row (or a line as it stands in the file), the kind it is to be reported as, and a part of what
# is to be said of it. Prompts differ, so that no row is a duplicate unless it is meant to be.
BAD = [
    (b'{"prompt": "Cut short", "chosen": "Yes', "unreadable", "not JSON"),
    (b"{'prompt': 'Single quotes'}", "unreadable", "not JSON"),
    (b'"just text"', "unreadable", "but str"),
    (b'{"prompt": "Caf\xe9?", "chosen": "Yes.", "rejected": "No."}', "encoding", "byte 0xe9"),
    (b'{"prompt": "Half \\ud83d?", "chosen": "Y.", "rejected": "N."}', "encoding", "'\\ud83d'"),
    (pair("Replaced \ufffd?"), "encoding", "prompt has '\\ufffd'"),
    (pair("Null?", "Yes\x00."), "encoding", "chosen has '\\x00' at character 3"),
    (pair("Quotes?", "It â€œisâ€\x9d."), "encoding", "chosen has '\\xe2"),
    (pair("BOM?", "\ufeffYes."), "encoding", "chosen has '\\ufeff'"),
    ({"chosen": YES, "rejected": NO}, "missing", "prompt is missing"),
    (pair(None), "missing", "prompt is missing or null"),
    (pair(USER, [{"role": "assistant"}]), "missing", "chosen's content is missing"),
    (pair(ask(4), 42), "type", "chosen is not text but int"),
    (pair(ask(7), [YES]), "type", "chosen is not text but list"),
    (pair(USER, [said("assistant", {"text": YES})]), "type", "content is not text but dict"),
    (pair([said("user", [{"type": "image"}])]), "type", "part that is not text"),
    (pair(ask(8), system=3), "type", "system is not text but int"),
    (pair(talk("user", "assistant")), "roles", "the user comes last"),
    (pair(talk("user", "user")), "roles", "take turns, and"),
    (pair(talk("user", "system", "user")), "roles", "roles are user, system, user;"),
    (pair(talk("system")), "roles", "the user comes last"),
    (pair(talk("narrator", "user")), "roles", "roles are narrator, user;"),
    (pair(talk("user", "tool", "user")), "roles", "take turns, and"),
    (pair([{"content": "Who?"}]), "roles", "message without a role"),
    (pair(USER, [said("user", YES)]), "roles", "chosen is the user's message"),
    (pair(USER, ASSISTANT, talk("system")), "roles", "rejected is the system's message"),
    (pair(USER, talk("assistant", "user", "assistant")), "turns", "chosen has 3 messages"),
    (pair([]), "empty", "prompt is empty"),
    (pair(""), "empty", "prompt is empty"),
    (pair(ask(10), YES, " \n\t"), "empty", "rejected is empty or white space"),
    (pair(ask(11), "\u200b\u00a0"), "empty", "chosen is empty or white space"),
    (pair(USER, []), "empty", "chosen is empty"),
    (pair(ask(12), YES, YES), "equal", "word for word"),
    (pair(ask(13), YES, f" {YES}\n"), "equal", "but for white space around them"),
    (pair(ask(16), "Yes.<|eot_id|>"), "special", "chosen has '<|eot_id|>'"),
    (pair(ask(17), YES, "No <|reserved_255|>"), "special", "rejected has '<|reserved_255|>'"),
    (pair("word " * 40), "no_room", f"max_length is {MAX_LENGTH}"),
    (pair("s" * 40, "a" * 99 + "b", "a" * 99 + "c"), "cut_equal", "the same in the"),
    (pair("Said before?"), "duplicate", "the same pair as bad.jsonl:"),
    (pair(" Said before? ", f"{YES}\n"), "duplicate", "the same pair as bad.jsonl:"),
    (pair("Which way?"), "contradiction", "the other way round in bad.jsonl:"),
    (pair("Which way?", NO, YES), "contradiction", "the other way round in bad.jsonl:"),
    (pair("Held out?"), "leak", "the prompt of test.jsonl:1"),
    (pair("HELD  out", "So."), "leak", "the prompt of test.jsonl:1"),
]
GOOD = [
    pair("Said before?"),
    pair("Fine?"),
    pair(talk("system", "user", "assistant", "user"), ASSISTANT, [said("assistant", NO)]),
    pair("Say {'a': 1} in JSON?", '{"a": 1}', "Café, naïve, 日本語, 😀, “quoted” – fine…"),
    pair("Does Â stand alone?", "Ã, Â and â are letters, as in pão and âge.", "No. <3 a | b |>"),
]


@pytest.fixture
def bad_file(tmp_path):
    """`bad.jsonl` with the good rows first, then one bad row a line; and `test.jsonl`."""
    lines = [json.dumps(row).encode() for row in GOOD]
    lines += [row if isinstance(row, bytes) else json.dumps(row).encode() for row, *_ in BAD]
    folder = tmp_path / "pairs"
    write_jsonl(folder / "test.jsonl", [pair("Held out?", "Ja.", "Nein.")])
    (folder / "bad.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += "  - {split: train, path: bad.jsonl}\n  - {split: test, path: test.jsonl}\n---\n"
    (folder / "README.md").write_text(card)
    return folder


@pytest.fixture
def checked(bad_file, tiny_cfg, tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    return check_preferences(tiny_cfg(dataset_name=str(bad_file), max_length=MAX_LENGTH), tokenizer)


def test_every_bad_row_is_reported_with_its_line_and_the_good_ones_stay(checked):
    pairs, report = checked
    found = {}
    for finding in report.bad():
        assert finding.split == "train"
        found.setdefault(finding.where, []).append(finding)
    for line, (row, kind, told) in enumerate(BAD, start=len(GOOD) + 1):
        findings = found.pop(f"bad.jsonl:{line}", [])
        assert [f.kind for f in findings] == [kind], (row, findings)
        assert told in findings[0].detail, (row, findings)
    assert found == {}  # no good row is called bad
    assert len(pairs["train"]) == len(GOOD)
    assert report.rows == {"train": len(GOOD) + len(BAD), "test": 1}
    assert report.lengths["train"].shape == (len(GOOD), 3)


def test_every_kind_of_bad_row_is_in_that_file_or_has_a_test_of_its_own():
    shown = {kind for _, kind, _ in BAD} | {"unended", "template"}  # this one: test_tokens.py
    assert shown == {kind for kind, about in KINDS.items() if about.bad}


def test_the_report_counts_and_mends_each_kind(checked):
    _, report = checked
    table = by_kind(report).set_index("kind")
    assert {k: n for k, n in table["rows"].items() if KINDS[k].bad} == Counter(k for _, k, _ in BAD)
    text = report_text(report)
    assert f"train: {len(GOOD) + len(BAD)} rows, {len(GOOD)} usable pairs" in text
    assert all(KINDS[kind].fix in text for kind in table.index)


def test_a_template_without_end_of_turn_is_noticed(tiny_cfg, tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "")
    _, report = check_preferences(tiny_cfg(), tokenizer)
    assert {f.kind for f in report.bad()} == {"unended"}


def test_truncation_tells_what_is_lost_and_is_only_a_remark(tiny_cfg, tiny_llama3, tmp_path):
    rows = [explicit(ask(i), YES, "n" * 100 + ".") for i in range(4)]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    tokenizer = load_tokenizer(str(tiny_llama3))
    for mode, where in (("keep_start", "end"), ("keep_end", "beginning")):
        cfg = tiny_cfg(
            dataset_name=str(path), max_length=120, truncation_mode=mode, test_split_size=0.3
        )
        pairs, report = check_preferences(cfg, tokenizer)
        (prompt, _, rejected), *_ = report.lengths["train"]
        told = {f.detail for f in report.findings}
        lost = prompt + rejected - 120
        assert lost > 0
        assert told == {f"tokens lost at the {where}{', the prompt first' * (where != 'end')}: "
                        f"rejected {lost} of {rejected}"}  # fmt: skip
        assert report.bad() == []
        assert sum(map(len, pairs.values())) == 4


def test_answers_that_stop_short_and_foreign_marks_are_remarks(tiny_cfg, tmp_path):
    rows = [
        pair("One?", "It is because of"),
        pair("Two?", "First, second,"),
        pair("Three?", "[INST] Yes. [/INST]"),
        pair("Four?", "Paris 2024"),
        pair("Five?", "Fine.\n\nHuman: And now?"),
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, pair("Six?")])
    pairs, report = check_preferences(tiny_cfg(dataset_name=str(path), test_split_size=0.1))
    kinds = {f.where: f.kind for f in report.findings}
    assert kinds == {
        "a.jsonl:1": "breaks_off",
        "a.jsonl:2": "breaks_off",
        "a.jsonl:3": "markup",
        "a.jsonl:5": "markup",
    }
    assert sum(map(len, pairs.values())) == 6


DIFFERENT = [
    ("5²", "52"),
    ("Paris", "paris"),
    ("!flag", "flag"),
    ("if x:\n    y = 1\nz = 2.", "if x:\n    y = 1\n    z = 2."),
    ('"quoted"', "quoted"),
]


def test_answers_that_nearly_agree_are_kept_and_remarked(tiny_cfg, tiny_llama3, tmp_path):
    rows = [pair(ask(i), *answers) for i, answers in enumerate(DIFFERENT)]
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, rows))
    pairs, report = check_preferences(cfg, load_tokenizer(str(tiny_llama3)))
    assert report.bad() == []
    near = [f.where for f in report.findings if f.kind == "near_equal"]
    assert near == [f"train.jsonl:{n}" for n in range(1, len(rows) + 1)]
    kept = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs["train"]]
    assert kept == DIFFERENT


def test_answers_that_the_tokenizer_cannot_tell_apart_are_equal(tiny_cfg, tiny_llama3, tmp_path):
    tokenizer = load_tokenizer(str(tiny_llama3))
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| trim | lower")
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, [pair("Where?", "Paris.", "paris."), pair()]))
    _, report = check_preferences(cfg, tokenizer)
    assert [(f.where, f.kind) for f in report.bad()] == [("train.jsonl:1", "equal")]


ABOUT_ONE_ROW = {"near_equal", "breaks_off"}


def test_repeats_are_dropped_only_when_exact_and_leaks_in_any_spelling(tiny_cfg, tmp_path):
    rows = [
        pair("Write a loop.", "for x in y:\n  f(x)", "while y:\n  f(y.pop())"),
        pair("Write a loop.", "for x in y:\n    f(x)", "while y:\n    f(y.pop())"),
        pair("Which case?", "Paris", "paris"),
        pair("Which case?", "paris", "PARIS"),
        pair("HELD  OUT", "So.", "Not so."),
    ]
    pairs, report = check_preferences(tiny_cfg(dataset_name=pairs_in(tmp_path, rows)))
    assert [(f.where, f.kind) for f in report.findings if f.kind not in ABOUT_ONE_ROW] == [
        ("train.jsonl:2", "near_duplicate"),
        ("train.jsonl:4", "near_duplicate"),
        ("train.jsonl:5", "leak"),
    ]
    assert len(pairs["train"]) == 4


def test_length_bias_is_what_a_rule_of_length_alone_gets_right():
    lengths = np.array([[9, 5, 8], [9, 5, 9], [9, 5, 7], [9, 8, 5], [9, 5, 5]])
    bias = length_bias(lengths)
    assert bias["chosen_shorter"] == pytest.approx(0.6)
    assert bias["chosen_longer"] == pytest.approx(0.2)
    assert bias["length_rule_accuracy"] == pytest.approx(0.7)


def test_the_command_says_it_all_and_fails_when_bad_rows_are_an_error(
    bad_file, tiny_llama3, tmp_path
):
    command = [sys.executable, "-m", "scripts.data", "check", "--output-dir", str(tmp_path / "out")]
    command += ["--set", f"dataset_name={bad_file}", "--set", f"model_name_or_path={tiny_llama3}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "A run leaves the" in done.stdout and "--- chosen\nYes, it is.<|eot_id|>" in done.stdout
    for kind in {kind for _, kind, _ in BAD} - {"no_room", "cut_equal"}:  # max_length is larger
        assert f"\n{kind.rjust(13)}" in done.stdout or f" {kind} " in done.stdout, kind
    written = read_jsonl(tmp_path / "out" / "data_check" / "findings.jsonl")
    assert {"split", "where", "kind", "detail", "fix"} == set(written[0])
    assert (tmp_path / "out" / "data_check" / "check.png").stat().st_size > 10_000
    done = subprocess.run(
        [*command, "--set", "on_bad_rows=error"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "correct them, or set on_bad_rows: drop" in done.stderr


def test_dropped_rows_are_written_with_the_reason(bad_file, tiny_cfg, tiny_llama3, capsys):
    cfg = tiny_cfg(dataset_name=str(bad_file), max_length=MAX_LENGTH)
    pairs = load_preferences(cfg, load_tokenizer(str(tiny_llama3)))
    assert len(pairs["train"]) == len(GOOD)
    written = read_jsonl(cfg.run_dir / "dropped_rows.jsonl")
    assert [
        row["kind"] for row in sorted(written, key=lambda r: int(r["where"].split(":")[1]))
    ] == [kind for _, kind, _ in BAD]
    assert f"Left out {len(BAD)} bad rows" in capsys.readouterr().out


FINISHED = [
    "The past tense of 'swim' is 'swam'",
    "Paris 2024",
    "Option a",
    "1. Preheat the oven. Set it to 180 degrees.\n2. Mix the batter. Do not overmix",
    "Use a loop:\n\n```python\nfor x in y:\n    print(x)\n```",
    "def f(x):\n    return x + 1",
    "Dear Ms Hill,\n\nThank you for the visit. We enjoyed it.\n\nSincerely,",
    "北京是中国的首都",
]
BROKEN = [
    "It is because of",
    "First, second,",
    "The capital of France is Paris, and the",
    "Here are the steps:\n1. Mix the flour and the",
    "Use a loop:\n\n```python\nfor x in y:\n    print(x",
    "感冒通常由病毒引起。注意休息，多喝水。同时要注意保持室内的",
]


def test_broken_answers_are_found_and_finished_ones_of_every_shape_are_not():
    assert [text for text in FINISHED if breaks_off(text)] == []
    assert [text for text in BROKEN if not breaks_off(text)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Tom &amp; Jerry", "&amp;"),
        ("It&#x27;s so", "&#x27;"),
        ("a &lt; b", "&lt;"),
        ("Write `&amp;` for an ampersand", None),
        ("In HTML: <p>Tom &amp; Jerry</p>", None),
        ("```html\n&nbsp;\n```", None),
        ("AT&T; R&D &y;", None),
    ],
)
def test_entities_are_found_where_they_are_no_subject(text, found):
    assert entity(text) == found


def test_near_copies_are_found_and_like_questions_are_not():
    text = "Air scatters blue light far more than red light, and so the sky looks blue by day"
    texts = [
        "What is the highest mountain of the whole country of France?",
        "What is the highest mountain of the whole country of Spain?",
        text,
        text.replace("far", "much") + ", as it does for us all here on this planet",
        text + " for us",
        "天空看起来是蓝色的，因为空气散射蓝光比红光更多",
        "天空看起来是蓝色的，因为空气散射蓝光比红光更多。",
        "Yes", "Yes",
    ]  # fmt: skip
    assert list(near(texts)) == [(4, 2), (6, 5)]
    assert list(near(texts[4:5], texts[:4])) == [(0, 2)]
