"""Read and check everything that a config names as preference pairs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.config import Config, ConfigError
from scripts.pairs.checks import (
    KINDS,
    Finding,
    Report,
    leaks,
    prompt_key,
    repeats,
    special_pattern,
    text_problems,
    token_problems,
)
from scripts.pairs.formats import FORMATS, BadRow, detect, fits, further_columns, to_pair
from scripts.pairs.sources import DataError, Row, read_source
from scripts.pairs.tokens import SIDES, end_tokens, tokenize_pairs
from scripts.pairs.unpaired import pair_up

CHUNK = 2000  # pairs tokenised at a time
MESSAGES = [Features(role=Value("string"), content=Value("string"))]


def check_preferences(
    cfg: Config, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[DatasetDict, Report]:
    """Read and check the data that `cfg` names.

    Without a `tokenizer`, what depends on tokens is not checked. Returns the pairs without the bad
    rows, as `train` and `test`, and the report on all rows. On the way, the pairs of a split are a
    list of (place, pair): a place such as `train.jsonl:7` is what a finding is reported with.

    Raises:
        DataError: the data is not there, or has no such split or columns.
    """
    source = read_source(cfg.script)
    report = Report(max_length=cfg.dpo.max_length, truncation=cfg.dpo.truncation_mode)
    train, test = _named_splits(cfg, source)
    special = special_pattern(tokenizer) if tokenizer else None
    good = {}
    for split, rows in {"train": train, "test": test}.items():
        good[split] = _readable(rows, split, cfg, special, report) if rows is not None else None
    if good["test"] is None:
        good["train"], good["test"] = _hold_out(good["train"], cfg)
        total, held = report.rows["train"], len(good["test"])
        report.rows = {"train": total - held, "test": held}
    for split, placed in good.items():
        good[split] = _without(placed, split, repeats(*_pairs_and_wheres(placed)), report)
    held_out, wheres = _pairs_and_wheres(good["test"])
    problems = leaks(_pairs_and_wheres(good["train"])[0], held_out, wheres)
    good["train"] = _without(good["train"], "train", problems, report)
    names = dict.fromkeys(key for placed in good.values() for _, pair in placed for key in pair)
    columns = [name for name in names if name not in SIDES]
    pairs = DatasetDict({k: _as_dataset(placed, columns) for k, placed in good.items()})
    if tokenizer:
        ends = end_tokens(tokenizer, _generation_config(cfg, tokenizer))
        for split, placed in good.items():
            problems = _token_checks(pairs[split], split, tokenizer, ends, report)
            bad = _bad(placed, split, problems, report)
            if bad:
                pairs[split] = pairs[split].select(sorted({*range(len(placed))} - bad))
                lengths = np.delete(report.lengths[split], sorted(bad), axis=0)
                report.lengths[split] = lengths
    return pairs, report


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


def _named_splits(cfg: Config, source: dict[str, list[Row]]) -> tuple[list[Row], list[Row] | None]:
    args = cfg.script
    if args.dataset_train_split not in source:
        raise DataError(
            f"{args.dataset_name} has no split {args.dataset_train_split!r}, only "
            f"{', '.join(source)}; set dataset_train_split"
        )
    return source[args.dataset_train_split], source.get(args.dataset_test_split)


def _readable(
    rows: list[Row], split: str, cfg: Config, special, report: Report
) -> list[tuple[str, dict]]:
    """The rows that can be read as pairs, each with its place; findings go to `report`."""
    report.rows[split] = len(rows)
    if names := cfg.recipe.dataset_columns:
        _require_columns(names, rows)
        rows = [
            (where, row and {names.get(k, k): v for k, v in row.items()}, problem)
            for where, row, problem in rows
        ]
    name = _format_of(rows, cfg)
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
    if name is None or not fits(name, columns):
        wanted = "; ".join(f"{n}: {', '.join(needed)}" for n, (needed, *_) in FORMATS.items())
        raise DataError(
            f"columns {', '.join(sorted(columns))} fit no known format ({wanted}); name yours in "
            "dataset_columns ({their_name: our_name}), or set dataset_format"
        )
    return name


def _hold_out(placed: list, cfg: Config) -> tuple[list, list]:
    """Draw `test_split_size` of the prompts for the test split: (training pairs, test pairs). All
    pairs of a prompt, in any spelling, go to the same side."""
    keys = [prompt_key(pair) for _, pair in placed]
    names = sorted(set(keys))
    count = max(1, round(cfg.recipe.test_split_size * len(names)))
    held = set(Random(cfg.dpo.seed).sample(names, min(count, len(names))))
    train = [f for f, key in zip(placed, keys, strict=True) if key not in held]
    return train, [f for f, key in zip(placed, keys, strict=True) if key in held]


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
    read = [*SIDES, "tools", "chat_template_kwargs"]
    pairs = pairs.select_columns([name for name in read if name in pairs.column_names])
    lengths = []
    starts = range(0, len(pairs), CHUNK)
    for start in tqdm(starts, f"Checking the tokens of {split}", disable=len(pairs) < 10_000):
        some = pairs.select(range(start, min(start + CHUNK, len(pairs)))).to_list()
        for index, row in enumerate(_tokenized(some, tokenizer), start=start):
            if isinstance(row, TemplateError):
                lengths.append([0, 0, 0])
                yield index, "template", f"the chat template says: {row}"
                continue
            ids = {side: row[f"{side}_ids"] for side in SIDES}
            lengths.append([len(ids[side]) for side in SIDES])
            for kind, detail in token_problems(ids, ends, report.max_length, report.truncation):
                yield index, kind, detail
    report.lengths[split] = np.array(lengths, dtype=np.int64).reshape(-1, 3)


def _tokenized(pairs: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict | TemplateError]:
    """`tokenize_pairs`, with the template's error in place of a pair that it refuses."""
    try:
        return tokenize_pairs(pairs, tokenizer)
    except TemplateError as error:
        if len(pairs) == 1:
            return [error]
    return [row for pair in pairs for row in _tokenized([pair], tokenizer)]


def _as_dataset(placed: list[tuple[str, dict]], columns: list[str]) -> Dataset:
    """The pairs as a `Dataset`, with those of `columns` whose values all have one type."""
    data = Dataset.from_dict(
        {side: [pair[side] for _, pair in placed] for side in SIDES},
        features=Features(dict.fromkeys(SIDES, MESSAGES)),
    )
    for name in columns:
        missing = {} if name == "chat_template_kwargs" else None  # TRL unpacks it
        try:
            data = data.add_column(name, [pair.get(name, missing) for _, pair in placed])
        except (ValueError, TypeError, OverflowError):  # what pyarrow's errors derive from
            print(f"Column {name!r} holds values of several types and is left out.")
    return data
