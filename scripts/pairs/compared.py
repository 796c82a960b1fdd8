"""Rows of two answers of which people, or a model, found one better.

| data | answers | verdict |
| --- | --- | --- |
| HelpSteer2 | `response_1`, `response_2` | `preference_strength`, below 0 where the first is better |
| HelpSteer3 | `response1`, `response2` | `overall_preference`, likewise |
| PKU-SafeRLHF | `response_0`, `response_1` | `better_response_id`, 0 or 1; `safer_response_id` is not read |
| Chatbot Arena | `conversation_a`, `conversation_b` | `winner`: model_a, model_b, or a tie |
| Chatbot Arena, 55k | `response_a`, `response_b`, lists of answers to a list of prompts | `winner_model_a`, `winner_model_b` |
| SHP | `human_ref_A`, `human_ref_B` | `labels`, 1 where the first is better |
| WebGPT | `answer_0`, `answer_1` | `score_0`, `score_1` |

A verdict is read with its own answers only: elsewhere 1 may be the number of the second answer, or a
strength without a sign. HelpSteer2's pairs are a file of their own on the hub,
`preference/preference.jsonl.gz`, to be given by its address.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from scripts.pairs.messages import (
    PROMPTS,
    BadRow,
    Messages,
    as_messages,
    as_pair,
    asked_in,
    by_turns,
    first_of,
    number_in,
    split_talks,
    text_of,
)

FIRST, SECOND, TIE = 1, -1, 0
# Between the turns of a HelpSteer2 prompt.
TURN = re.compile(r"\n?<extra_id_\d+>(User|Assistant|System)\n")


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _below_zero(column: str) -> Callable[[dict], int]:
    """A number in `column` that is below 0 where the first answer is better."""
    return lambda row: -_sign(number_in(row.get(column), column))


def _zero_or_one(row: dict, column: str) -> float:
    value = number_in(row.get(column), column)
    if value not in (0, 1):
        raise BadRow("type", f"{column} is {row[column]!r}, neither 0 nor 1")
    return value


def _better_id(row: dict) -> int:
    return SECOND if _zero_or_one(row, "better_response_id") else FIRST


def _shp(row: dict) -> int:
    return FIRST if _zero_or_one(row, "labels") else SECOND


def _winner(row: dict) -> int:
    value = text_of(row.get("winner"), "winner").strip().lower()
    if "tie" in value or "both" in value:
        return TIE
    found = {"model_a": FIRST, "a": FIRST, "model_b": SECOND, "b": SECOND}.get(value)
    if found is None:
        raise BadRow("type", f"winner is {row['winner']!r}: not model_a, model_b or a tie")
    return found


def _votes(row: dict) -> int:
    a, b = (number_in(row.get(f"winner_model_{side}"), f"winner_model_{side}") for side in "ab")
    return _sign(a - b)


def _higher(row: dict) -> int:
    first, second = (number_in(row.get(f"score_{n}"), f"score_{n}") for n in (0, 1))
    return _sign(first - second)


# Two answers, the column of the verdict on them, and how it is read.
VERDICTS: tuple[tuple[str, str, str, Callable[[dict], int]], ...] = (
    ("response_1", "response_2", "preference_strength", _below_zero("preference_strength")),
    ("response1", "response2", "overall_preference", _below_zero("overall_preference")),
    ("response_0", "response_1", "better_response_id", _better_id),
    ("response_a", "response_b", "winner_model_a", _votes),
    ("response_a", "response_b", "winner", _winner),
    ("conversation_a", "conversation_b", "winner", _winner),
    ("human_ref_A", "human_ref_B", "labels", _shp),
    ("answer_0", "answer_1", "score_0", _higher),
)
# All columns that are read, the prompt's aside.
COLUMNS = {name for *names, _ in VERDICTS for name in names}
COLUMNS |= {"winner_model_b", "winner_tie", "score_1"}


def _compared(row: dict) -> tuple[str, str]:
    """The columns of the chosen and of the rejected answer."""
    for first, second, column, verdict in VERDICTS:
        if all(row.get(name) is not None for name in (first, second, column)):
            found = verdict(row)
            if found == TIE:
                raise BadRow("equal", "the two answers were found equally good")
            return (first, second) if found == FIRST else (second, first)
    raise BadRow("missing", "there are not two answers and a verdict that belongs to them")


def _turns(prompts: Any, answers: Any, what: str) -> Messages:
    """Prompts and answers by turns, from two lists as long, perhaps as JSON text; else nothing."""
    lists = []
    for value in (prompts, answers):
        try:
            lists.append(json.loads(value) if isinstance(value, str) else value)
        except ValueError:
            return []
    if not all(isinstance(each, list) for each in lists) or len(lists[0]) != len(lists[1]):
        return []
    if any(isinstance(turn, dict) for turn in lists[0]):
        return []
    return by_turns(list(zip(*lists, strict=True)), what)


def _prompt(row: dict) -> Messages:
    """The prompt, whatever its column is called; `context` or `history` where nothing else is."""
    if any(row.get(name) is not None for name in PROMPTS.split("|")):
        if row.get("context"):
            raise BadRow("type", "there is a context beside the prompt: put both into one column")
        name, value = first_of(row, PROMPTS)
        if isinstance(value, dict) and "full_text" in value:  # WebGPT's question
            value = value["full_text"]
        if isinstance(value, str) and len(parts := TURN.split(value)) > 1:
            roles = ["user", *(who.lower() for who in parts[1::2])]
            turns = zip(roles, parts[::2], strict=True)
            return [{"role": role, "content": text.strip()} for role, text in turns]
        return asked_in(row | {name: value})
    column, value = first_of(row, "context|history")
    return as_messages(value, "user", column)


def from_compared(row: dict) -> dict[str, Messages]:
    """Two answers of which one was found better; a tie is no pair.

    By `better_response_id` and not by `safer_response_id`, where a row has both.
    """
    chosen, rejected = _compared(row)
    if chosen.startswith("conversation"):
        return split_talks(*(as_messages(row[name], "user", name) for name in (chosen, rejected)))
    if chosen in ("response_a", "response_b"):
        talks = [_turns(row.get("prompt"), row[name], name) for name in (chosen, rejected)]
        if all(talks):
            return split_talks(*talks)
    answers = (as_messages(row[name], "assistant", name) for name in (chosen, rejected))
    return as_pair(_prompt(row), *answers)
