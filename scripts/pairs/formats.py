"""Rows of the common preference formats, as TRL's explicit conversational pairs.

`FORMATS` has the columns that tell each format, and the function that reads a row of it;
`docs/data.md` says which tools and datasets write it. A `system` (or `system_prompt`) column
becomes the system message in every format. Columns that the format does not read are kept. See
https://huggingface.co/docs/trl/dataset_formats.
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
    question_in,
    split_talks,
    text_of,
)
from scripts.pairs.tokens import IDS

Convert = Callable[[dict], dict[str, Any]]  # a row to its prompt, chosen and rejected

WIDE_END = re.compile("[。？！：]")  # ends a sentence without a space after it
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
HELPSTEER_TURN = re.compile(r"\n?<extra_id_\d+>(User|Assistant|System)\n")


def from_columns(
    prompt: str, chosen: str = "chosen", rejected: str = "rejected", history: bool = False
) -> Convert:
    """A format with a column each for the prompt and the answers; of names parted by `|`, the first
    that a row has. With `history`, the columns `history` and `input` are read too.

    Answers may repeat the prompt's turns, and the prompt may end with the chosen answer.
    """

    def convert(row: dict) -> dict[str, Messages]:
        name, value = first_of(row, prompt)
        found = (first_of(row, names) for names in (chosen, rejected))
        answers = [as_messages(answer, "assistant", column) for column, answer in found]
        if all(len(a) > 1 and a[0]["role"] in ("system", "user") for a in answers):
            return split_talks(*answers)
        asked = asked_in(row) if history else as_messages(value, "user", name)
        return as_pair(asked[:-1] if asked[-1:] == answers[0][-1:] else asked, *answers)

    return convert


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
        return from_talks("chosen", "rejected")(row)
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


def from_talks(chosen: str, rejected: str) -> Convert:
    """A format with two whole conversations."""
    return lambda row: split_talks(
        *(as_messages(row.get(name), "user", name) for name in (chosen, rejected))
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
    return split_talks(_turns(row.get("chosen"), "chosen"), _turns(row.get("rejected"), "rejected"))


def from_alpaca(row: dict) -> dict[str, Messages]:
    """Alpaca: `instruction`, perhaps `input` and earlier turns in `history`; `output` is chosen,
    or a list of chosen and rejected."""
    output = row.get("output")
    if isinstance(output, list) and len(output) == 2 and row.get("rejected") is None:
        row = row | {"chosen": output[0], "rejected": output[1]}
    elif row.get("chosen") is None:
        row = row | {"chosen": output}
    prompt = question_in(row, row.get("instruction"))
    answers = (as_messages(row.get(c), "assistant", c) for c in ("chosen", "rejected"))
    return as_pair(prompt, *answers)


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
        talk = as_messages(row["messages"], "user", "messages")
        prompt, chosen = _last_turn(talk, "messages")
    name, value = first_of(row, "rejected_response|rejected_messages|rejected")
    rejected = as_messages(value, "assistant", name)
    if len(rejected) > 1:
        return split_talks([*prompt, *chosen], rejected)
    return as_pair(prompt, chosen, rejected)


def from_openai(row: dict) -> dict[str, Any]:
    """OpenAI's preference files: `input` holds `messages` and perhaps `tools`."""
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise BadRow("type", "input is not an object with messages")
    outputs = [
        as_messages(row.get(name), "assistant", name)
        for name in ("preferred_output", "non_preferred_output")
    ]
    pair = as_pair(as_messages(asked.get("messages"), "user", "input.messages"), *outputs)
    return pair | ({"tools": _tools(asked["tools"])} if asked.get("tools") else {})


CANDIDATES = "completions|answers|responses|candidates|outputs"
ANSWER_TEXTS = "response|text|answer|content|completion|output"
SCORES = "score|overall_score|pm_score|reward|rating"


def _scored(row: dict) -> list[tuple[float, Any]]:
    """The answers of a row, each with its score: beside the text, or in a list of its own. A `rank`
    counts from the best."""
    name, answers = first_of(row, CANDIDATES)
    if not isinstance(answers, list):
        raise BadRow("type", f"{name} is not a list but {type(answers).__name__}")
    if answers and all(isinstance(a, dict) for a in answers):
        ranks = [-number_in(a["rank"], "rank") for a in answers if a.get("rank") is not None]
        if len(ranks) < len(answers):
            ranks = [number_in(first_of(a, SCORES)[1], f"a score in {name}") for a in answers]
        return list(zip(ranks, (first_of(a, ANSWER_TEXTS)[1] for a in answers), strict=True))
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
    if column in ("better_response_id", "labels"):
        if number not in (0, 1):
            raise BadRow("type", f"{column} is {row[column]!r}, neither 0 nor 1")
        return number - 0.5 if column == "labels" else 0.5 - number
    return -number


def from_compared(row: dict) -> dict[str, Messages]:
    """Two answers of which one was found better; a tie is no pair."""
    there = (v for v in VERDICTS if all(row.get(name) is not None for name in v))
    if (found := next(there, None)) is None:
        raise BadRow("missing", "there are not two answers and a verdict that belongs to them")
    *names, column = found
    better = _verdict(row, column)
    if better == 0:
        raise BadRow("equal", "the two answers were found equally good")
    chosen, rejected = names if better > 0 else reversed(names)
    if chosen.startswith("conversation"):
        return from_talks(chosen, rejected)(row)
    if chosen in ("response_a", "response_b"):
        talks = [_by_turns(row.get("prompt"), row[name], name) for name in (chosen, rejected)]
        if all(talks):
            return split_talks(*talks)
    answers = (as_messages(row[name], "assistant", name) for name in (chosen, rejected))
    return as_pair(_compared_prompt(row), *answers)


def _by_turns(prompts: Any, answers: Any, what: str) -> Messages:
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


def _compared_prompt(row: dict) -> Messages:
    """The prompt, whatever its column is called; `context` or `history` where nothing else is."""
    if any(row.get(name) is not None for name in PROMPTS.split("|")):
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
    column, value = first_of(row, "context|history")
    return as_messages(value, "user", column)


LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LABELS |= {"-1": False, "-1.0": False}


def judged(row: dict) -> tuple[Messages, Messages, bool]:
    """The prompt, the answer and the label of a row of unpaired data."""
    name, label = first_of(row, "label|kto_tag")
    good = LABELS.get(str(label).strip().lower())
    if good is None:
        raise BadRow("type", f"{name} is {label!r}, neither true nor false")
    answers = "completion|response|output|answer"
    if any(row.get(column) is not None for column in answers.split("|")):
        column, answer = first_of(row, answers)
        return asked_in(row), as_messages(answer, "assistant", column), good
    return *_last_turn(asked_in(row), first_of(row, PROMPTS)[0]), good


def from_unpaired(row: dict) -> dict[str, Messages]:
    """KTO's rows, once `load.pair_up` has put two with the same prompt together."""
    for side, kind in (("chosen", "good"), ("rejected", "bad")):
        if side not in row:
            judged(row)  # which says what is wrong with the row by itself
            raise BadRow("missing", f"no answer labelled {kind} is left for the same prompt")
    return from_columns("prompt")(row)


class Format(NamedTuple):
    """A format: the columns that tell it (`|`: either will do), how one of its rows becomes
    messages, and what it reads where it is there."""

    needed: tuple[str, ...]
    convert: Convert
    optional: tuple[str, ...] = ()

    def reads(self) -> set[str]:
        """All columns that this format reads; `system` is read in every one."""
        return {"system", "system_prompt", *self.optional, *"|".join(self.needed).split("|")}


TALK = ("input", "history")  # what `asked_in` reads besides the prompt


# What other tools call an answer.
CHOSEN, REJECTED = "chosen_response|response_chosen", "rejected_response|response_rejected"

# The first that fits is taken.
FORMATS: dict[str, Format] = {
    "explicit": Format(("prompt", "chosen", "rejected"), from_columns("prompt")),
    "orca": Format(("question", "chosen", "rejected"), from_columns("question")),
    "sharegpt": Format(("conversations", "chosen", "rejected"), from_columns("conversations")),
    "messages": Format(("messages", "chosen", "rejected"), from_columns("messages")),
    "responses": Format(
        (PROMPTS, CHOSEN, REJECTED), from_columns(PROMPTS, CHOSEN, REJECTED, history=True), TALK
    ),
    "llamafactory": Format(
        ("chosen_messages", "rejected_messages"), from_talks("chosen_messages", "rejected_messages")
    ),
    "swift": Format(
        ("messages|query", "rejected_response|rejected_messages|rejected"),
        from_swift,
        ("response", *TALK),
    ),
    "openai": Format(("input", "preferred_output", "non_preferred_output"), from_openai),
    "stackexchange": Format(
        ("question", "response_j", "response_k"),
        from_columns("question", "response_j", "response_k"),
    ),
    "compared": Format(
        tuple("|".join(dict.fromkeys(names)) for names in zip(*VERDICTS, strict=True)),
        from_compared,
        ("winner_model_b", "winner_tie", "score_1", *PROMPTS.split("|"), "context", *TALK),
    ),
    "scored": Format((PROMPTS, CANDIDATES), from_scored, ("scores", "rewards", "ratings", *TALK)),
    "unpaired": Format(
        (PROMPTS, "label|kto_tag"),
        from_unpaired,
        ("chosen", "rejected", "completion", "response", "output", "answer", *TALK),
    ),
    "alpaca": Format(("instruction", "chosen|output", "rejected|output"), from_alpaca, TALK),
    "hh": Format(("chosen", "rejected"), from_hh),
    "implicit": Format(("chosen", "rejected"), from_implicit),
}


def fits(name: str, columns: set[str]) -> bool:
    """Whether `columns` has all that the format `name` needs."""
    return all(columns & set(needed.split("|")) for needed in FORMATS[name].needed)


def detect(columns: set[str], sample: list[dict]) -> str | None:
    """The name of the format that `columns` and the first rows fit, or None.

    `hh` and `implicit` have the same columns: it is `hh` if most texts are transcripts. `swift`,
    `compared`, `scored` and `unpaired` are told by what the rows hold, too: other data has answers
    and labels as well.
    """
    names = [
        name
        for name in FORMATS
        if fits(name, columns) and (name not in HOLDS or _holds(name, columns, sample))
    ]
    if names and names[0] == "hh":
        texts = [t for row in sample for t in (row.get("chosen"), row.get("rejected"))]
        spoken = [isinstance(t, str) and bool(TURN.match(t)) for t in texts]
        if 2 * sum(spoken) > len(spoken):
            return "hh"
        return "implicit" if _begin_alike(columns, sample) else None
    return names[0] if names else None


def _begin_alike(columns: set[str], sample: list[dict]) -> bool:
    """Whether nearly all answers begin with a prompt, where another column may hold it: one of a
    name that no format has would be left out, and the words that two answers begin with alike
    taken for it."""
    others = columns - {"chosen", "rejected", "system", "system_prompt"}
    if not any(isinstance(row.get(name), str) for row in sample for name in others):
        return True
    texts = [r for r in sample if r.get("chosen") and r.get("rejected")]
    return sum(_takes(from_implicit, row) for row in texts) >= 0.9 * len(texts)


# Formats that are told by what the rows hold, too: other data has answers and labels as well.
HOLDS = {
    "swift": from_swift, "compared": from_compared, "scored": _scored, "unpaired": judged,
}  # fmt: skip


def _holds(name: str, columns: set[str], sample: list[dict]) -> bool:
    """Whether a row can be read so, and no other column has the answer."""
    if name == "swift" and columns & {"rejected_response", "rejected_messages"}:
        return True
    others = {"chosen", "output"} if name == "swift" else {"chosen", "rejected"}
    return not columns & others and any(_takes(HOLDS[name], row) for row in sample)


def _takes(read: Callable[[dict], Any], row: dict) -> bool:
    try:
        read(row)
    except BadRow:
        return False
    return True


def to_pair(row: dict, name: str, margin: float = 0.0) -> dict[str, Messages]:
    """`prompt`, `chosen` and `rejected` of a row of the format `name`, as messages; of `scored`
    answers those whose scores are more than `margin` apart.

    Raises:
        BadRow: the row lacks something, or holds something other than text.
    """
    pair = from_scored(row, margin) if name == "scored" else FORMATS[name].convert(row)
    first = pair["prompt"][0] if pair["prompt"] else {}
    if first.get("role") == "system" and not first["content"].strip():
        pair["prompt"] = pair["prompt"][1:]  # the template would spend tokens on saying nothing
    system = text_of(row.get("system") or row.get("system_prompt") or "", "system")
    if system.strip() and not any(message["role"] == "system" for message in pair["prompt"]):
        pair["prompt"] = [{"role": "system", "content": system}, *pair["prompt"]]
    return pair


def further_columns(row: dict, name: str) -> dict[str, Any]:
    """The columns of `row` that the format `name` does not read, such that TRL's trainer takes
    them: it reads `tools` and `chat_template_kwargs`, takes `image` or `images`, even empty ones,
    for the sign of a vision dataset, `prompt_ids` and its like for its own tokens, and
    `ref_chosen_logps` and `ref_rejected_logps` for what its own reference gave, which those in a
    file are not.

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
    if not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise BadRow("type", "tools is not a list of JSON schemas")
    return json.dumps(tools, ensure_ascii=False)


def _is_tool(tool: Any) -> bool:
    """Whether `tool` is a JSON schema, alone or as `{"type": "function", "function": ...}`."""
    function = isinstance(tool, dict) and (tool.get("function") or tool)
    return isinstance(function, dict) and isinstance(function.get("name") or "", str)
