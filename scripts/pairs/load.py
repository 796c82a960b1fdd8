"""Read and check everything that a config names as preference pairs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from random import Random

import numpy as np
from datasets import Dataset, DatasetDict, Features, Json, List, Value
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.config import AUTO, Config, ConfigError
from scripts.pairs.checks import (
    KINDS,
    SIDES,
    Finding,
    Report,
    leaks,
    near_repeats,
    prompt_key,
    repeats,
    special_pattern,
    text_problems,
    token_problems,
    tool_problems,
)
from scripts.pairs.formats import FORMATS, HOLDS, detect, fits, further_columns, to_pair
from scripts.pairs.messages import BadRow
from scripts.pairs.report import WIDTH, Z, covering_length
from scripts.pairs.sources import DataError, Row, named_splits, read_source
from scripts.pairs.tokens import end_tokens, tokenize_pairs
from scripts.pairs.unpaired import pair_up

CHUNK = 2000  # pairs tokenised at a time, and at most for choosing max_length
MOST_HELD_OUT = 0.2
MESSAGES = [Features(role=Value("string"), content=Value("string"))]


def check_preferences(
    cfg: Config,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settle: Callable[[Config, np.ndarray], object] | None = None,
) -> tuple[DatasetDict, Report]:
    """Read and check the data that `cfg` names.

    Without a `tokenizer`, what depends on tokens is not checked. Where `max_length` is `auto`,
    `settle` is given the tokens of prompt, chosen and rejected of pairs of the data, (pairs, 3),
    and puts a number into `cfg`; without it, the report takes the length that covers most pairs.
    Returns the pairs without the bad rows, as `train` and `test`, and the report on all rows. Data
    without a test split has one drawn from its usable pairs, after all checks, so that no bad row
    is held out. On the way, the pairs of a split are a list of (place, pair): a place such as
    `train.jsonl:7` is what a finding is reported with.

    Raises:
        DataError: the data is not there, is empty, or has no such split or columns.
    """
    source = read_source(cfg)
    report = Report(truncation=cfg.dpo.truncation_mode)
    train, test = (source.get(name) for name in named_splits(cfg, list(source)))
    special = special_pattern(tokenizer) if tokenizer else None
    good = {"train": _readable(train, "train", cfg, special, report)}
    if test is not None:
        good["test"] = _readable(test, "test", cfg, special, report)
    for split, placed in good.items():
        placed = _without(placed, split, repeats(*_pairs_and_wheres(placed)), report)
        good[split] = _without(placed, split, near_repeats(*_pairs_and_wheres(placed)), report)
    if test is not None:
        held_out, wheres = _pairs_and_wheres(good["test"])
        problems = leaks(_pairs_and_wheres(good["train"])[0], held_out, wheres)
        good["train"] = _without(good["train"], "train", problems, report)
    names = dict.fromkeys(key for placed in good.values() for _, pair in placed for key in pair)
    columns = [name for name in names if name not in SIDES]
    pairs = DatasetDict({k: _as_dataset(placed, columns) for k, placed in good.items()})
    if tokenizer:
        report.max_length = _max_length(cfg, pairs, tokenizer, settle)
        ends = end_tokens(tokenizer, _generation_config(cfg, tokenizer))
        for split, placed in good.items():
            problems = _token_checks(pairs[split], split, tokenizer, ends, report)
            bad = _bad(placed, split, problems, report)
            _keep(sorted({*range(len(placed))} - bad), split, pairs, good, report)
    else:
        report.max_length = None if cfg.length_is_open else cfg.dpo.max_length
    if test is None:
        _hold_out(pairs, good, report, cfg)
    report.prompts = {k: len({prompt_key(p) for _, p in placed}) for k, placed in good.items()}
    return pairs, report


def _keep(
    rows: list[int], split: str, pairs: DatasetDict, good: dict[str, list], report: Report
) -> None:
    """Keep only `rows` of a split, in the pairs, their places and their lengths alike."""
    if len(rows) < len(good[split]):
        pairs[split] = pairs[split].select(rows)
        good[split] = [good[split][i] for i in rows]
        if split in report.lengths:
            report.lengths[split] = report.lengths[split][rows]


def _max_length(
    cfg: Config,
    pairs: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    settle: Callable[[Config, np.ndarray], object] | None,
) -> int | None:
    """The config's `max_length`, chosen now if it is `auto`, from a sample of training pairs."""
    if not cfg.length_is_open:
        return cfg.dpo.max_length
    count = len(pairs["train"])
    some = sorted(Random(cfg.dpo.seed).sample(range(count), min(CHUNK, count)))
    rows = _tokenized(_columns_read(pairs["train"]).select(some).to_list(), tokenizer)
    sizes = [[len(row[f"{s}_ids"]) for s in SIDES] for row in rows if isinstance(row, dict)]
    if not sizes:
        return cfg.dpo.max_length
    lengths = np.array(sizes)
    if settle is None:
        return covering_length(lengths)
    settle(cfg, lengths)
    return cfg.dpo.max_length


def _columns_read(pairs: Dataset) -> Dataset:
    """`pairs` with what tokens are made of."""
    read = [*SIDES, "tools", "chat_template_kwargs"]
    return pairs.select_columns([name for name in read if name in pairs.column_names])


def _generation_config(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    """The `generation_config.json` beside the tokenizer, if there is one."""
    try:
        return GenerationConfig.from_pretrained(
            tokenizer.name_or_path, revision=cfg.model.model_revision
        )
    except OSError:
        return None


def _pairs_and_wheres(placed: list[tuple[str, dict]]) -> tuple[list[dict], list[str]]:
    """The pairs of a split, and their places."""
    return [pair for _, pair in placed], [where for where, _ in placed]


def _readable(
    rows: list[Row], split: str, cfg: Config, special, report: Report
) -> list[tuple[str, dict]]:
    """The rows that can be read as pairs, each with its place; findings go to `report`."""
    report.rows[split] = len(rows)
    if not rows:
        raise DataError(f"{cfg.script.dataset_name} has no rows in {split}: it is empty")
    if all(row is None for _, row, _ in rows):
        where, _, problem = rows[0]
        raise DataError(f"none of the {len(rows)} rows of {split} can be read; {where}: {problem}")
    if names := cfg.recipe.dataset_columns:
        _require_columns(names, rows)
        rows = [
            (where, row and {names.get(k, k): v for k, v in row.items()}, problem)
            for where, row, problem in rows
        ]
    report.formats[split] = name = _format_of(rows, cfg)
    rows = pair_up(rows) if name == "unpaired" else rows
    good = []
    for where, row, problem in rows:
        if row is None:
            kind = "encoding" if problem.startswith("not UTF-8") else "unreadable"
            report.findings.append(Finding(split, where, kind, problem))
            continue
        try:
            pair = further_columns(row, name) | to_pair(row, name, cfg.recipe.score_margin)
        except BadRow as error:
            report.findings.append(Finding(split, where, error.kind, error.detail))
            continue
        problems = list(text_problems(pair, special))
        report.findings += [Finding(split, where, kind, detail) for kind, detail in problems]
        if not any(KINDS[kind].bad for kind, _ in problems):
            good.append((where, pair))
    return good


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


def _format_of(rows: list[Row], cfg: Config) -> str:
    name = cfg.recipe.dataset_format
    sample = [row for _, row, _ in rows[:1000] if row is not None]
    columns = {key for row in sample for key in row}
    if name == "auto":
        name = detect(columns, sample[:100])
    elif name not in FORMATS:
        raise ConfigError(f"dataset_format {name!r} is none of auto, {', '.join(FORMATS)}")
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
    for name in HOLDS:
        if fits(name, columns) and sample and not {"chosen", "rejected"} & columns:
            try:
                FORMATS[name].convert(sample[0])
            except BadRow as error:
                return (
                    f"columns {_listed(columns)} would be {name}, but no row can be read: {error}"
                )
    if {"chosen", "rejected"} <= columns:
        return (
            f"columns {_listed(columns)}: none is known to hold the prompt; name the one that does "
            "in dataset_columns, as {its_name: prompt}"
        )
    wanted = "; ".join(f"{n}: {', '.join(needed)}" for n, (needed, *_) in FORMATS.items())
    return (
        f"columns {_listed(columns) or '(none)'} fit no known format ({wanted}); name yours in "
        "dataset_columns ({their_name: our_name}), or set dataset_format"
    )


def held_out_count(size: float | str, prompts: int) -> int:
    """How many of `prompts` prompts are held out: the share `size`, or with `auto` as many as tell
    a share within `WIDTH`, but at most `MOST_HELD_OUT` of them."""
    if size == AUTO:
        return max(1, min(math.ceil(Z**2 / 4 / WIDTH**2), round(MOST_HELD_OUT * prompts)))
    return max(1, round(size * prompts))


def _hold_out(pairs: DatasetDict, good: dict[str, list], report: Report, cfg: Config) -> None:
    """Draw the test split from the usable pairs, in place. All pairs of a prompt, in any spelling,
    go to the same side, and what was found of them along with them."""
    keys = [prompt_key(pair) for _, pair in good["train"]]
    names = sorted(set(keys))
    most = max(len(names) - 1, 1)  # one prompt at least is trained on, where there are two
    count = min(held_out_count(cfg.recipe.test_split_size, len(names)), most, len(names))
    held = set(Random(cfg.dpo.seed).sample(names, count))
    sides = {
        "train": [i for i, key in enumerate(keys) if key not in held],
        "test": [i for i, key in enumerate(keys) if key in held],
    }
    places = {good["train"][i][0] for i in sides["test"]}
    for parts in (pairs, good, report.lengths):
        if "train" in parts:
            parts["test"] = parts["train"]
    for split, rows in sides.items():
        _keep(rows, split, pairs, good, report)
    report.findings = [
        f._replace(split="test") if f.where in places else f for f in report.findings
    ]
    moved = len(sides["test"]) * (2 if report.formats["train"] == "unpaired" else 1)
    report.rows = {"train": report.rows["train"] - moved, "test": moved}
    report.formats["test"] = report.formats["train"]
    report.held_out = True


def _bad(placed: list, split: str, problems: Iterable, report: Report) -> set[int]:
    """Put all `problems` of the pairs of a split into `report`; which of the pairs are bad."""
    bad = set()
    for index, kind, detail in problems:
        report.findings.append(Finding(split, placed[index][0], kind, detail))
        if KINDS[kind].bad:
            bad.add(index)
    return bad


def _without(placed: list, split: str, problems: Iterable, report: Report) -> list:
    """`placed` without the pairs that have bad ones among `problems`; all go to `report`."""
    bad = _bad(placed, split, problems, report)
    return [pair for i, pair in enumerate(placed) if i not in bad]


def _token_checks(
    pairs: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, ends: set[int], report: Report
) -> Iterator[tuple]:
    """Checks of the tokens of `pairs`, the very rows that the trainer gets (a `Dataset` fills what
    a row lacks with None); their lengths go to `report`.

    A few thousand pairs at a time: lists of numbers are large.
    """
    pairs = _columns_read(pairs)
    lengths = []
    starts = range(0, len(pairs), CHUNK)
    for start in tqdm(starts, f"Checking the tokens of {split}", disable=len(pairs) < 10_000):
        some = pairs.select(range(start, min(start + CHUNK, len(pairs)))).to_list()
        rows = zip(some, _tokenized(some, tokenizer), strict=True)
        for index, (pair, row) in enumerate(rows, start=start):
            if isinstance(row, Exception):
                lengths.append([0, 0, 0])
                yield index, "template", f"the chat template says: {row}"
                continue
            for kind, detail in tool_problems(pair, row, tokenizer):
                yield index, kind, detail
            ids = {side: row[f"{side}_ids"] for side in SIDES}
            lengths.append([len(ids[side]) for side in SIDES])
            for kind, detail in token_problems(ids, ends, report.max_length, report.truncation):
                yield index, kind, detail
    report.lengths[split] = np.array(lengths, dtype=np.int64).reshape(-1, 3)


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


def _as_dataset(placed: list[tuple[str, dict]], columns: list[str]) -> Dataset:
    """The pairs as a `Dataset`, with those of `columns` whose values all have one type.

    Messages with tool calls are kept as JSON: a table would fill each with the fields of all, and
    templates would show them.
    """
    messages = [m for _, pair in placed for side in SIDES for m in pair[side]]
    plain = all(m.keys() == {"role", "content"} for m in messages)
    data = Dataset.from_dict(
        {side: [pair[side] for _, pair in placed] for side in SIDES},
        features=Features(dict.fromkeys(SIDES, MESSAGES if plain else List(Json()))),
    )
    for name in columns:
        missing = {} if name == "chat_template_kwargs" else None  # TRL unpacks it
        try:
            data = data.add_column(name, [pair.get(name, missing) for _, pair in placed])
        except (ValueError, TypeError, OverflowError):  # what pyarrow's errors derive from
            print(f"Column {name!r} holds values of several types and is left out.")
    return data
