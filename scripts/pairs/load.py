"""Preference pairs out of any source: read, checked and tokenised once.

    pairs, report = read_pairs(source, tokenizer)          # what can be read, with its tokens
    fit_pairs(pairs, report, max_length, "keep_start")     # what max_length leaves room for
    hold_out(pairs, report, source)                        # a test split, where there is none

Each step leaves out the bad rows and adds what it found to the report.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from random import Random

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, Json, List, Value, concatenate_datasets
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.base import InputError
from scripts.pairs.checks import (
    KINDS,
    PLACE,
    SIDES,
    Finding,
    Report,
    cut_problems,
    leaks,
    near_repeats,
    prompt_key,
    repeats,
    special_pattern,
    text_problems,
    token_problems,
    tool_problems,
)
from scripts.pairs.formats import FORMATS, HOLDS, detect, fits, further_columns, judged, to_pair
from scripts.pairs.messages import BadRow
from scripts.pairs.report import WIDTH, Z
from scripts.pairs.sources import DataError, Row, Source, read_source
from scripts.pairs.tokens import IDS, end_tokens, tokenize_pairs

TOKENS = Features({name: List(Value("int64")) for name in IDS})
CHUNK = 2000  # pairs tokenised at a time
MOST_HELD_OUT = 0.2
MESSAGES = [Features(role=Value("string"), content=Value("string"))]


def read_pairs(
    source: Source, tokenizer: PreTrainedTokenizerBase | None = None, revision: str = "main"
) -> tuple[DatasetDict, Report]:
    """The pairs of `source` that are no bad rows, as `train` and, if it has one, `test`.

    Columns: `prompt`, `chosen` and `rejected` (messages), what else the source has, `PLACE` (where
    the row stands, such as `train.jsonl:7`) and, with a `tokenizer`, `prompt_ids`, `chosen_ids` and
    `rejected_ids`, uncut. Without one, nothing that depends on tokens is checked. `revision` is the
    tokenizer's, where it comes from the hub.

    Raises:
        DataError: the data is not there, is empty, or has no columns of a known format.
        InputError: it has no such split.
    """
    train, test = read_source(source)
    report = Report()
    special = special_pattern(tokenizer) if tokenizer else None
    good = {"train": _readable(train, "train", source, special, report)}
    if test is not None:
        good["test"] = _readable(test, "test", source, special, report)
    for split in good:
        for look in (repeats, near_repeats):
            good[split] = _without(good[split], split, look(good[split]), report)
    if test is not None:
        found = leaks(good["train"], good["test"])
        good["train"] = _without(good["train"], "train", found, report)
    columns = dict.fromkeys(key for rows in good.values() for pair in rows for key in pair)
    columns = list(columns | {PLACE: None})  # also where no row is left
    pairs = DatasetDict({split: _as_dataset(rows, columns) for split, rows in good.items()})
    if tokenizer:
        ends = end_tokens(tokenizer, _generation_config(tokenizer, revision))
        for split, rows in pairs.items():
            if len(rows) == 0:
                continue
            problems: list[tuple] = []
            ids = _tokens_of(rows, split, tokenizer, ends, problems)
            bad = _bad(rows[PLACE], split, problems, report)
            pairs[split] = _drop(concatenate_datasets([rows, ids], axis=1), bad)
    _measure(pairs, report)
    return pairs, report


def fit_pairs(pairs: DatasetDict, report: Report, max_length: int | None, truncation: str) -> None:
    """Leave out, in place, what `max_length` leaves no room for or cuts to the same answers."""
    report.max_length, report.truncation = max_length, truncation
    for split, rows in pairs.items():
        if len(rows) == 0:
            continue
        prompt, *answers = token_counts(rows).T
        over = np.flatnonzero(prompt + np.maximum(*answers) > (max_length or np.inf))
        problems = [
            (index, *problem)
            for index, ids in zip(over.tolist(), rows.select(over).select_columns(IDS), strict=True)
            for problem in cut_problems(ids, max_length, truncation)
        ]
        pairs[split] = _drop(rows, _bad(rows[PLACE], split, problems, report))
    _measure(pairs, report)


def token_counts(pairs: Dataset) -> np.ndarray:
    """Tokens of prompt, chosen and rejected: (pairs, 3)."""
    if len(pairs) == 0:
        return np.zeros((0, 3), dtype=np.int64)
    table = pairs.select_columns(IDS).with_format("arrow")[:]
    return np.stack([pc.list_value_length(table[name]).to_numpy() for name in IDS], axis=1)


def _measure(pairs: DatasetDict, report: Report) -> None:
    """Put the lengths of the usable pairs into `report`."""
    for split, rows in pairs.items():
        if len(rows) == 0 or IDS[0] in rows.column_names:
            report.lengths[split] = token_counts(rows)


def count_prompts(pairs: DatasetDict) -> dict[str, int]:
    """How many different prompts each split has."""
    return {s: len({prompt_key(p) for p in rows["prompt"][:]}) for s, rows in pairs.items()}


def _drop(rows: Dataset, bad: set[int]) -> Dataset:
    return rows.select([i for i in range(len(rows)) if i not in bad]) if bad else rows


def _generation_config(tokenizer: PreTrainedTokenizerBase, revision: str):
    """The `generation_config.json` beside the tokenizer, if there is one."""
    try:
        return GenerationConfig.from_pretrained(tokenizer.name_or_path, revision=revision)
    except OSError:
        return None


def _readable(rows: list[Row], split: str, source: Source, special, report: Report) -> list[dict]:
    """The rows that can be read as pairs, with their places; findings go to `report`."""
    report.rows[split] = len(rows)
    if not rows:
        raise DataError(f"{source.name} has no rows in {split}: it is empty")
    if all(row is None for _, row, _ in rows):
        where, _, problem = rows[0]
        raise DataError(f"none of the {len(rows)} rows of {split} can be read; {where}: {problem}")
    if names := source.columns:
        _require_columns(names, rows)
        rows = [
            (where, row and {names.get(k, k): v for k, v in row.items()}, problem)
            for where, row, problem in rows
        ]
    report.formats[split] = name = _format_of(rows, source)
    rows = pair_up(rows) if name == "unpaired" else rows
    good = []
    for where, row, problem in rows:
        if row is None:
            kind = "encoding" if problem.startswith("not UTF-8") else "unreadable"
            report.findings.append(Finding(split, where, kind, problem))
            continue
        try:
            pair = further_columns(row, name) | to_pair(row, name, source.score_margin)
        except BadRow as error:
            report.findings.append(Finding(split, where, error.kind, error.detail))
            continue
        problems = list(text_problems(pair, special))
        report.findings += [Finding(split, where, kind, detail) for kind, detail in problems]
        if not any(KINDS[kind].bad for kind, _ in problems):
            good.append(pair | {PLACE: where})
    return good


def pair_up(rows: list[Row]) -> list[Row]:
    """`rows` with pairs in place of single answers.

    The rule: of the rows with the same prompt (all of its messages, outer white space aside, and
    the system message), the first good answer goes with the first bad one, the second with the
    second, in the order of the file. A pair stands where its earlier row does, and has that row's
    other columns. Rows without a partner stay as they are, and the checks report them.

    Raises:
        DataError: no prompt has a good and a bad answer.
    """
    waiting: dict[tuple[str, bool], list[int]] = defaultdict(list)
    paired: dict[int, Row] = {}
    unread = []
    for index, (where, row, problem) in enumerate(rows):
        bare = row and {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        paired[index] = (where, bare, problem)
        try:
            prompt, answer, good = judged(bare or {})
        except BadRow as error:  # reported when the row is read
            unread.append(f"; {where}, which cannot be read: {error}")
            continue
        texts = [(m["role"], m["content"].strip()) for m in prompt]
        key = json.dumps([str(bare.get("system") or "").strip(), texts])
        bare |= {"prompt": prompt, "chosen" if good else "rejected": answer}
        if not waiting[key, not good]:
            waiting[key, good].append(index)
            continue
        first = waiting[key, not good].pop(0)
        del paired[index]
        paired[first][1].update({"chosen" if good else "rejected": answer})
    pairs = len(rows) - len(paired)
    print(
        f"Unpaired (KTO) data: {len(rows)} rows give {pairs} pairs. To each prompt the first good "
        "answer goes with the first bad one, the second with the second, and so on."
    )
    if rows and not pairs:
        raise DataError(
            f"the data is unpaired (KTO): one answer a row, and none of the {len(rows)} rows has a "
            "partner, a row with the same prompt and the other label. DPO needs both; sample "
            "further answers with `python -m scripts.data build`, or train with TRL's KTOTrainer"
            + "".join(unread[:1])
        )
    return list(paired.values())


def _require_columns(names: dict[str, str], rows: list[Row]) -> None:
    """Raise a `DataError` for a rename whose source no row has, or whose target is taken."""
    columns = {key for _, row, _ in rows[:1000] for key in row or ()}
    for old in names:
        if old not in columns:
            near = difflib.get_close_matches(old, columns, n=1, cutoff=0.0)
            raise DataError(
                f"dataset_columns renames {old!r}, which no row has; did you mean "
                f"{near[0] if near else 'another file'!r}?"
            )
    taken = [new for new in names.values() if new in columns and new not in names]
    if taken or len(set(names.values())) < len(names):
        which = taken[0] if taken else "one of its targets"
        raise DataError(
            f"dataset_columns renames a column to {which!r}, and there is one of that name "
            "already; rename that one too"
        )


def _format_of(rows: list[Row], source: Source) -> str:
    name = source.format
    sample = [row for _, row, _ in rows[:1000] if row is not None]
    columns = {key for row in sample for key in row}
    if name == "auto":
        name = detect(columns, sample[:100])
    elif name not in FORMATS:
        raise InputError(f"dataset_format {name!r} is none of auto, {', '.join(FORMATS)}")
    if name is None:
        raise DataError(_no_format(columns, sample))
    if not fits(name, columns):
        raise DataError(
            f"dataset_format {name} needs columns {', '.join(FORMATS[name].needed)}, and there are "
            f"{_listed(columns)}; set dataset_format: auto, or name yours in dataset_columns"
        )
    return name


def _listed(columns: set[str]) -> str:
    """The names of `columns`; the first row of a table without a header has long ones."""
    return ", ".join(f"{name[:40]}..." if len(name) > 40 else name for name in sorted(columns))


def _no_format(columns: set[str], sample: list[dict]) -> str:
    """What to say of `columns` that fit no format, and the cure where only their case differs."""
    plain = {name: name.strip().lower() for name in columns}
    tidy = [{plain[key]: value for key, value in row.items()} for row in sample[:100]]
    if len(set(plain.values())) == len(columns) and detect(set(plain.values()), tidy):
        names = ", ".join(f'"{old}": {new}' for old, new in sorted(plain.items()) if old != new)
        return f"the columns fit but for case and spaces; set dataset_columns: {{{names}}}"
    alike = [n for n in HOLDS if fits(n, columns)] if not {"chosen", "rejected"} & columns else []
    for name in alike if sample else ():
        try:
            FORMATS[name].convert(sample[0])
        except BadRow as error:
            return f"columns {_listed(columns)} would be {name}, but no row can be read: {error}"
    if {"chosen", "rejected"} <= columns:
        return (
            f"columns {_listed(columns)}: which holds the prompt? Name it in dataset_columns: "
            "{its_name: prompt}"
        )
    return (
        f"columns {_listed(columns) or '(none)'} fit no known format (docs/data.md lists them); "
        "name yours in dataset_columns ({their_name: our_name}), or set dataset_format"
    )


def held_out_count(size: float | str, prompts: int) -> int:
    """How many of `prompts` prompts are held out: the share `size`, or with `auto` as many as tell
    a share within `WIDTH`, but at most `MOST_HELD_OUT` of them."""
    if size == "auto":
        return max(1, min(math.ceil(Z**2 / 4 / WIDTH**2), round(MOST_HELD_OUT * prompts)))
    return max(1, round(size * prompts))


def hold_out(pairs: DatasetDict, report: Report, source: Source) -> None:
    """Draw a test split from the usable pairs, in place. All pairs of a prompt, in any spelling,
    go to the same side, and what was found of them along with them."""
    rows = pairs["train"]
    keys = [prompt_key(prompt) for prompt in rows["prompt"][:]]
    names = sorted(set(keys))
    most = max(len(names) - 1, 1)  # one prompt at least is trained on, where there are two
    count = min(held_out_count(source.held_out, len(names)), most, len(names))
    held = set(Random(source.seed).sample(names, count))
    pairs["train"] = rows.select([i for i, key in enumerate(keys) if key not in held])
    pairs["test"] = rows.select([i for i, key in enumerate(keys) if key in held])
    places = set(pairs["test"][PLACE])
    report.findings = [
        f._replace(split="test") if f.where in places else f for f in report.findings
    ]
    moved = len(places) * (2 if report.formats["train"] == "unpaired" else 1)
    report.rows = {"train": report.rows["train"] - moved, "test": moved}
    report.formats["test"] = report.formats["train"]
    report.held_out = True
    _measure(pairs, report)


def _bad(places: list[str], split: str, problems: Iterable, report: Report) -> set[int]:
    """Put all `problems` of the rows of a split into `report`; which of the rows are bad."""
    places, bad = list(places), set()
    for index, kind, detail in problems:
        report.findings.append(Finding(split, places[index], kind, detail))
        if KINDS[kind].bad:
            bad.add(index)
    return bad


def _without(rows: list[dict], split: str, problems: Iterable, report: Report) -> list[dict]:
    """`rows` without the pairs that have bad ones among `problems`; all go to `report`."""
    bad = _bad([pair[PLACE] for pair in rows], split, problems, report)
    return [pair for i, pair in enumerate(rows) if i not in bad]


def _tokens_of(
    pairs: Dataset,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
    problems: list[tuple],
) -> Dataset:
    """The tokens of `pairs`, as they are trained on; (index, kind, detail) go to `problems`.

    A few thousand pairs at a time: lists of numbers are large.
    """
    read = [*SIDES, "tools", "chat_template_kwargs"]
    pairs = pairs.select_columns([name for name in read if name in pairs.column_names])
    parts = []
    starts = range(0, len(pairs), CHUNK)
    for start in tqdm(starts, f"Tokens of {split}", disable=len(pairs) < 10_000):
        some = pairs.select(range(start, min(start + CHUNK, len(pairs)))).to_list()
        rows = _tokenized(some, tokenizer)
        for index, (pair, ids) in enumerate(zip(some, rows, strict=True)):
            if isinstance(ids, Exception):
                problems.append((start + index, "template", f"the chat template says: {ids}"))
                rows[index] = {name: [] for name in IDS}
                continue
            found = [*tool_problems(pair, ids, tokenizer), *token_problems(ids, ends)]
            problems += [(start + index, *problem) for problem in found]
        parts.append(Dataset.from_list(rows, features=TOKENS))
    return concatenate_datasets(parts)


# What a template raises: its own errors, and Python's where a value is not what it reckons with.
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, KeyError)


def _tokenized(pairs: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict | Exception]:
    """`tokenize_pairs`, with the template's error in place of a pair that it refuses."""
    try:
        return tokenize_pairs(pairs, tokenizer)
    except REFUSALS as error:
        if len(pairs) == 1:
            return [error]
    return [row for pair in pairs for row in _tokenized([pair], tokenizer)]


def _as_dataset(rows: list[dict], columns: list[str]) -> Dataset:
    """The pairs as a `Dataset`, with those of `columns` whose values all have one type.

    Messages with tool calls are kept as JSON: a table would fill each with the fields of all, and
    templates would show them.
    """
    messages = [m for pair in rows for side in SIDES for m in pair[side]]
    plain = all(m.keys() == {"role", "content"} for m in messages)
    data = Dataset.from_dict(
        {side: [pair[side] for pair in rows] for side in SIDES},
        features=Features(dict.fromkeys(SIDES, MESSAGES if plain else List(Json()))),
    )
    for name in columns:
        if name in SIDES:
            continue
        missing = {} if name == "chat_template_kwargs" else None  # TRL unpacks it
        try:
            data = data.add_column(name, [pair.get(name, missing) for pair in rows])
        except (ValueError, TypeError, OverflowError):  # what pyarrow's errors derive from
            print(f"Column {name!r} holds values of several types and is left out.")
    return data
