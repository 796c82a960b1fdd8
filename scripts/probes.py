"""Prompts to try both models on, and what to measure of the content of a reply.

For preference pairs: their held-out prompts, and the key facts that these list. For questions on
given texts: right and wrong, which can be checked. Two side probes ask whether tuning did harm
elsewhere: plain questions without a text, and instructions that a program can verify.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from random import Random

from datasets import Dataset

from scripts.base import ROOT
from scripts.config import Config
from scripts.pairs import grounded
from scripts.pairs.messages import Messages
from scripts.pairs.passages import ask, read_questions
from scripts.pairs.text import are_facts, fact_recall, mentions
from scripts.pairs.tokens import template_options


@dataclass
class Probe:
    """Prompts for both models. `score(i, text)` are the measures of a reply to prompt `i`."""

    prompts: list[Messages]
    score: Callable[[int, str], dict[str, float]]
    options: list[dict] | None = None  # for the chat template: tools and the like
    clusters: list[str] | None = None  # what an interval draws, if not the prompt: its passage
    columns: dict[str, list] = field(default_factory=dict)  # beside the replies
    brief: str = " Answer in one or two short sentences."  # what a user would ask for instead


def of_pairs(cfg: Config, test: Dataset) -> Probe:
    """The held-out prompts of the pairs, `eval_prompts` of them; each once."""
    picked = pick_prompts(test["prompt"], cfg.recipe.eval_prompts, cfg.dpo.seed)
    rows = test[picked]
    facts = rows.get("facts")
    # A measure only where every prompt lists them, and in the form that the README gives.
    facts = facts if facts and all(facts) and all(map(are_facts, facts)) else None
    return Probe(
        rows["prompt"],
        lambda i, text: {"facts": fact_recall(text, facts[i])} if facts else {},
        options=[template_options(test[i]) for i in picked],
    )


def of_questions(rows: list[dict]) -> Probe:
    """Questions on passages, as `read_questions` gives them. Intervals draw passages."""

    def score(i: int, text: str) -> dict[str, float]:
        verdict = grounded.check(text, rows[i]["passage"], rows[i])
        answerable = rows[i]["answerable"]
        return {
            "exact": verdict.exact,
            "first": verdict.first if answerable else nan,
            "mentioned": verdict.mentioned if answerable else nan,
            "declined": nan if answerable else verdict.right,
            "refused": verdict.declined if answerable else nan,
            "unsupported": verdict.unsupported / max(verdict.sentences, 1),
        }

    kept = ("id", "passage", "question", "answerable", "accept")
    return Probe(
        [ask(row) for row in rows],
        score,
        clusters=[row["passage_id"] for row in rows],
        columns={key: [row[key] for row in rows] for key in kept},
        brief=" Answer in one short sentence, using only the text above.",
    )


def of_plain_questions(count: int | None, seed: int) -> Probe:
    """Held-out questions of data/prompts.jsonl, without a text, and their key facts."""
    rows = _some([r for r in _lines("prompts.jsonl") if r["split"] == "test"], count, seed)
    return Probe(
        [[{"role": "user", "content": row["prompt"]}] for row in rows],
        lambda i, text: {"facts": fact_recall(text, rows[i]["facts"])},
    )


def of_instructions(count: int | None, seed: int) -> Probe:
    """The verifiable instructions of data/instructions.jsonl."""
    rows = _some(_lines("instructions.jsonl"), count, seed)
    return Probe(
        [[{"role": "user", "content": row["prompt"]}] for row in rows],
        lambda i, text: {"follows": follows(text, rows[i]["checks"])},
    )


BULLET = re.compile(r"^\s*[-*•]\s+\S", re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?]+(?=[\s\"')]|$)")


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


# Kinds of instructions, after IFEval (arXiv 2311.07911): does `text` do what is asked?
CHECKS = {
    "at_most_words": lambda text, value: 0 < len(text.split()) <= value,
    "at_least_words": lambda text, value: len(text.split()) >= value,
    "sentences": lambda text, value: len(SENTENCE_END.findall(text)) == value,
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

    This is IFEval's strict accuracy: a prompt counts only if all its instructions are followed,
    and an empty reply follows none.

    Raises:
        KeyError: a check is of no known kind.
    """
    text = text.strip()
    return bool(text) and all(CHECKS[c["kind"]](text, c.get("value")) for c in checks)


def main_probe(cfg: Config, test: Dataset) -> Probe:
    """What the table of before and after is made of."""
    if cfg.recipe.questions is None:
        return of_pairs(cfg, test)
    rows = read_questions(ROOT / cfg.recipe.questions, "test", cfg.recipe.questions_level)
    return of_questions(_some(rows, cfg.recipe.eval_prompts, cfg.dpo.seed))


def side_probes(cfg: Config) -> dict[str, Probe]:
    """Beside the main one: what was trained on, against memorising, and where harm would show."""
    count, seed = cfg.recipe.side_prompts, cfg.dpo.seed
    if cfg.recipe.questions is None or not count:
        return {}
    rows = read_questions(ROOT / cfg.recipe.questions, "train", cfg.recipe.questions_level)
    return {
        "passages trained on": of_questions(_some(rows, count, seed)),
        "plain questions": of_plain_questions(count, seed),
        "instructions": of_instructions(count, seed),
    }


def pick_prompts(prompts: list[list[dict]], count: int | None, seed: int) -> list[int]:
    """Rows of `prompts` to reply to, in order: each prompt once, `count` of them (None: all) drawn
    by `seed`."""
    first: dict[str, int] = {}
    for i, prompt in enumerate(prompts):
        first.setdefault(json.dumps(prompt), i)
    return _some(list(first.values()), count, seed)


def drawn(total: int, count: int | None, seed: int) -> list[int]:
    """`count` of `total` indices in order, drawn by `seed`; all of them if that is not fewer."""
    if count is None or count >= total:
        return list(range(total))
    return sorted(Random(seed).sample(range(total), count))


def _some(rows: list, count: int | None, seed: int) -> list:
    return [rows[i] for i in drawn(len(rows), count, seed)]


def _lines(name: str) -> list[dict]:
    with (ROOT / "data" / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
