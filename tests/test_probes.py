"""Prompts are drawn by seed, and every kind of instruction is checked."""

import json

import pytest

from scripts.base import ROOT
from scripts.pairs.text import are_facts
from scripts.probes import CHECKS, follows, pick_prompts

CASES = {
    "at_most_words": (3, "One two three.", "One two three four."),
    "at_least_words": (3, "One two three.", "One two."),
    "sentences": (2, "It rains. It is 3.5 degrees.", "It rains."),
    "bullets": (2, "Here:\n- one\n- two", "- one\n- two\n- three"),
    "lower_case": (None, "rain is wet.", "Rain is wet."),
    "upper_case": (None, "RAIN IS WET.", "RAIN is wet."),
    "no_commas": (None, "Rain is wet.", "Rain, I say, is wet."),
    "includes": ("wet", "Rain is WET.", "Rain is what it is."),
    "avoids": ("red", "It was hundred years ago.", "It is red."),
    "starts_with": ("In short", "In short: yes.", "Yes, in short."),
    "ends_with": ("The end.", "It slept. The end. ", "The end. It slept."),
    "in_quotes": (None, '"Hello there."', 'She said "hello".'),
    "json": (None, '{"name": "Ann", "age": 3}', 'Here: {"name": "Ann"}'),
    "paragraphs": (2, "One.\n\nTwo.", "One.\nTwo."),
    "one_of": (["yes", "no"], "Yes.", "Yes, it is."),
}


@pytest.mark.parametrize("kind", CHECKS)
def test_a_check_tells_following_from_not(kind):
    value, good, bad = CASES[kind]
    assert follows(good, [{"kind": kind, "value": value}])
    assert not follows(bad, [{"kind": kind, "value": value}])


def test_all_checks_must_pass_and_an_empty_reply_passes_none():
    both = [{"kind": "no_commas"}, {"kind": "lower_case"}]
    assert follows("rain is wet", both) and not follows("rain, wet", both)
    assert not follows("  ", [{"kind": "no_commas"}])


def test_the_projects_instructions_use_every_check_and_know_no_other():
    rows = [json.loads(line) for line in (ROOT / "data" / "instructions.jsonl").open()]
    assert {check["kind"] for row in rows for check in row["checks"]} == set(CHECKS)
    assert len({row["prompt"] for row in rows}) == len(rows) >= 60


def test_prompts_are_drawn_by_seed_once_each_and_in_order():
    prompts = [[{"role": "user", "content": str(i % 50)}] for i in range(100)]
    assert pick_prompts(prompts, None, 0) == pick_prompts(prompts, 60, 0) == list(range(50))
    some = pick_prompts(prompts, 10, 0)
    assert some == sorted(set(some)) == pick_prompts(prompts, 10, 0) and len(some) == 10
    assert some != list(range(10)) and some != pick_prompts(prompts, 10, 1)


def test_facts_in_another_form_are_not_measured():
    assert are_facts([["Rayleigh"], ["scatter", "bounce"]]) and are_facts([])
    for odd in (["Rayleigh"], [[""]], '[["Rayleigh"]]', [[]], [[1]]):
        assert not are_facts(odd)
