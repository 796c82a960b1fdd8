"""Instructions that a program can verify, after IFEval (arXiv 2311.07911): is the form as asked?

A tuning that makes a model better at one task must not make it worse at following instructions.
`data/instructions.jsonl` holds prompts, each with the checks that its reply must pass.
"""

from __future__ import annotations

import json
import re

from scripts.pairs.text import mentions

BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)


def _sentences(text: str) -> int:
    return len(re.findall(r"[.!?]+(?=[\s\"')]|$)", text))


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


# Each kind of check: does `text` do what the instruction asks, given its `value`?
CHECKS = {
    "at_most_words": lambda text, value: 0 < len(text.split()) <= value,
    "at_least_words": lambda text, value: len(text.split()) >= value,
    "sentences": lambda text, value: _sentences(text) == value,
    "bullets": lambda text, value: len(BULLET.findall(text)) == value,
    "lower_case": lambda text, value: text == text.lower() != text.upper(),
    "upper_case": lambda text, value: text == text.upper() != text.lower(),
    "no_commas": lambda text, value: "," not in text,
    "includes": lambda text, value: mentions(text, value),
    "avoids": lambda text, value: not mentions(text, value),
    "starts_with": lambda text, value: text.startswith(value),
    "ends_with": lambda text, value: text.rstrip().endswith(value),
    "in_quotes": lambda text, value: len(text) > 2 and text[0] == text[-1] == '"',
    "json": lambda text, value: _is_json(text),
    "paragraphs": lambda text, value: len(re.split(r"\n\s*\n", text.strip())) == value,
    "one_of": lambda text, value: text.strip().rstrip(".!").lower() in value,
}


def follows(text: str, checks: list[dict]) -> bool:
    """Whether the reply `text` passes all `checks`, each `{"kind": ..., "value": ...}`.

    This is IFEval's strict accuracy of a prompt: all of its instructions, or it does not count. An
    empty reply follows none.

    Raises:
        KeyError: a check is of no known kind.
    """
    text = text.strip()
    return bool(text) and all(CHECKS[c["kind"]](text, c.get("value")) for c in checks)
