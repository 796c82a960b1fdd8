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


def as_messages(value: Any, role: str, what: str) -> Messages:
    """`value` as messages: text becomes one message of `role`, one message a list of it."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or (value and not any(isinstance(m, dict) for m in value)):
        return [{"role": role, "content": text_of(value, what)}]
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise BadRow("type", f"{what} has {message!r:.40} among its messages")
        speaker = message.get("role", message.get("from"))
        if not isinstance(speaker, str):
            raise BadRow("roles", f"{what} has a message without a role")
        speaker = speaker.strip().lower()
        content = message.get("content", message.get("value"))
        kept = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        calls = message.get("tool_calls") or message.get("function_call")  # OpenAI's older files
        if speaker == "function_call":  # ShareGPT
            calls, content = content, ""
        if calls:
            kept["tool_calls"], content = _tool_calls(calls, what), content or ""
        content = text_of(content, f"{what}'s content")
        messages.append({"role": ROLES.get(speaker, speaker), "content": content} | kept)
    return messages


def _tool_calls(calls: Any, what: str) -> list[dict]:
    """Tool calls as chat templates read them: `{"type", "function": {"name", "arguments"}}`, the
    arguments as an object. JSON text and a call without its wrapping do."""
    try:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        made = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = call.get("function") or call
            name, arguments = function["name"], function.get("arguments") or {}
            if not isinstance(name, str):
                raise TypeError
            about = {"name": name}
            about["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
            identity = {"id": call["id"]} if call.get("id") else {}
            made.append(identity | {"type": "function", "function": about})
    except (ValueError, TypeError, AttributeError, KeyError):
        raise BadRow(
            "type", f"{what}: its tool calls are not a list of names and arguments"
        ) from None
    return made


def as_pair(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """A pair. The answers may be whole conversations, and the prompt may end with the chosen."""
    if all(len(a) > 1 and a[0]["role"] in ("system", "user") for a in (chosen, rejected)):
        return split_talks(chosen, rejected)
    prompt = prompt[:-1] if prompt[-1:] == chosen[-1:] else prompt
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def split_talks(chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """The pair in two whole conversations: the prompt is the turns that they begin with alike."""
    if min(len(chosen), len(rejected)) < 2:
        raise BadRow("roles", "the answers hold no prompt, and there is no prompt column")
    pair = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not pair["prompt"]:
        raise BadRow("roles", "chosen and rejected are conversations that begin differently")
    return {side: pair[side] for side in ("prompt", "chosen", "rejected")}


def first_of(row: dict, names: str) -> tuple[str, Any]:
    """The first of the columns `names` (parted by `|`) that is not null, with its value."""
    for name in names.split("|"):
        if row.get(name) is not None:
            return name, row[name]
    raise BadRow("missing", f"{names.replace('|', ' or ')} is missing or null")


def number_in(value: Any, what: str) -> float:
    """`value` as a finite number; anything else is a `BadRow`."""
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


def asked_in(row: dict, names: str = PROMPTS) -> Messages:
    """The prompt in one of the columns `names`. To a text belong the `input`, which goes below it,
    and the `history`: earlier turns, as pairs of question and answer or as messages."""
    name, value = first_of(row, names)
    if not isinstance(value, str):
        return as_messages(value, "user", name)
    if row.get("input"):
        value = f"{value}\n\n{text_of(row['input'], 'input')}"
    earlier = row.get("history") or []
    try:
        if earlier and isinstance(earlier[0], dict):
            earlier = as_messages(earlier, "user", "history")
        else:
            earlier = by_turns(earlier, "history")
    except (TypeError, ValueError, KeyError):
        raise BadRow("type", "history is not a list of messages or of pairs of texts") from None
    return [*earlier, {"role": "user", "content": value}]
