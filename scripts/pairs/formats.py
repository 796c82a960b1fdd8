"""Rows of the common preference formats, as TRL's explicit conversational pairs.

`FORMATS` has the columns of each format; `docs/data.md` says which tools and datasets write it. A
`system` (or `system_prompt`) column becomes the system message in every format. Columns that the
format does not read are kept. See https://huggingface.co/docs/trl/dataset_formats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from trl import extract_prompt

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
from scripts.pairs.tokens import IDS

WIDE_END = re.compile("[。？！：]")  # ends a sentence without a space after it
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_\d+>(User|Assistant|System)\n")


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
        return split_talks(*(as_messages(row.get(s), "user", s) for s in ("chosen", "rejected")))
    if not chosen or not rejected:
        raise BadRow("empty", f"{'rejected' if chosen else 'chosen'} is empty")
    size = _prompt_size(chosen, rejected)
    if not chosen[:size].strip():
        raise BadRow("missing", "chosen and rejected begin with no common prompt of whole words")
    return as_pair(
        [{"role": "user", "content": chosen[:size].strip()}],
        [{"role": "assistant", "content": chosen[size:].lstrip()}],
        [{"role": "assistant", "content": rejected[size:].lstrip()}],
    )


def from_hh(row: dict) -> dict[str, Messages]:
    """Anthropic HH: either column is the whole talk, as one string."""
    talks = []
    for side in ("chosen", "rejected"):
        before, *parts = TURN.split(text_of(row.get(side), side))
        if before.strip() or not parts:
            raise BadRow("roles", f"{side} is no transcript that begins with Human: or Assistant:")
        talks.append(
            [
                {"role": "user" if who == "Human" else "assistant", "content": text.strip()}
                for who, text in zip(parts[::2], parts[1::2], strict=True)
            ]
        )
    return split_talks(*talks)


def from_alpaca(row: dict) -> dict[str, Messages]:
    """Alpaca: `output` is chosen, or a list of chosen and rejected."""
    output = row.get("output")
    if isinstance(output, list) and len(output) == 2 and row.get("rejected") is None:
        row = row | {"chosen": output[0], "rejected": output[1]}
    elif row.get("chosen") is None:
        row = row | {"chosen": output}
    answers = (as_messages(row.get(s), "assistant", s) for s in ("chosen", "rejected"))
    return as_pair(asked_in(row, "instruction"), *answers)


def _last_turn(talk: Messages, what: str) -> tuple[Messages, Messages]:
    """A conversation that ends with an answer, as prompt and answer."""
    if len(talk) < 2 or talk[-1]["role"] != "assistant":
        raise BadRow("roles", f"{what} does not end with the assistant's answer")
    return talk[:-1], talk[-1:]


def from_swift(row: dict) -> dict[str, Messages]:
    """ms-swift: the last of `messages` (or `response`) is chosen; the rejected one stands apart."""
    if row.get("messages") is None:
        prompt, chosen = asked_in(row), as_messages(row.get("response"), "assistant", "response")
    else:
        prompt, chosen = _last_turn(as_messages(row["messages"], "user", "messages"), "messages")
    name, value = first_of(row, FORMATS["swift"].rejected)
    rejected = as_messages(value, "assistant", name)
    if len(rejected) > 1:
        return split_talks([*prompt, *chosen], rejected)
    return as_pair(prompt, chosen, rejected)


def from_openai(row: dict) -> dict[str, Any]:
    """OpenAI's preference files: `input` holds `messages` and perhaps `tools`."""
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise BadRow("type", "input is not an object with messages")
    names = ("preferred_output", "non_preferred_output")
    answers = [as_messages(row.get(name), "assistant", name) for name in names]
    pair = as_pair(as_messages(asked.get("messages"), "user", "input.messages"), *answers)
    return pair | ({"tools": _tools(asked["tools"])} if asked.get("tools") else {})


def _scored(row: dict) -> list[tuple[float, Any]]:
    """The answers of a row, each with its score: beside the text, or in a list of its own. A `rank`
    counts from the best."""
    name, answers = first_of(row, FORMATS["scored"].chosen)
    if not isinstance(answers, list):
        raise BadRow("type", f"{name} is not a list but {type(answers).__name__}")
    if answers and all(isinstance(a, dict) for a in answers):
        texts = [first_of(a, "response|text|answer|content|completion|output")[1] for a in answers]
        if all(a.get("rank") is not None for a in answers):
            return [(-number_in(a["rank"], "rank"), t) for a, t in zip(answers, texts, strict=True)]
        names = "score|overall_score|pm_score|reward|rating"
        scores = [first_of(a, names)[1] for a in answers]
        return [(number_in(s, f"a score in {name}"), t) for s, t in zip(scores, texts, strict=True)]
    column, scores = first_of(row, "scores|rewards|ratings")
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise BadRow("type", f"{column} is not a list of one number for each of {name}")
    return [(number_in(s, column), a) for s, a in zip(scores, answers, strict=True)]


def from_scored(row: dict, margin: float = 0.0) -> dict[str, Messages]:
    """Several answers with scores: of the best ones the first is chosen, of the worst ones the
    first is rejected, if their scores are more than `margin` apart. One pair a row: pairs of every
    two would have a prompt with many answers count more than one with two."""
    scored = _scored(row)
    if len(scored) < 2:
        raise BadRow("missing", "there are not two answers to choose between")
    best, worst = max(scored, key=lambda s: s[0]), min(scored, key=lambda s: s[0])
    if best[0] - worst[0] <= margin:
        raise BadRow(
            "equal",
            f"the best score is {best[0]:g}, the worst {worst[0]:g}: not more than {margin:g} "
            "(score_margin) apart",
        )
    answers = (as_messages(answer, "assistant", "an answer") for _, answer in (best, worst))
    return as_pair(asked_in(row), *answers)


# Two answers and the column of the verdict on them. A verdict counts with its own answers only:
# elsewhere 1 may be the number of the second answer, or a strength without a sign.
VERDICTS = (
    ("response_1", "response_2", "preference_strength"),  # HelpSteer2: below 0, the first
    ("response1", "response2", "overall_preference"),  # HelpSteer3, likewise
    ("response_0", "response_1", "better_response_id"),  # PKU-SafeRLHF, whatever is safer
    ("response_a", "response_b", "winner_model_a"),  # Chatbot Arena, 55k: with winner_model_b
    ("response_a", "response_b", "winner"),
    ("conversation_a", "conversation_b", "winner"),  # Chatbot Arena: model_a, model_b, or a tie
    ("human_ref_A", "human_ref_B", "labels"),  # SHP: 1, the first
    ("answer_0", "answer_1", "score_0"),  # WebGPT: with score_1
)
AGAINST = {"winner_model_a": "winner_model_b", "score_0": "score_1"}
WINNERS = {"model_a": 1, "a": 1, "model_b": -1, "b": -1}


def _verdict(row: dict, column: str) -> float:
    """Above 0 where the first answer is better, below where the second is, 0 for a tie."""
    if column == "winner":
        winner = text_of(row[column], column).strip().lower()
        if winner in WINNERS or "tie" in winner or "both" in winner:
            return WINNERS.get(winner, 0)
        raise BadRow("type", f"winner is {row[column]!r}: not model_a, model_b or a tie")
    number = number_in(row[column], column)
    if column in AGAINST:
        return number - number_in(row.get(AGAINST[column]), AGAINST[column])
    return {"better_response_id": 0.5 - number, "labels": number - 0.5}.get(column, -number)


def from_compared(row: dict) -> dict[str, Messages]:
    """Two answers of which one was found better; a tie is no pair."""
    there = (v for v in VERDICTS if all(row.get(name) is not None for name in v))
    if (found := next(there, None)) is None:
        raise BadRow("missing", "there are not two answers and a verdict that belongs to them")
    *names, column = found
    better = _verdict(row, column)
    if better == 0:
        raise BadRow("equal", "the two answers were found equally good")
    names = names if better > 0 else names[::-1]
    if column in ("winner_model_a", "winner"):
        asked, *said = (_texts(row.get(name)) for name in ("prompt", *names))
        if asked and all(len(texts) == len(asked) for texts in said):
            return split_talks(
                *(by_turns(list(zip(asked, t, strict=True)), "a turn") for t in said)
            )
    answers = [as_messages(row[name], "assistant", name) for name in names]
    if names[0].startswith("conversation"):
        return split_talks(*answers)
    return as_pair(_compared_prompt(row), *answers)


def _texts(value: Any) -> list:
    """What was said by turns, a list of texts or such a list as JSON text; else nothing."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return []
    return value if isinstance(value, list) and not any(isinstance(t, dict) for t in value) else []


def _compared_prompt(row: dict) -> Messages:
    """The prompt, whatever its column is called; `context` or `history` where nothing else is."""
    if all(row.get(name) is None for name in PROMPTS.split("|")):
        column, value = first_of(row, "context|history")
        return as_messages(value, "user", column)
    if row.get("context"):
        raise BadRow("type", "there is a context beside the prompt: put both into one column")
    name, value = first_of(row, PROMPTS)
    if isinstance(value, dict) and "full_text" in value:  # WebGPT's question
        value = value["full_text"]
    if isinstance(value, str) and len(parts := HELPSTEER_TURN.split(value)) > 1:
        roles = ["user", *(who.lower() for who in parts[1::2])]
        turns = zip(roles, parts[::2], strict=True)
        return [{"role": role, "content": text.strip()} for role, text in turns]
    return asked_in(row | {name: value})


class Format(NamedTuple):
    """A format by its columns, each the first that a row has of names parted by `|`: the prompt (if
    it is not in the answers), the answers, and what else is read; and the function that reads a row
    that is not simply one column each."""

    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    further: str = ""
    convert: Callable[[dict], dict[str, Any]] | None = None

    @property
    def needed(self) -> list[str]:
        """The columns that tell this format."""
        return [names for names in self[:3] if names]

    def reads(self) -> set[str]:
        """All columns that this format reads; `system` is read in every one."""
        return {"system", "system_prompt", *"|".join(self[:4]).split("|")}

    def read(self, row: dict) -> dict[str, Any]:
        """The pair in `row`; a `BadRow` if it has none."""
        if self.convert:
            return self.convert(row)
        asked = asked_in({k: row.get(k) for k in self.reads()}, self.prompt) if self.prompt else []
        found = (first_of(row, names) for names in (self.chosen, self.rejected))
        answers = [as_messages(value, "assistant", name) for name, value in found]
        return as_pair(asked, *answers) if self.prompt else split_talks(*answers)


TALK = "input|history"  # what `asked_in` reads besides the prompt
FIRST, SECOND, BETTER = ("|".join(dict.fromkeys(n)) for n in zip(*VERDICTS, strict=True))

# The first that fits is taken.
FORMATS: dict[str, Format] = {
    "explicit": Format("prompt", "chosen", "rejected"),
    "orca": Format("question", "chosen", "rejected"),
    "sharegpt": Format("conversations", "chosen", "rejected"),
    "messages": Format("messages", "chosen", "rejected"),
    "responses": Format(
        PROMPTS,
        chosen="chosen_response|response_chosen",
        rejected="rejected_response|response_rejected",
        further=TALK,
    ),
    "llamafactory": Format(chosen="chosen_messages", rejected="rejected_messages"),
    "swift": Format(
        "messages|query",
        rejected="rejected_response|rejected_messages|rejected",
        further=f"response|{TALK}",
        convert=from_swift,
    ),
    "openai": Format("input", "preferred_output", "non_preferred_output", convert=from_openai),
    "stackexchange": Format("question", "response_j", "response_k"),
    "compared": Format(
        FIRST,
        SECOND,
        BETTER,
        further=f"winner_model_b|winner_tie|score_1|{PROMPTS}|context|{TALK}",
        convert=from_compared,
    ),
    "scored": Format(
        PROMPTS,
        chosen="completions|answers|responses|candidates|outputs",
        further=f"scores|rewards|ratings|{TALK}",
        convert=from_scored,
    ),
    "alpaca": Format("instruction", "chosen|output", "rejected|output", TALK, from_alpaca),
    "hh": Format(chosen="chosen", rejected="rejected", convert=from_hh),
    "implicit": Format(chosen="chosen", rejected="rejected", convert=from_implicit),
}

# Formats that are told by what the rows hold, too: other data has answers and labels as well.
HOLDS = {"swift": from_swift, "compared": from_compared, "scored": from_scored}


def fits(name: str, columns: set[str]) -> bool:
    """Whether `columns` has all that the format `name` needs."""
    return all(columns & set(names.split("|")) for names in FORMATS[name].needed)


def detect(columns: set[str], sample: list[dict]) -> str | None:
    """The name of the format that `columns` and the first rows fit, or None.

    `hh` and `implicit` have the same columns: it is `hh` if most texts are transcripts.
    """
    fitting = (name for name in FORMATS if fits(name, columns))
    name = next((n for n in fitting if n not in HOLDS or _holds(n, columns, sample)), None)
    if name != "hh":
        return name
    texts = [t for row in sample for t in (row.get("chosen"), row.get("rejected"))]
    if 2 * sum(isinstance(t, str) and bool(TURN.match(t)) for t in texts) > len(texts):
        return "hh"
    # Where a column of another name may hold the prompt, the words that the answers begin with
    # alike are one only if nearly all of them do.
    others = columns - {"chosen", "rejected", "system", "system_prompt"}
    if any(isinstance(row.get(name), str) for row in sample for name in others):
        texts = [row for row in sample if row.get("chosen") and row.get("rejected")]
        if sum(_readable(from_implicit, row) for row in texts) < 0.9 * len(texts):
            return None
    return "implicit"


def _holds(name: str, columns: set[str], sample: list[dict]) -> bool:
    """Whether a row can be read so, and no other column has the answer."""
    if name == "swift" and columns & {"rejected_response", "rejected_messages"}:
        return True
    others = {"chosen", "output"} if name == "swift" else {"chosen", "rejected"}
    return not columns & others and any(_readable(HOLDS[name], row) for row in sample)


def _readable(read: Callable[[dict], Any], row: dict) -> bool:
    try:
        read(row)
    except BadRow as error:
        return error.kind == "equal"
    return True


def to_pair(row: dict, name: str, margin: float = 0.0) -> dict[str, Messages]:
    """`prompt`, `chosen` and `rejected` of a row of the format `name`, as messages; of `scored`
    answers those whose scores are more than `margin` apart.

    Raises:
        BadRow: the row lacks something, or holds something other than text.
    """
    pair = from_scored(row, margin) if name == "scored" else FORMATS[name].read(row)
    first = pair["prompt"][0] if pair["prompt"] else {}
    if first.get("role") == "system" and not first["content"].strip():
        pair["prompt"] = pair["prompt"][1:]  # the template would spend tokens on saying nothing
    system = text_of(row.get("system") or row.get("system_prompt") or "", "system")
    if system.strip() and not any(message["role"] == "system" for message in pair["prompt"]):
        pair["prompt"] = [{"role": "system", "content": system}, *pair["prompt"]]
    return pair


def further_columns(row: dict, name: str) -> dict[str, Any]:
    """The columns of `row` that the format `name` does not read, such that TRL's trainer takes
    them. It takes even an empty `images` for the sign of a vision dataset, and `prompt_ids` or
    `ref_chosen_logps` for what its own tokenizer and reference gave.

    Raises:
        BadRow: the row has images, or its `tools` or `chat_template_kwargs` cannot be used.
    """
    left_out = FORMATS[name].reads() | {*IDS, "ref_chosen_logps", "ref_rejected_logps"}
    kept = {k: v for k, v in row.items() if k not in left_out}
    for column in ("image", "images"):
        if kept.pop(column, None):
            raise BadRow("type", f"{column} holds an image; the recipe trains on text alone")
    if "tools" in kept:
        kept["tools"] = _tools(kept["tools"])
    if "chat_template_kwargs" in kept:
        kept["chat_template_kwargs"] = kept["chat_template_kwargs"] or {}
        if not isinstance(kept["chat_template_kwargs"], dict):
            raise BadRow("type", "chat_template_kwargs is not an object of options")
    return kept


def _tools(tools: Any) -> str | None:
    """Tools as JSON, the form in which schemas of any shape fit into one column; none as None."""
    try:
        if isinstance(tools, str):
            tools = json.loads(tools.strip() or "null")
        functions = [tool.get("function") or tool for tool in tools or ()]
        if all(isinstance(function.get("name") or "", str) for function in functions):
            return json.dumps(tools, ensure_ascii=False) if functions else None
    except (ValueError, TypeError, AttributeError):
        pass
    raise BadRow("type", "tools is not a list of JSON schemas")
