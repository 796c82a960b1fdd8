"""Rows of the common preference formats, as TRL's explicit conversational pairs.

| format | columns | a row |
| --- | --- | --- |
| `explicit` | `prompt`, `chosen`, `rejected` | text or messages; whole conversations in the answers too (UltraFeedback) |
| `implicit` | `chosen`, `rejected` | both hold the whole conversation, or the prompt's text and the answer's |
| `hh` | `chosen`, `rejected` | transcripts, `\\n\\nHuman: … \\n\\nAssistant: …` (Anthropic HH) |
| `orca` | `question`, `chosen`, `rejected` | Intel/orca_dpo_pairs |
| `alpaca` | `instruction`, `chosen` or `output`, `rejected` | with `input` and `history` where there are any |
| `sharegpt` | `conversations`, `chosen`, `rejected` | messages as `from` and `value` |

A `system` column becomes the system message in every format. Columns that the format does not read
outlive it. See https://huggingface.co/docs/trl/dataset_formats.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from trl import extract_prompt

Messages = list[dict[str, str]]

ROLES = {
    "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip
WIDE_END = re.compile("[。？！：]")  # ends a sentence without a space after it
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


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
        value = "".join(text_of(part.get("text"), what) for part in value)
    if value is None:
        raise BadRow("missing", f"{what} is missing or null")
    if not isinstance(value, str):
        raise BadRow("type", f"{what} is not text but {type(value).__name__}")
    return value


def as_messages(value: Any, role: str, what: str) -> Messages:
    """`value` as messages: text becomes one message of `role`, one message a list of it."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or (value and not all(isinstance(m, dict) for m in value)):
        return [{"role": role, "content": text_of(value, what)}]
    messages = []
    for message in value:
        speaker = message.get("role", message.get("from"))
        if not isinstance(speaker, str):
            raise BadRow("roles", f"{what} has a message without a role")
        content = message.get("content", message.get("value"))
        kept = {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
        if calls := content if speaker == "function_call" else message.get("tool_calls"):
            kept["tool_calls"] = _tool_calls(calls, what)
            content = "" if speaker == "function_call" else content or ""
        content = text_of(content, f"{what}'s content")
        messages.append({"role": ROLES.get(speaker, speaker), "content": content} | kept)
    return messages


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


def _pair(prompt: Messages, chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _answers(row: dict) -> tuple[Messages, Messages]:
    chosen, rejected = (
        as_messages(row.get(side), "assistant", side) for side in ("chosen", "rejected")
    )
    return chosen, rejected


def _split(chosen: Messages, rejected: Messages) -> dict[str, Messages]:
    """The pair in two whole conversations: the prompt is the turns that they begin with alike."""
    if min(len(chosen), len(rejected)) < 2:
        raise BadRow("roles", "the answers hold no prompt, and there is no prompt column")
    pair = extract_prompt({"chosen": chosen, "rejected": rejected})
    return _pair(pair["prompt"], pair["chosen"], pair["rejected"])


def from_explicit(row: dict) -> dict[str, Messages]:
    """TRL's explicit prompt. Answers that repeat the prompt's turns hold the conversation."""
    chosen, rejected = _answers(row)
    if all(len(a) > 1 and a[0]["role"] in ("system", "user") for a in (chosen, rejected)):
        return _split(chosen, rejected)
    return _pair(as_messages(row.get("prompt"), "user", "prompt"), chosen, rejected)


def _prompt_size(chosen: str, rejected: str) -> int:
    """How many characters of two texts are their common prompt, or 0.

    What they begin with alike is cut back to the last line break or end of a sentence, as two
    answers may begin with the same words; where there is none, to the end of a word.
    """
    common = len(extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"])

    def between_words(at: int) -> bool:
        after = {text[at : at + 1] for text in (chosen, rejected)}
        return chosen[at - 1].isspace() or all(not c or c.isspace() for c in after)

    cuts = [at for at in range(1, common + 1) if between_words(at)]
    sentences = [at for at in cuts if chosen[at - 1] in "\n.?!:"]
    sentences += [m.end() for m in WIDE_END.finditer(chosen, 0, common)]
    return max(sentences or cuts, default=0)


def from_implicit(row: dict) -> dict[str, Messages]:
    """TRL's implicit prompt: what `chosen` and `rejected` begin with alike (`_prompt_size`)."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return _split(*_answers(row))
    if not chosen or not rejected:
        raise BadRow("empty", f"{'rejected' if chosen else 'chosen'} is empty")
    size = _prompt_size(chosen, rejected)
    if not chosen[:size].strip():
        raise BadRow("missing", "chosen and rejected begin with no common prompt of whole words")
    return _pair(
        [{"role": "user", "content": chosen[:size].strip()}],
        [{"role": "assistant", "content": chosen[size:].lstrip()}],
        [{"role": "assistant", "content": rejected[size:].lstrip()}],
    )


def _turns(transcript: Any, what: str) -> Messages:
    before, *parts = TURN.split(text_of(transcript, what))
    if before.strip() or not parts:
        raise BadRow("roles", f"{what} is no transcript that begins with Human: or Assistant:")
    role = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": role[who], "content": text.strip()}
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def from_hh(row: dict) -> dict[str, Messages]:
    """Anthropic HH: either column is the whole talk, as one string."""
    return _split(_turns(row.get("chosen"), "chosen"), _turns(row.get("rejected"), "rejected"))


def from_orca(row: dict) -> dict[str, Messages]:
    """Intel/orca_dpo_pairs: `system` (often empty), `question`, `chosen`, `rejected`."""
    return _pair(as_messages(row.get("question"), "user", "question"), *_answers(row))


def from_sharegpt(row: dict) -> dict[str, Messages]:
    """`conversations` as `{"from", "value"}`, and an answer of that shape in either column."""
    return _pair(as_messages(row.get("conversations"), "user", "conversations"), *_answers(row))


def from_alpaca(row: dict) -> dict[str, Messages]:
    """Alpaca: `instruction`, perhaps `input` and earlier turns in `history`; `output` is chosen,
    or a list of chosen and rejected."""
    output = row.get("output")
    if isinstance(output, list) and len(output) == 2 and row.get("rejected") is None:
        row = row | {"chosen": output[0], "rejected": output[1]}
    elif row.get("chosen") is None:
        row = row | {"chosen": output}
    earlier = [
        {"role": role, "content": text_of(text, "history")}
        for exchange in row.get("history") or []
        for role, text in zip(("user", "assistant"), exchange, strict=False)
    ]
    question = text_of(row.get("instruction"), "instruction")
    if row.get("input"):
        question = f"{question}\n\n{text_of(row['input'], 'input')}"
    return _pair([*earlier, {"role": "user", "content": question}], *_answers(row))


class Format(NamedTuple):
    """A format: the columns that tell it (`|`: either will do), how one of its rows becomes
    messages, and what it reads where it is there."""

    needed: tuple[str, ...]
    convert: Callable[[dict], dict[str, Messages]]
    optional: tuple[str, ...] = ()

    def reads(self) -> set[str]:
        """All columns that this format reads; `system` is read in every one."""
        return {"system", *self.optional, *"|".join(self.needed).split("|")}


FORMATS: dict[str, Format] = {
    "explicit": Format(("prompt", "chosen", "rejected"), from_explicit),
    "orca": Format(("question", "chosen", "rejected"), from_orca),
    "sharegpt": Format(("conversations", "chosen", "rejected"), from_sharegpt),
    "alpaca": Format(
        ("instruction", "chosen|output", "rejected|output"), from_alpaca, ("input", "history")
    ),
    "hh": Format(("chosen", "rejected"), from_hh),
    "implicit": Format(("chosen", "rejected"), from_implicit),
}


def fits(name: str, columns: set[str]) -> bool:
    """Whether `columns` has all that the format `name` needs."""
    return all(columns & set(needed.split("|")) for needed in FORMATS[name].needed)


def detect(columns: set[str], sample: list[dict]) -> str | None:
    """The name of the format that `columns` and the first rows fit, or None.

    `hh` and `implicit` have the same columns: it is `hh` if most texts are transcripts.
    """
    names = [name for name in FORMATS if fits(name, columns)]
    if names and names[0] == "hh":
        texts = [t for row in sample for t in (row.get("chosen"), row.get("rejected"))]
        spoken = [isinstance(t, str) and bool(TURN.match(t)) for t in texts]
        return "hh" if 2 * sum(spoken) > len(spoken) else "implicit"
    return names[0] if names else None


def to_pair(row: dict, name: str) -> dict[str, Messages]:
    """`prompt`, `chosen` and `rejected` of a row of the format `name`, as messages.

    Raises:
        BadRow: the row lacks something, or holds something other than text.
    """
    pair = FORMATS[name].convert(row)
    first = pair["prompt"][0] if pair["prompt"] else {}
    if first.get("role") == "system" and not first["content"].strip():
        pair["prompt"] = pair["prompt"][1:]  # the template would spend tokens on saying nothing
    system = text_of(row.get("system") or "", "system")
    if system.strip() and not any(message["role"] == "system" for message in pair["prompt"]):
        pair["prompt"] = [{"role": "system", "content": system}, *pair["prompt"]]
    return pair


def further_columns(row: dict, name: str) -> dict[str, Any]:
    """The columns of `row` that the format `name` does not read, such that TRL's trainer takes
    them: it reads `tools` and `chat_template_kwargs`, and takes `image` or `images`, even empty
    ones, for the sign of a vision dataset.

    Raises:
        BadRow: the row has images, or its `tools` or `chat_template_kwargs` cannot be used.
    """
    kept = {k: v for k, v in row.items() if k not in FORMATS[name].reads()}
    for column in ("image", "images"):
        if kept.pop(column, None):
            raise BadRow("type", f"{column} holds an image; the recipe trains on text alone")
    if "tools" in kept:
        kept["tools"] = _tools(kept["tools"])
    if "chat_template_kwargs" in kept:
        options = kept["chat_template_kwargs"]
        if not isinstance(options or {}, dict):
            raise BadRow("type", "chat_template_kwargs is not an object of options")
        kept["chat_template_kwargs"] = options or {}
    return kept


def _tools(tools: Any) -> str | None:
    """Tools as JSON, the form in which schemas of any shape fit into one column; none as None."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow("type", f"tools is text that is not JSON: {error}") from None
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("type", "tools is not a list of JSON schemas")
    return json.dumps(tools, ensure_ascii=False)
