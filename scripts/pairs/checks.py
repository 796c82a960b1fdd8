"""What can be wrong with a preference pair, how to tell, and how to fix it.

`KINDS` lists every kind of finding. A *bad* row cannot be trained on, or would teach the wrong
thing: the config's `on_bad_rows` says whether it stops the run or is left out. The other findings
are remarks on rows that are used. The checks of several pairs give (index, kind, detail), those of
one pair (kind, detail).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from scripts.pairs.messages import Messages

SIDES = ("prompt", "chosen", "rejected")
PLACE = "_row"  # the column of a pair that says where it stands in its source


class Kind(NamedTuple):
    """A kind of finding: whether the row is bad, what it means, and the way to fix it."""

    bad: bool
    what: str
    fix: str


KINDS: dict[str, Kind] = {
    "unreadable": Kind(True, "not a row at all", "correct the line, or export the file anew"),
    "encoding": Kind(True, "wrongly decoded text", "read the source in its own encoding"),
    "missing": Kind(True, "a field is missing or null", "fill it in; see dataset_columns"),
    "type": Kind(True, "a value of the wrong type", "write it as text (tools: as a list)"),
    "roles": Kind(
        True, "roles out of order", "system?, then user and assistant (and its tools) by turns"
    ),
    "turns": Kind(True, "an answer of several turns", "put earlier turns into the prompt"),
    "empty": Kind(True, "an empty prompt or answer", "leave the row out, or fill it in"),
    "equal": Kind(True, "chosen and rejected are the same", "leave it out: it teaches nothing"),
    "template": Kind(
        True, "the chat template refuses it", "write it as this model's template asks"
    ),
    "special": Kind(True, "special tokens typed in the text", "strip them; the template adds them"),
    "unended": Kind(True, "the answer has no end of turn", "use a chat template that ends turns"),
    "no_room": Kind(True, "the prompt fills max_length", "raise max_length, or shorten the prompt"),
    "cut_equal": Kind(True, "the same answers once cut", "raise max_length"),
    "duplicate": Kind(True, "the same pair again", "keep one"),
    "contradiction": Kind(
        True, "the same answers, either one chosen", "keep one of the rows, or neither"
    ),
    "leak": Kind(True, "a held-out prompt is trained on too", "keep it in one split only"),
    "near_leak": Kind(False, "nearly a held-out prompt", "keep it in one split only"),
    "near_equal": Kind(False, "the answers hardly differ", "see that the difference is meant"),
    "near_duplicate": Kind(False, "nearly the same pair again", "see that both are meant"),
    "truncated": Kind(False, "an answer is cut at max_length", "raise max_length if memory allows"),
    "breaks_off": Kind(False, "chosen stops mid-sentence", "prefer answers that were finished"),
    "markup": Kind(False, "marks of another chat template", "strip them, or name the right format"),
    "json_text": Kind(False, "messages as JSON text", "store them as a list, not as text"),
    "entities": Kind(False, "HTML entities in the text", "unescape them (Python: html.unescape)"),
    "echo": Kind(False, "an answer that repeats the prompt", "leave the repeated part out"),
    "scores": Kind(False, "chosen scored below rejected", "swap the answers, or leave it out"),
    "tools_unseen": Kind(
        False, "tools that the template leaves out", "use a model whose template shows tools"
    ),
}


class Finding(NamedTuple):
    """One finding: the split, where the row stands in its source, the kind, and what is wrong."""

    split: str
    where: str
    kind: str
    detail: str


@dataclass
class Report:
    """All findings on a dataset, and the lengths in tokens of the pairs without bad findings."""

    findings: list[Finding] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)  # in the source, by split
    lengths: dict[str, np.ndarray] = field(default_factory=dict)  # (pairs, 3), by split
    formats: dict[str, str] = field(default_factory=dict)  # as told by the columns, by split
    prompts: dict[str, int] = field(default_factory=dict)  # of the usable pairs, by split
    held_out: bool = False  # whether the test split was drawn from the training rows
    max_length: int | None = None
    truncation: str = "keep_start"

    def bad(self) -> list[Finding]:
        """The findings that make a row unusable."""
        return [f for f in self.findings if KINDS[f.kind].bad]

    def keep(self, split: str, pairs: list[dict], problems: Iterable[tuple]) -> list[dict]:
        """Note all `problems` (index, kind, detail); `pairs` without the bad ones."""
        bad = set()
        for index, kind, detail in problems:
            self.findings.append(Finding(split, pairs[index][PLACE], kind, detail))
            if KINDS[kind].bad:
                bad.add(index)
        return [pair for index, pair in enumerate(pairs) if index not in bad]


# User and assistant by turns; an assistant's tools answer it, and it may call them again.
_TURN = r"user(?: assistant(?: tool)+)*"
TALK = re.compile(f"(?:system )?(?:{_TURN} assistant )*{_TURN}")
INVISIBLE = re.compile("[\\s\u200b-\u200f\u2060\ufeff]+")
MARKUP = re.compile(
    r"\[/?INST\]|<</?SYS>>|<\|(?:im_start|im_end|eot_id|start_header_id|end_header_id|endoftext|"
    r"assistant|user|system|end)\|>|<extra_id_\d+>|<(?:start|end)_of_turn>|"
    r"^###? ?(?:Instruction|Response):|\n\nHuman: ",
    re.MULTILINE,
)
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
LEAST_ECHO = 20  # characters of a prompt that an answer does not begin with by chance
# What wrong decoding leaves: U+FFFD, half characters, byte order marks, control characters, and
# UTF-8 that was read as Latin-1 or Windows-1252.
GARBLED = re.compile(
    "[\ufffd\ufeff\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]"
    "|Ã[\x80-\xbf]|â€[™œ˜”“¦\x9d\x93\x94]|Â[\xa0°»«]|ï»¿"
)
ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|#\d+|#x[\da-f]+);")
# Words that no finished sentence ends with.
OPEN = re.compile(
    r"\b(?:the|an|of|and|or|but|because|than|into|whose|my|your|our|their|if|which)$"
    "|(?:[的和与或及但而把被让在对从]|因为|所以|以及|并且|如果|例如|比如)$"
)
SHARE = 0.8  # of the runs of three words, from which on two texts count as nearly the same
WORDS = 8  # in fewer, one other word is another text
PERMUTATIONS = 64  # the estimate of the share is then right within 0.05, as a rule
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def entity(text: str) -> str | None:
    """The first HTML entity of a text that has neither tags nor code."""
    match = "&" in text and ENTITY.search(text)
    return match.group() if match and not re.search("`|</?[a-z]", text) else None


def breaks_off(text: str) -> str | None:
    """How an answer stops short: in a code block, at a comma or colon, or after an open word."""
    text = text.rstrip()
    lines = text.splitlines() or [""]
    if sum(line.lstrip().startswith("```") for line in lines) % 2:
        return "in a code block that is not closed"
    last = lines[-1].strip()
    indented = any(line.startswith(("    ", "\t")) for line in lines[-3:])
    signed_off = len(lines) > 1 and len(last.split()) <= 3 and last[-1:] == ","  # "Sincerely,"
    if indented or signed_off or len(text) < 9:
        return None
    open_end = last.endswith((",", ":", "，", "、", "：")) or OPEN.search(last)
    return f"with {text[-20:]!r}" if open_end else None


def normalised(text: str) -> str:
    """`text` without case, width, spacing, and the marks at its ends: for finding what is *nearly*
    the same. Any of these may be the whole point of a preference (`5²` over `52`, code with the
    right indentation), so nothing is called equal on the strength of it."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return INVISIBLE.sub(" ", text).strip(" .!?\"'")


def spoken(message: dict) -> str:
    """All that a message says: its content, and its tool calls as JSON."""
    calls = message.get("tool_calls")
    return message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


def _conversation(messages: Messages, form: Callable[[str], str]) -> str:
    """One text for a list of messages, with what each says put through `form`."""
    return "\n".join(f"{m['role']}: {form(spoken(m))}" for m in messages)


def roles_problem(pair: dict[str, Messages]) -> tuple[str, str] | None:
    """What is wrong with the order of the roles, as (kind, detail), or None."""
    roles = {side: [m["role"] for m in pair[side]] for side in SIDES}
    for side in SIDES:
        if not roles[side]:
            return "empty", f"{side} is empty"
    if not TALK.fullmatch(" ".join(roles["prompt"])):
        return "roles", (
            f"the prompt's roles are {', '.join(roles['prompt']):.80}; user and assistant must "
            "take turns, and the user comes last"
        )
    for side in ("chosen", "rejected"):
        if len(roles[side]) > 1 and roles[side][0] == "assistant":
            return "turns", f"{side} has {len(roles[side])} messages; put all but one in the prompt"
        if roles[side] != ["assistant"]:
            return "roles", f"{side} is the {roles[side][0]}'s message"
    return None


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Matches any special token of the model, reserved ones too, as typed."""
    names = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    names = sorted(names | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def text_problems(pair: dict[str, Messages], special: re.Pattern | None) -> Iterator[tuple]:
    """What is wrong with the text of one pair."""
    if problem := roles_problem(pair):
        yield problem
        return
    for side in SIDES:
        for text in map(spoken, pair[side]):
            if match := GARBLED.search(text):
                yield "encoding", f"{side} has {match.group()!a} at character {match.start()}"
            if not INVISIBLE.sub("", text):
                yield "empty", f"{side} is empty or white space"
            if match := special and special.search(text):
                yield "special", f"{side} has {match.group()!r} typed in it"
            elif match := MARKUP.search(text):
                yield "markup", f"{side} has {match.group().strip()!r}"
            if match := MESSAGES_AS_TEXT.match(text):
                yield "json_text", f"{side} begins with {match.group()!r}"
            elif found := entity(text):
                yield "entities", f"{side} has {found}"
    yield from _answer_problems(pair)


def _answer_problems(pair: dict[str, Messages]) -> Iterator[tuple]:
    """What is wrong with the two answers of a pair, beside each other and beside the prompt."""
    chosen, rejected = (spoken(pair[side][-1]) for side in ("chosen", "rejected"))
    if not INVISIBLE.sub("", chosen):  # reported as empty
        return
    if chosen.strip() == rejected.strip():
        where = "" if chosen == rejected else ", but for white space around them"
        yield "equal", f"the two answers are the same, word for word{where}"
    elif normalised(chosen) == normalised(rejected):
        yield "near_equal", "the answers differ only in case, spacing, width or end marks"
    if found := breaks_off(chosen):
        yield "breaks_off", f"chosen ends {found}"
    asked = normalised(pair["prompt"][-1]["content"])
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if len(asked) >= LEAST_ECHO and normalised(text).startswith(asked):
            yield "echo", f"{side} begins with the whole of the prompt's last message"
    one, other = pair.get("score_chosen"), pair.get("score_rejected")
    if isinstance(one, int | float) and isinstance(other, int | float) and one < other:
        yield "scores", f"score_chosen {one:g} is below score_rejected {other:g}"


def repeats(pairs: list[dict]) -> Iterator[tuple[int, str, str]]:
    """Pairs that repeat or contradict an earlier one.

    Rows are dropped for this, so it compares the texts as they are, outer white space aside: pairs
    that teach case or spacing differ in nothing else. Near repeats are remarks.
    """
    exact: dict[tuple[int, ...], int] = {}
    near: dict[tuple[int, ...], int] = {}
    reported: set[int] = set()
    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = key = _pair_key(pair, str.strip)
        if key in exact:
            yield index, "duplicate", f"the same pair as {pairs[exact[key]][PLACE]}"
            continue
        exact[key] = index
        first = near.setdefault(_pair_key(pair, normalised), index)
        if first != index:
            yield index, "near_duplicate", f"nearly the same pair as {pairs[first][PLACE]}"
        if (prompt, rejected, chosen) in exact:
            other = exact[prompt, rejected, chosen]
            for one, two in ((other, index), (index, other)):
                if one not in reported:
                    reported.add(one)
                    yield one, "contradiction", f"the other way round in {pairs[two][PLACE]}"


def near_repeats(pairs: list[dict]) -> Iterator[tuple[int, str, str]]:
    """Pairs that share nearly all of their words with an earlier one; those that are the same when
    normalised are left to `repeats`."""
    first: dict[tuple[int, ...], int] = {}
    for index, pair in enumerate(pairs):
        first.setdefault(_pair_key(pair, normalised), index)
    firsts = set(first.values())
    texts = ("\n".join(_conversation(pair[s], normalised) for s in SIDES) for pair in pairs)
    for index, earlier in near(texts):
        if index in firsts:
            yield index, "near_duplicate", f"nearly the same pair as {pairs[earlier][PLACE]}"


def near(texts: Iterable[str], others: Iterable[str] | None = None) -> Iterator[tuple[int, int]]:
    """The texts that are nearly one of `others`, or without these an earlier one of their own.

    Yields (index of the text, index of the first such). Of many near copies each is told of the
    first, so that a file of copies takes no longer than one without.
    """
    from datasketch import MinHashLSH  # which loads scipy: a second that most commands need not

    # The index misses one in ten at its threshold, so it looks lower, and the estimate decides.
    known = MinHashLSH(threshold=SHARE - 0.2, num_perm=PERMUTATIONS)
    kept = {}

    def keep(index: int, hashed) -> None:
        known.insert(index, hashed, check_duplication=False)
        kept[index] = hashed

    for index, hashed in _hashed(others or ()):
        keep(index, hashed)
    for index, hashed in _hashed(texts):
        alike = [i for i in known.query(hashed) if hashed.jaccard(kept[i]) >= SHARE]
        if alike:
            yield index, min(alike)
        elif others is None:
            keep(index, hashed)


def _hashed(texts: Iterable[str]) -> Iterator[tuple[int, object]]:
    """The MinHash of each text that is long enough, with its index: of its runs of three words (of
    three characters, where words have no spaces)."""
    from datasketch import MinHash

    empty = MinHash(num_perm=PERMUTATIONS)
    for index, text in enumerate(texts):
        words = WORD.findall(text.casefold())
        if len(words) >= WORDS:
            hashed = empty.copy()
            runs = {" ".join(words[i : i + 3]) for i in range(len(words) - 2)}
            hashed.update_batch([run.encode("utf-8", "replace") for run in runs])
            yield index, hashed


def _pair_key(pair: dict, form: Callable[[str], str]) -> tuple[int, ...]:
    """Hashes of prompt, chosen and rejected: of many long pairs, the texts would not fit twice."""
    return tuple(hash(_conversation(pair[side], form)) for side in SIDES)


def prompt_key(prompt: Messages) -> str:
    """What makes two prompts the same where a split is concerned: the normalised conversation, the
    system message aside.

    Normalised, because a prompt in other capitals gives the held-out one away all the same. The
    mistake it can make, to call two different prompts one, costs a training row; the opposite one
    would flatter the evaluation.
    """
    return _conversation([m for m in prompt if m["role"] != "system"], normalised)


def leaks(train: list[dict], held_out: list[dict]) -> Iterator[tuple]:
    """Training pairs whose prompt is held out as well, or nearly."""
    keys, held_keys = ([prompt_key(p["prompt"]) for p in some] for some in (train, held_out))
    held = {key: pair[PLACE] for key, pair in zip(held_keys, held_out, strict=True)}
    for index, key in enumerate(keys):
        if key in held:
            yield index, "leak", f"the prompt of {held[key]}, which is held out"
    for index, first in near(keys, held_keys):
        if keys[index] not in held:
            place = held_out[first][PLACE]
            yield index, "near_leak", f"nearly the prompt of {place}, which is held out"


def tool_problems(
    pair: dict, ids: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple]:
    """Tool calls and tools that the chat template leaves out of the text that is trained on.

    Such a call would be trained on as an empty answer, or leave a tool's reply without its call.
    """
    tools = json.loads(pair.get("tools") or "[]")
    calls = {side: [c for m in pair[side] for c in m.get("tool_calls", ())] for side in SIDES}
    if not tools and not any(calls.values()):
        return
    texts = {side: tokenizer.decode(ids[f"{side}_ids"]) for side in SIDES}
    for side in SIDES:
        names = [call["function"]["name"] for call in calls[side]]
        if unseen := [name for name in names if name not in texts[side]]:
            yield "template", f"the chat template leaves out {side}'s tool call {unseen[0]!r}"
    names = [(tool.get("function") or tool).get("name") for tool in tools]
    if unseen := [name for name in names if name and name not in texts["prompt"]]:
        yield "tools_unseen", f"the chat template leaves out the tool {unseen[0]!r}"


def token_problems(ids: dict[str, list[int]], ends: set[int]) -> Iterator[tuple]:
    """What is wrong with the tokens of one pair: `ids` are the trainer's, `ends` end a turn."""
    chosen, rejected = ids["chosen_ids"], ids["rejected_ids"]
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not ends.intersection(answer[-3:]):  # a template may end with a line break
            yield "unended", f"{side} ends without {' or '.join(map(str, sorted(ends)))}"
    if chosen == rejected:
        yield "equal", "the two answers are the same tokens"


def cut_problems(ids: dict[str, np.ndarray], max_length: int, mode: str) -> Iterator[tuple]:
    """What the cut at `max_length` takes of a pair that is longer, as TRL's collator cuts.

    `no_room` is TRL's own rule: its trainer leaves such a row out without a word.
    """
    prompt, chosen, rejected = (ids[f"{side}_ids"] for side in SIDES)
    if mode == "keep_start" and len(prompt) >= max_length:
        yield "no_room", f"the prompt has {len(prompt)} tokens, max_length is {max_length}"
        return
    room = max_length - len(prompt) if mode == "keep_start" else max_length
    left = slice(room) if mode == "keep_start" else slice(-room, None)
    if np.array_equal(chosen[left], rejected[left]):
        yield "cut_equal", f"the answers are the same in the {room} tokens that are left"
        return
    lost = {s: len(prompt) + len(ids[f"{s}_ids"]) - max_length for s in ("chosen", "rejected")}
    parts = ", ".join(f"{s} {n} of {len(ids[f'{s}_ids'])}" for s, n in lost.items() if n > 0)
    what = "end" if mode == "keep_start" else "beginning, the prompt first"
    yield "truncated", f"tokens lost at the {what}: {parts}"
