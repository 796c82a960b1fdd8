"""Rows of the common preference formats, as TRL's explicit conversational pairs.

| format | columns | a row |
| --- | --- | --- |
| `explicit` | `prompt`, `chosen`, `rejected` | text or messages; whole conversations in the answers too (UltraFeedback) |
| `implicit` | `chosen`, `rejected` | both hold the whole conversation, or the prompt's text and the answer's |
| `hh` | `chosen`, `rejected` | transcripts, `\\n\\nHuman: … \\n\\nAssistant: …` (Anthropic HH) |
| `orca` | `question`, `chosen`, `rejected` | Intel/orca_dpo_pairs |
| `alpaca` | `instruction`, `chosen` or `output`, `rejected` | with `input` and `history` where there are any |
| `sharegpt` | `conversations`, `chosen`, `rejected` | messages as `from` and `value` |
| `messages` | `messages`, `chosen`, `rejected` | axolotl's `chat_template`: the conversation, and an answer's message each |
| `responses` | `instruction` (or `prompt`, `question`, `query`, `messages`), `chosen_response`, `rejected_response` | axolotl's `argilla`; also `response_chosen`, `response_rejected` (MedicalGPT) |
| `llamafactory` | `chosen_messages`, `rejected_messages` | LLaMA-Factory v1: two whole conversations, text under `value` |
| `swift` | `messages` (or `query`, `response`), `rejected_response`, `rejected_messages` or `rejected` | ms-swift: the last message is chosen |
| `openai` | `input`, `preferred_output`, `non_preferred_output` | OpenAI's preference files, with `input.messages` and `input.tools` |
| `stackexchange` | `question`, `response_j`, `response_k` | `j` is the better one |
| `compared` | a prompt, two answers, which is better | HelpSteer2 and 3, PKU-SafeRLHF, Chatbot Arena, SHP, WebGPT (`compared.VERDICTS`) |
| `scored` | a prompt, `completions` (or `answers`, `responses`) with a score each | the best against the worst, if further apart than `score_margin` |
| `unpaired` | a prompt, an answer, `label` or `kto_tag` | KTO's: one answer a row, paired by `pairs.unpaired` |

A `system` (or `system_prompt`) column becomes the system message in every format. Columns that the format does not read
outlive it. See https://huggingface.co/docs/trl/dataset_formats.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from trl import extract_prompt

from scripts.pairs.compared import COLUMNS, VERDICTS, from_compared
from scripts.pairs.messages import (
    PROMPTS,
    BadRow,
    Messages,
    as_messages,
    as_pair,
    asked_in,
    first_of,
    number_in,
    question_in,
    split_talks,
    text_of,
)

WIDE_END = re.compile("[。？！：]")  # ends a sentence without a space after it
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def _answers(row: dict) -> tuple[Messages, Messages]:
    chosen, rejected = (
        as_messages(row.get(side), "assistant", side) for side in ("chosen", "rejected")
    )
    return chosen, rejected


def from_explicit(row: dict, column: str = "prompt") -> dict[str, Messages]:
    """TRL's explicit prompt. Answers that repeat the prompt's turns hold the conversation."""
    chosen, rejected = _answers(row)
    if all(len(a) > 1 and a[0]["role"] in ("system", "user") for a in (chosen, rejected)):
        return split_talks(chosen, rejected)
    return as_pair(as_messages(row.get(column), "user", column), chosen, rejected)


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
        return split_talks(*_answers(row))
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


def from_orca(row: dict) -> dict[str, Messages]:
    """Intel/orca_dpo_pairs: `system` (often empty), `question`, `chosen`, `rejected`."""
    return from_explicit(row, "question")


def from_sharegpt(row: dict) -> dict[str, Messages]:
    """`conversations` as `{"from", "value"}`, and an answer of that shape in either column."""
    return from_messages(row, "conversations")


def from_alpaca(row: dict) -> dict[str, Messages]:
    """Alpaca: `instruction`, perhaps `input` and earlier turns in `history`; `output` is chosen,
    or a list of chosen and rejected."""
    output = row.get("output")
    if isinstance(output, list) and len(output) == 2 and row.get("rejected") is None:
        row = row | {"chosen": output[0], "rejected": output[1]}
    elif row.get("chosen") is None:
        row = row | {"chosen": output}
    prompt = question_in(row, row.get("instruction"))
    return as_pair(prompt, *_answers(row))


def from_messages(row: dict, column: str = "messages") -> dict[str, Messages]:
    """axolotl's `chat_template`: `messages` up to the answer, or with the chosen one at its end."""
    pair = from_explicit(row, column)
    if pair["prompt"][-1:] == pair["chosen"][-1:]:
        pair["prompt"] = pair["prompt"][:-1]
    return pair


# What other tools call an answer.
CHOSEN, REJECTED = "chosen_response|response_chosen", "rejected_response|response_rejected"


def from_responses(row: dict) -> dict[str, Messages]:
    """axolotl's `argilla` and its like: the answers are called responses."""
    answers = [as_messages(first_of(row, c)[1], "assistant", c) for c in (CHOSEN, REJECTED)]
    return as_pair(asked_in(row), *answers)


def from_llamafactory(row: dict) -> dict[str, Messages]:
    """LLaMA-Factory v1: `chosen_messages` and `rejected_messages` are whole conversations."""
    names = ("chosen_messages", "rejected_messages")
    return split_talks(*(as_messages(row.get(name), "user", name) for name in names))


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


def from_stackexchange(row: dict) -> dict[str, Messages]:
    """lvwerra/stack-exchange-paired: `response_j` has more votes than `response_k`."""
    return from_orca(row | {"chosen": row.get("response_j"), "rejected": row.get("response_k")})


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


LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LABELS |= {"-1": False, "-1.0": False}


def from_unpaired(row: dict) -> dict[str, Messages]:
    """KTO's rows, once `unpaired.pair_up` has put two with the same prompt together."""
    for side, kind in (("chosen", "good"), ("rejected", "bad")):
        if side not in row:
            judged(row)  # which says what is wrong with the row by itself
            raise BadRow("missing", f"no answer labelled {kind} is left for the same prompt")
    return from_explicit(row)


class Format(NamedTuple):
    """A format: the columns that tell it (`|`: either will do), how one of its rows becomes
    messages, and what it reads where it is there."""

    needed: tuple[str, ...]
    convert: Callable[[dict], dict[str, Messages]]
    optional: tuple[str, ...] = ()

    def reads(self) -> set[str]:
        """All columns that this format reads; `system` is read in every one."""
        return {"system", "system_prompt", *self.optional, *"|".join(self.needed).split("|")}


TALK = ("input", "history")  # what `asked_in` reads besides the prompt


FORMATS: dict[str, Format] = {
    "explicit": Format(("prompt", "chosen", "rejected"), from_explicit),
    "orca": Format(("question", "chosen", "rejected"), from_orca),
    "sharegpt": Format(("conversations", "chosen", "rejected"), from_sharegpt),
    "messages": Format(("messages", "chosen", "rejected"), from_messages),
    "responses": Format((PROMPTS, CHOSEN, REJECTED), from_responses, TALK),
    "llamafactory": Format(("chosen_messages", "rejected_messages"), from_llamafactory),
    "swift": Format(
        ("messages|query", "rejected_response|rejected_messages|rejected"),
        from_swift,
        ("response", *TALK),
    ),
    "openai": Format(("input", "preferred_output", "non_preferred_output"), from_openai),
    "stackexchange": Format(("question", "response_j", "response_k"), from_stackexchange),
    "compared": Format(
        tuple("|".join(dict.fromkeys(names)) for names in list(zip(*VERDICTS, strict=True))[:3]),
        from_compared,
        (*COLUMNS, *PROMPTS.split("|"), "context", *TALK),
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
        if fits(name, columns) and (name not in HOLDS or HOLDS[name](columns, sample))
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
    return sum(map(_readable(from_implicit), texts)) >= 0.9 * len(texts)


def _holds_scores(columns: set[str], sample: list[dict]) -> bool:
    return not columns & {"chosen", "rejected"} and any(map(_readable(_scored), sample))


def _holds_labels(columns: set[str], sample: list[dict]) -> bool:
    return not columns & {"chosen", "rejected"} and any(map(_readable(judged), sample))


def _readable(read: Callable[[dict], Any]) -> Callable[[dict], bool]:
    """Whether `read` takes a row, as a function of the row."""

    def takes(row: dict) -> bool:
        try:
            read(row)
        except BadRow:
            return False
        return True

    return takes


def _holds_verdicts(columns: set[str], sample: list[dict]) -> bool:
    return not columns & {"chosen", "rejected"} and any(map(_readable(from_compared), sample))


def _holds_rejected(columns: set[str], sample: list[dict]) -> bool:
    """ms-swift's own columns; or `rejected`, where nothing but the conversation has the chosen."""
    if columns & {"rejected_response", "rejected_messages"}:
        return True
    return not columns & {"chosen", "output"} and any(map(_readable(from_swift), sample))


HOLDS = {
    "swift": _holds_rejected,
    "compared": _holds_verdicts,
    "scored": _holds_scores,
    "unpaired": _holds_labels,
}


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
    for the sign of a vision dataset, and `ref_chosen_logps` and `ref_rejected_logps` for what its
    own reference gave, which numbers in a file are not.

    Raises:
        BadRow: the row has images, or its `tools` or `chat_template_kwargs` cannot be used.
    """
    left_out = FORMATS[name].reads() | {"ref_chosen_logps", "ref_rejected_logps"}
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
