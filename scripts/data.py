"""Load preference pairs of any common format, check them, look at them, and build your own.

python -m scripts.data --config configs/smollm2-135m-cpu.yaml         # lengths, one exact text
python -m scripts.data check --config …                              # every bad row, a figure
python -m scripts.data build --prompts data/prompts.jsonl --config … # on-policy pairs
"""

from __future__ import annotations

import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict, Features, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from scripts.checks import (
    KINDS,
    Finding,
    Report,
    leaks,
    prompt_key,
    repeats,
    report_text,
    special_pattern,
    text_problems,
    token_problems,
)
from scripts.config import Config, ConfigError, argument_parser, command, config_from_args
from scripts.formats import FORMATS, USED, BadRow, detect, fits, to_pair
from scripts.sources import DataError, Row, read_source

SIDES = ("prompt", "chosen", "rejected")
MESSAGES = [Features(role=Value("string"), content=Value("string"))]


def load_preferences(cfg: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> DatasetDict:
    """The pairs that `cfg` names, checked, as `train` and `test` splits.

    A dataset without a test split gives `test_split_size` of its prompts for one. Bad rows (see
    `checks.KINDS`) are an error or are left out and written, with the reason, to
    `dropped_rows.jsonl` in the run folder, as `on_bad_rows` says. What depends on tokens (special
    tokens typed in the text, prompts that leave no room) is checked when `tokenizer` is given.

    Returns:
        Columns `prompt`, `chosen` and `rejected`, each a list of `{"role", "content"}` messages;
        any further column of the source is kept.

    Raises:
        DataError: the data is not there, has no such split or columns, or no usable row; or it has
            bad rows, and `on_bad_rows` is `error`.
    """
    pairs, report = check_preferences(cfg, tokenizer)
    if report.bad():
        _settle(cfg, report)
    for split, rows in pairs.items():
        if len(rows) == 0:
            total = report.rows[split]
            raise DataError(f"none of the {total} rows of {split} is a usable pair{_worst(report)}")
    limits = {"train": cfg.recipe.train_samples, "test": cfg.recipe.eval_samples}
    return DatasetDict(
        {
            split: rows.shuffle(seed=cfg.dpo.seed).select(range(limits[split]))
            if limits[split] is not None and limits[split] < len(rows)
            else rows
            for split, rows in pairs.items()
        }
    )


def _worst(report: Report) -> str:
    counts = Counter(f.kind for f in report.bad()).most_common(3)
    return "".join(f"; {count} × {KINDS[kind].what}" for kind, count in counts)


def _settle(cfg: Config, report: Report) -> None:
    """Raise for the bad rows, or write them down and say so, as the config asks."""
    bad = report.bad()
    rows = len({(f.split, f.where) for f in bad})
    told = f"{rows} bad {'row' if rows == 1 else 'rows'}{_worst(report)}"
    first = f"first: {bad[0].where}, {bad[0].detail}"
    if cfg.recipe.on_bad_rows == "error":
        raise DataError(
            f"{told}; {first}. `python -m scripts.data check` lists them all; mend them, or set "
            "on_bad_rows: drop"
        )
    path = write_findings(cfg, "dropped_rows.jsonl", bad)
    print(f"Left out {told}. {first}. All of them: {path}")


def write_findings(cfg: Config, name: str, findings: Iterable[Finding]) -> str:
    """Write findings, one a line with the way to mend it, to the run folder; its path."""
    path = cfg.run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for finding in findings:
            row = finding._asdict() | {"mend": KINDS[finding.kind].cure}
            file.write(json.dumps(row) + "\n")
    return str(path)


def check_preferences(
    cfg: Config, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[DatasetDict, Report]:
    """Read and check everything that `cfg` names; the pairs without the bad rows, and the report.

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
    for split, found in good.items():
        good[split] = _without(found, split, repeats(*_pairs_and_wheres(found)), report)
    held_out, wheres = _pairs_and_wheres(good["test"])
    found = leaks(_pairs_and_wheres(good["train"])[0], held_out, wheres)
    good["train"] = _without(good["train"], "train", found, report)
    if tokenizer:
        for split, found in good.items():
            problems = _token_checks(found, split, tokenizer, report)
            good[split] = _without(found, split, problems, report)
    names = dict.fromkeys(key for found in good.values() for _, pair in found for key in pair)
    columns = [name for name in names if name not in SIDES]
    return DatasetDict({k: _as_dataset(found, columns) for k, found in good.items()}), report


def _pairs_and_wheres(found: list[tuple[str, dict]]) -> tuple[list[dict], list[str]]:
    return [pair for _, pair in found], [where for where, _ in found]


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
            (where, row and {names.get(k, k): v for k, v in row.items()}, told)
            for where, row, told in rows
        ]
    name = _format_of(rows, cfg)
    good = []
    for where, row, told in rows:
        if row is None:
            kind = "encoding" if told.startswith("not UTF-8") else "unreadable"
            report.findings.append(Finding(split, where, kind, told))
            continue
        try:
            pair = to_pair(row, name)
        except BadRow as error:
            report.findings.append(Finding(split, where, error.kind, error.detail))
            continue
        problems = list(text_problems(pair, special))
        report.findings += [Finding(split, where, kind, detail) for kind, detail in problems]
        if not any(KINDS[kind].bad for kind, _ in problems):
            kept = {k: v for k, v in row.items() if k not in USED}
            good.append((where, kept | pair))
    return good


def _require_columns(names: dict[str, str], rows: list[Row]) -> None:
    """Raise a `DataError` for a rename whose source no row has."""
    columns = {key for _, row, _ in rows[:1000] for key in row or ()}
    for old in names:
        if old not in columns:
            near = difflib.get_close_matches(old, columns, n=1, cutoff=0.0)
            raise DataError(
                f"dataset_columns renames {old!r}, which no row has; did you mean "
                f"{near[0] if near else 'another file'!r}?"
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
        wanted = "; ".join(f"{n}: {', '.join(needed)}" for n, (needed, _) in FORMATS.items())
        raise DataError(
            f"columns {', '.join(sorted(columns))} fit no known format ({wanted}); name yours in "
            "dataset_columns ({their_name: our_name}), or set dataset_format"
        )
    return name


def _hold_out(found: list, cfg: Config) -> tuple[list, list]:
    """Part `test_split_size` of the prompts off, all pairs of a prompt going the same way."""
    keys = [prompt_key(pair) for _, pair in found]
    names = sorted(set(keys))
    count = max(1, round(cfg.recipe.test_split_size * len(names)))
    held = set(Random(cfg.dpo.seed).sample(names, min(count, len(names))))
    train = [f for f, key in zip(found, keys, strict=True) if key not in held]
    return train, [f for f, key in zip(found, keys, strict=True) if key in held]


def _without(found: list, split: str, problems: Iterable, report: Report) -> list:
    """`found` without the pairs that have bad ones among `problems`; all go to `report`."""
    bad = set()
    for index, kind, detail in problems:
        report.findings.append(Finding(split, found[index][0], kind, detail))
        if KINDS[kind].bad:
            bad.add(index)
    if split in report.lengths:
        report.lengths[split] = np.delete(report.lengths[split], sorted(bad), axis=0)
    return [f for i, f in enumerate(found) if i not in bad]


def _token_checks(
    found: list, split: str, tokenizer: PreTrainedTokenizerBase, report: Report
) -> Iterator[tuple]:
    """Checks of the tokens, a few thousand pairs at a time: lists of numbers are large."""
    ends = {tokenizer.eos_token_id}
    lengths, index = [], 0
    starts = range(0, len(found), 2000)
    for start in tqdm(starts, f"Checking the tokens of {split}", disable=len(found) < 10_000):
        texts = [templated(pair, tokenizer) for _, pair in found[start : start + 2000]]
        ids = {
            side: tokenizer([t[side] for t in texts], add_special_tokens=False)["input_ids"]
            for side in SIDES
        }
        for row in zip(*ids.values(), strict=True):
            lengths.append([len(part) for part in row])
            pair_ids = dict(zip(SIDES, row, strict=True))
            for kind, detail in token_problems(
                pair_ids, ends, report.max_length, report.truncation
            ):
                yield index, kind, detail
            index += 1
    report.lengths[split] = np.array(lengths, dtype=np.int64).reshape(-1, 3)


def _as_dataset(found: list[tuple[str, dict]], columns: list[str]) -> Dataset:
    """The pairs as a `Dataset`, with those of `columns` that have one type throughout."""
    data = Dataset.from_dict(
        {side: [pair[side] for _, pair in found] for side in SIDES},
        features=Features(dict.fromkeys(SIDES, MESSAGES)),
    )
    for name in columns:
        try:
            data = data.add_column(name, [pair.get(name) for _, pair in found])
        except (ValueError, TypeError, OverflowError):  # what pyarrow's errors derive from
            print(f"Column {name!r} holds values of several types and is left out.")
    return data


def templated(pair: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The exact text of one pair: `prompt` as the model sees it, and what each answer adds."""
    prompt = tokenizer.apply_chat_template(
        pair["prompt"], tokenize=False, add_generation_prompt=True
    )
    answers = {
        side: tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=False)
        for side in ("chosen", "rejected")
    }
    return {"prompt": prompt} | {k: text.removeprefix(prompt) for k, text in answers.items()}


def token_lengths(pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Tokens of prompt, chosen and rejected: one row a pair, template tokens included."""
    texts = pd.DataFrame([templated(pair, tokenizer) for pair in pairs])

    def count(column: pd.Series) -> list[int]:
        return [len(ids) for ids in tokenizer(list(column), add_special_tokens=False)["input_ids"]]

    return texts.apply(count)


def length_table(lengths: pd.DataFrame) -> pd.DataFrame:
    """Median, 95th percentile and maximum of `token_lengths`."""
    table = lengths.quantile([0.5, 0.95, 1.0]).T.round().astype(int)
    return table.set_axis(["median", "p95", "max"], axis=1).rename_axis("tokens of")


def look(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the lengths of the pairs of either split, and the exact text of the first."""
    pairs = load_preferences(cfg, tokenizer)
    for split, rows in pairs.items():
        print(f"\n{split}: {len(rows)} pairs")
        print(length_table(token_lengths(rows, tokenizer)).to_string())
    for part, text in templated(pairs["train"][0], tokenizer).items():
        print(f"\n--- {part}\n{text}")


def check(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print everything that was found, draw it, and write it to the run folder.

    Raises:
        DataError: there are bad rows, and `on_bad_rows` is `error`.
    """
    from scripts import plots

    _, report = check_preferences(cfg, tokenizer)
    print(report_text(report))
    folder = cfg.run_dir / "data_check"
    plots.save(plots.data_check(report), folder / "check.png")
    print(f"\nAll findings: {write_findings(cfg, 'data_check/findings.jsonl', report.findings)}")
    print(f"Figure: {folder / 'check.png'}")
    bad = len({(f.split, f.where) for f in report.bad()})
    if bad and cfg.recipe.on_bad_rows == "error":
        raise DataError(f"{bad} bad rows; mend them, or set on_bad_rows: drop")
    if bad:
        print(f"A run leaves the {bad} bad rows out (on_bad_rows: drop).")


def main() -> None:
    from scripts.models import load_tokenizer, resolve_model

    action, arguments = "look", sys.argv[1:]
    if arguments and arguments[0] in ("look", "check", "build"):
        action, *arguments = arguments
    if action == "build":
        from scripts.build_pairs import main as build

        return build(arguments)
    parser = argument_parser(__doc__)
    parser.usage = "python -m scripts.data [look | check | build] [options]"
    cfg = config_from_args(parser.parse_args(arguments))
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    (check if action == "check" else look)(cfg, tokenizer)


if __name__ == "__main__":
    command(main)
