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
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from scripts.pairs.messages import (
    PROMPTS,
    BadRow,
    Messages,
    as_messages,
    as_pair,
    first_of,
    number_in,
    split_talks,
    text_of,
)

# Where two answers stand that were compared, and the columns that tell which was found better.
ANSWERS = (
    ("response_1", "response_2"),  # HelpSteer2
    ("response1", "response2"),  # HelpSteer3
    ("response_0", "response_1"),  # PKU-SafeRLHF
    ("response_a", "response_b"),  # Chatbot Arena, a list of answers to a list of prompts
    ("conversation_a", "conversation_b"),  # Chatbot Arena, whole conversations
    ("human_ref_A", "human_ref_B"),  # SHP
    ("answer_0", "answer_1"),  # WebGPT
)
FIRST, SECOND, TIE = 1, -1, 0


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


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


def _below_zero(column: str) -> Callable[[dict], int]:
    """A number in `column` that is below 0 where the first answer is better."""
    return lambda row: -_sign(number_in(row.get(column), column))


VERDICTS: dict[str, Callable[[dict], int]] = {
    "preference_strength": _below_zero("preference_strength"),
    "overall_preference": _below_zero("overall_preference"),
    "better_response_id": _better_id,
    "winner": _winner,
    "winner_model_a": _votes,
    "labels": _shp,
    "score_0": _higher,
}
COMPARED_PROMPTS = f"{PROMPTS}|context|history"


def _talk_of(prompts: Any, answers: Any, what: str) -> Messages:
    """Prompts and answers by turns, from two lists as long, perhaps as JSON text."""
    parsed = []
    for value in (prompts, answers):
        try:
            parsed.append(json.loads(value) if isinstance(value, str) else value)
        except ValueError:
            parsed.append(None)
    if not all(isinstance(p, list) for p in parsed) or len(parsed[0]) != len(parsed[1]):
        return []
    if any(isinstance(turn, dict) for turn in parsed[0]):
        return []
    return [
        {"role": role, "content": text_of(text, what)}
        for turn in zip(*parsed, strict=True)
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _compared(row: dict) -> tuple[str, str]:
    for names in ANSWERS:
        if all(row.get(name) is not None for name in names):
            return names
    raise BadRow("missing", "there are not two answers to choose between")


def from_compared(row: dict) -> dict[str, Messages]:
    """Two answers of which one was found better; a tie is no pair.

    By `better_response_id` and not by `safer_response_id`, where a row has both.
    """
    names = _compared(row)
    verdict = VERDICTS[first_of(row, "|".join(VERDICTS))[0]](row)
    if verdict == TIE:
        raise BadRow("equal", "the two answers were found equally good")
    chosen, rejected = names if verdict == FIRST else names[::-1]
    if names[0].startswith("conversation"):
        return split_talks(*(as_messages(row[name], "user", name) for name in (chosen, rejected)))
    column, prompt = first_of(row, COMPARED_PROMPTS)
    if isinstance(prompt, dict):  # WebGPT's question
        prompt = prompt.get("full_text")
    talks = [_talk_of(prompt, row[name], name) for name in (chosen, rejected)]
    if all(talks):
        return split_talks(*talks)
    answers = (as_messages(row[name], "assistant", name) for name in (chosen, rejected))
    return as_pair(as_messages(prompt, "user", column), *answers)
