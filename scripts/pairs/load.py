"""Preference pairs out of any source: read, checked and tokenised once.

    splits, report = read_pairs(source, tokenizer)          # what can be read, with its tokens
    fit_pairs(splits, report, max_length, "keep_start")     # what max_length leaves room for
    pairs = as_splits(splits, report, source)               # as `train` and `test`

Each step leaves out the bad rows and adds what it found to the report.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
from datasets import Dataset, DatasetDict, Features, Json, List, Value
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.pairs.checks import (
    PLACE,
    SIDES,
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
from scripts.pairs.formats import FORMATS, detect, fits, further_columns, to_pair
from scripts.pairs.messages import BadRow
from scripts.pairs.report import WIDTH, Z
from scripts.pairs.sources import DataError, Row, Source, read_source
from scripts.pairs.tokens import IDS, end_tokens, tokenize_pairs

CHUNK = 2000  # pairs tokenised at a time
MOST_HELD_OUT = 0.2
MESSAGES = [Features(role=Value("string"), content=Value("string"))]
Splits = dict[str, list[dict]]  # the pairs of each split


def read_pairs(
    source: Source, tokenizer: PreTrainedTokenizerBase | None = None, revision: str = "main"
) -> tuple[Splits, Report]:
    """The pairs of `source` that are no bad rows, as `train` and, if it has one, `test`.

    A pair has `prompt`, `chosen` and `rejected` (messages), what else the source has, `PLACE`
    (where the row stands, such as `train.jsonl:7`) and, with a `tokenizer`, `prompt_ids`,
    `chosen_ids` and `rejected_ids`, uncut. Without one, nothing that depends on tokens is checked.
    `revision` is the tokenizer's, where it comes from the hub.

    Raises:
        DataError: the data is not there, is empty, or has no columns of a known format.
        InputError: it has no such split.
    """
    report = Report()
    special = special_pattern(tokenizer) if tokenizer else None
    splits = {}
    for split, rows in read_source(source).items():
        pairs, problems = _read(rows, split, source, special, report)
        pairs = report.keep(split, pairs, problems)
        pairs = report.keep(split, pairs, repeats(pairs))
        splits[split] = report.keep(split, pairs, near_repeats(pairs))
    if "test" in splits:
        found = leaks(splits["train"], splits["test"])
        splits["train"] = report.keep("train", splits["train"], found)
    if tokenizer:
        for split, pairs in splits.items():
            splits[split] = report.keep(split, pairs, _tokenize(pairs, split, tokenizer, revision))
    return splits, report


def fit_pairs(splits: Splits, report: Report, max_length: int | None, truncation: str) -> None:
    """Leave out, in place, what `max_length` leaves no room for or cuts to the same answers."""
    report.max_length, report.truncation = max_length, truncation
    for split, pairs in splits.items():
        prompt, *answers = token_counts(pairs).T
        over = np.flatnonzero(prompt + np.maximum(*answers) > (max_length or np.inf))
        problems = (
            (index, *problem)
            for index in over.tolist()
            for problem in cut_problems(pairs[index], max_length, truncation)
        )
        splits[split] = report.keep(split, pairs, problems)


def token_counts(pairs: Iterable[dict]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected: (pairs, 3)."""
    pairs = pairs.select_columns(IDS) if isinstance(pairs, Dataset) else pairs
    counts = [[len(pair[name]) for name in IDS] for pair in pairs]
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def as_splits(splits: Splits, report: Report, source: Source) -> DatasetDict:
    """The pairs as `train` and `test`, drawn from the training pairs where there is none."""
    if "test" not in splits:
        splits = _hold_out(splits["train"], report, source)
    for split, pairs in splits.items():
        if not pairs or IDS[0] in pairs[0]:
            report.lengths[split] = token_counts(pairs)
        report.prompts[split] = len({prompt_key(pair["prompt"]) for pair in pairs})
    columns = list(dict.fromkeys(key for pairs in splits.values() for p in pairs for key in p))
    return DatasetDict({split: _as_dataset(pairs, columns) for split, pairs in splits.items()})


def _generation_config(tokenizer: PreTrainedTokenizerBase, revision: str):
    """The `generation_config.json` beside the tokenizer, if there is one."""
    try:
        return GenerationConfig.from_pretrained(tokenizer.name_or_path, revision=revision)
    except OSError:
        return None


def _read(
    rows: list[Row], split: str, source: Source, special, report: Report
) -> tuple[list[dict], list[tuple]]:
    """A pair for each row, with its place, and what is wrong with them by themselves."""
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
    pairs, problems = [], []
    for index, (where, row, problem) in enumerate(rows):
        pairs.append({PLACE: where})
        try:
            if row is None:
                kind = "encoding" if problem.startswith("not UTF-8") else "unreadable"
                raise BadRow(kind, problem)
            pair = to_pair(row, name, source.score_margin)
            pairs[-1] = further_columns(row, name) | pair | pairs[-1]
            problems += [(index, *found) for found in text_problems(pairs[-1], special)]
        except BadRow as error:
            problems.append((index, error.kind, error.detail))
    return pairs, problems


def _require_columns(names: dict[str, str], rows: list[Row]) -> None:
    """Raise a `DataError` for a rename whose source no row has, or whose target is taken."""
    columns = {key for _, row, _ in rows[:1000] for key in row or ()}
    for old in set(names) - columns:
        near = difflib.get_close_matches(old, columns, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"dataset_columns renames {old!r}, which no row has{hint}")
    after = [names.get(column, column) for column in columns]
    if twice := {new for new in after if after.count(new) > 1}:
        raise DataError(
            f"dataset_columns renames a column to {min(twice)!r}, and there is one of that name "
            "already; rename that one too"
        )


def _format_of(rows: list[Row], source: Source) -> str:
    """The format of `rows`: the one that `source` names, or the one that the columns tell."""
    name = source.format
    sample = [row for _, row, _ in rows[:1000] if row is not None]
    columns = {key for row in sample for key in row}
    if name == "auto":
        name = detect(columns, sample[:100])
    listed = ", ".join(f"{column:.40}" for column in sorted(columns)) or "(none)"
    if name is None and columns & {"label", "kto_tag"}:
        raise DataError(
            f"columns {listed}: one answer a row with a label is data for KTO (TRL's KTOTrainer); "
            "DPO takes a chosen and a rejected answer to each prompt"
        )
    if name is None and {"chosen", "rejected"} <= columns:
        raise DataError(
            f"columns {listed}: which holds the prompt? Name it in dataset_columns: "
            "{its_name: prompt}"
        )
    if name is None:
        raise DataError(
            f"columns {listed} fit no known format (docs/data.md lists them); name yours in "
            "dataset_columns ({their_name: our_name}), or set dataset_format"
        )
    if not fits(name, columns):
        raise DataError(
            f"dataset_format {name} needs columns {', '.join(FORMATS[name].needed)}, and there are "
            f"{listed}; set dataset_format: auto, or name yours in dataset_columns"
        )
    return name


def held_out_count(size: float | str, prompts: int) -> int:
    """How many of `prompts` prompts are held out: the share `size`, or with `auto` as many as tell
    a share within `WIDTH`, but at most `MOST_HELD_OUT` of them."""
    if size == "auto":
        return max(1, min(math.ceil(Z**2 / 4 / WIDTH**2), round(MOST_HELD_OUT * prompts)))
    return max(1, round(size * prompts))


def _hold_out(pairs: list[dict], report: Report, source: Source) -> Splits:
    """`pairs` as `train` and `test`. All pairs of a prompt, in any spelling, go to the same side,
    and what was found of them along with them."""
    keys = [prompt_key(pair["prompt"]) for pair in pairs]
    names = sorted(set(keys))
    most = max(len(names) - 1, 1)  # one prompt at least is trained on, where there are two
    count = min(held_out_count(source.held_out, len(names)), most, len(names))
    held = set(Random(source.seed).sample(names, count))
    splits = {"train": [], "test": []}
    for key, pair in zip(keys, pairs, strict=True):
        splits["test" if key in held else "train"].append(pair)
    places = {pair[PLACE] for pair in splits["test"]}
    report.findings = [
        f._replace(split="test") if f.where in places else f for f in report.findings
    ]
    report.rows = {"train": report.rows["train"] - len(places), "test": len(places)}
    report.formats["test"] = report.formats["train"]
    report.held_out = True
    return splits


def _tokenize(
    pairs: list[dict], split: str, tokenizer: PreTrainedTokenizerBase, revision: str
) -> Iterator[tuple]:
    """Add to `pairs` their tokens, as they are trained on, and yield what is wrong with them."""
    ends = end_tokens(tokenizer, _generation_config(tokenizer, revision))
    starts = range(0, len(pairs), CHUNK)
    for start in tqdm(starts, f"Tokens of {split}", disable=len(pairs) < 10_000):
        some = pairs[start : start + CHUNK]
        for index, ids in enumerate(_tokenized(some, tokenizer), start):
            if isinstance(ids, Exception):
                yield index, "template", f"the chat template says: {ids}"
                continue
            for problem in tool_problems(pairs[index], ids, tokenizer):
                yield index, *problem
            for problem in token_problems(ids, ends):
                yield index, *problem
            # As arrays: lists of numbers take four times the memory.
            pairs[index] |= {name: np.array(ids[name], dtype=np.int64) for name in IDS}


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


def _as_dataset(pairs: list[dict], columns: list[str]) -> Dataset:
    """The pairs as a `Dataset`, with those of `columns` whose values all have one type.

    Messages with tool calls are kept as JSON: a table would fill each with the fields of all, and
    templates would show them.
    """
    messages = [m for pair in pairs for side in SIDES for m in pair[side]]
    plain = all(m.keys() == {"role", "content"} for m in messages)
    data = Dataset.from_dict(
        {side: [pair[side] for pair in pairs] for side in SIDES},
        features=Features(dict.fromkeys(SIDES, MESSAGES if plain else List(Json()))),
    )
    for name in columns:
        if name in (*SIDES, PLACE):
            continue
        missing = {} if name == "chat_template_kwargs" else None  # TRL unpacks it
        try:
            data = data.add_column(name, [pair.get(name, missing) for pair in pairs])
        except (ValueError, TypeError, OverflowError):  # what pyarrow's errors derive from
            print(f"Column {name!r} holds values of several types and is left out.")
    return data
