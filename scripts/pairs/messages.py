"""Messages out of what a row holds: text, one message, a list of them, in any tool's spelling."""

from __future__ import annotations

import json
import math
from typing import Any

from trl import extract_prompt

Messages = list[dict[str, str]]

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "prompter": "user",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip

# What other tools call the prompt of a row, and where they put a conversation.
PROMPTS = "instruction|prompt|question|query|messages|conversations"


class BadRow(Exception):
    """A row that cannot be read as a pair: the kind of its fault (a key of `checks.KINDS`), and the
    fault in words."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind, self.detail = kind, detail


def text_of(value: Any, what: str) -> str:
    """`value` if it is text, also from a list of text parts; anything else is a `BadRow`."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if any(part.get("type", "text") != "text" for part in value):
            raise BadRow("type", f"{what} has a part that is not text")
        value = "".join(text_of(part.get("text", part.get("value")), what) for part in value)
    if value is None:
        raise BadRow("missing", f"{what} is missing or null")
    if not isinstance(value, str):
        raise BadRow("type", f"{what} is not text but {type(value).__name__}")
    return value


def _name(value: Any) -> str:
    """What a value is called in a finding."""
    return "null" if value is None else type(value).__name__


def as_messages(value: Any, role: str, what: str) -> Messages:
    """`value` as messages: text becomes one message of `role`, one message a list of it."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or (value and not any(isinstance(m, dict) for m in value)):
        return [{"role": role, "content": text_of(value, what)}]
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise BadRow("type", f"{what} has {_name(message)} among its messages")
        speaker = message.get("role", message.get("from"))
        if not isinstance(speaker, str):
            raise BadRow("roles", f"{what} has a message without a role")
        speaker = speaker.strip().lower()
        content = message.get("content", message.get("value"))
        kept = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        if calls := content if speaker == "function_call" else _calls_of(message):
            kept["tool_calls"] = _tool_calls(calls, what)
            content = "" if speaker == "function_call" else content or ""
        content = text_of(content, f"{what}'s content")
        messages.append({"role": ROLES.get(speaker, speaker), "content": content} | kept)
    return messages


def _calls_of(message: dict) -> Any:
    """The tool calls of a message, also the single one that OpenAI's older files have."""
    return message.get("tool_calls") or message.get("function_call")


def _tool_calls(calls: Any, what: str) -> list[dict]:
    """The tool calls of a message as chat templates read them: `{"type", "function": {"name",
    "arguments"}}`, the arguments as an object. JSON text and a call without its wrapping do."""
    wrong = BadRow("type", f"{what} has tool calls that are no list of name and arguments")
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        made = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = dict(call.get("function") or call)
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
            if not isinstance(function.get("name"), str):
                raise wrong
            about = {"name": function["name"], "arguments": function.get("arguments") or {}}
            made.append({k: call[k] for k in ("id",) if call.get(k)} | {"type": "function",
                         "function": about})  # fmt: skip
    except (ValueError, TypeError, AttributeError):
        raise wrong from None
    return made


def as_pair(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def split_talks(chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """The pair in two whole conversations: the prompt is the turns that they begin with alike."""
    if min(len(chosen), len(rejected)) < 2:
        raise BadRow("roles", "the answers hold no prompt, and there is no prompt column")
    pair = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not pair["prompt"]:
        raise BadRow("roles", "chosen and rejected are conversations that begin differently")
    return as_pair(pair["prompt"], pair["chosen"], pair["rejected"])


def first_of(row: dict, names: str) -> tuple[str, Any]:
    """The first of the columns `names` that is not null, with its value."""
    found = [name for name in names.split("|") if row.get(name) is not None]
    if not found:
        raise BadRow("missing", f"{names.replace('|', ' or ')} is missing or null")
    return found[0], row[found[0]]


def number_in(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise BadRow("type", f"{what} is not a number but {value!r}")
    return number


def by_turns(pairs: list, what: str) -> Messages:
    """Pairs of what the user and what the assistant said, as messages."""
    return [
        {"role": role, "content": text_of(text, what)}
        for turn in pairs
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _history(earlier: Any) -> Messages:
    """Earlier turns: pairs of question and answer, or messages."""
    if isinstance(earlier, list) and all(isinstance(turn, dict) for turn in earlier):
        return as_messages(earlier, "user", "history") if earlier else []
    if not isinstance(earlier, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 for turn in earlier
    ):
        raise BadRow("type", "history is not a list of pairs, question and answer, or of messages")
    return by_turns(earlier, "history")


def question_in(row: dict, text: Any) -> Messages:
    """Alpaca's prompt: earlier turns in `history`, and `text` with an `input` under it."""
    question = text_of(text, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text_of(row['input'], 'input')}"
    return [*_history(row.get("history") or []), {"role": "user", "content": question}]


def asked_in(row: dict) -> Messages:
    """The prompt of a row, whatever its column is called, with `input` and `history`."""
    name, value = first_of(row, PROMPTS)
    if isinstance(value, str):
        return question_in(row, value)
    return as_messages(value, "user", name)
