"""Load preference pairs of any common format, check them, look at them, and build your own.

python -m scripts.data --config configs/smollm2-135m-cpu.yaml         # lengths, one exact text
python -m scripts.data check --config …                              # every bad row, a figure
python -m scripts.data build --prompts data/prompts.jsonl --config … # on-policy pairs
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("data")

import argparse
import json
from collections import Counter
from collections.abc import Iterable

import pandas as pd
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from scripts.config import Config, config_from_args
from scripts.model import find_model, load_tokenizer, resolve_model
from scripts.pairs.checks import KINDS, SIDES, Finding, Report
from scripts.pairs.load import as_splits, fit_pairs, read_pairs, token_counts
from scripts.pairs.report import held_out_text, length_table, report_text
from scripts.pairs.sources import DataError, Source
from scripts.pairs.tokens import templated
from scripts.plan_memory import estimate_max_length, settle_max_length
from scripts.run_folder import dataset_origin, record_origin


def load_preferences(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The pairs that `cfg` names, checked and tokenised, as `train` and `test` splits.

    A dataset without a test split gives `test_split_size` of its prompts for one. Bad rows (see
    `checks.KINDS`) are an error or are left out and written, with the reason, to
    `dropped_rows.jsonl` in the run folder, as `on_bad_rows` says.

    Returns:
        Columns `prompt`, `chosen` and `rejected`, each a list of `{"role", "content"}` messages;
        `prompt_ids`, `chosen_ids` and `rejected_ids`, their tokens as TRL's trainer makes them, not
        yet cut at `max_length`; and any further column of the source.

    Raises:
        DataError: the data is not there, has no such split or columns, or no usable row; or it has
            bad rows, and `on_bad_rows` is `error`.
    """
    pairs, report = check_preferences(cfg, tokenizer, settle=True)
    record_origin(cfg, "dataset", dataset_origin(cfg))
    if bad := report.bad():
        count = len({(f.split, f.where) for f in bad})
        summary = f"{count} bad {'row' if count == 1 else 'rows'}{_worst(bad)}"
        first = f"first: {bad[0].where}, {bad[0].detail}"
        if cfg.recipe.on_bad_rows == "error":
            raise DataError(
                f"{summary}; {first}. `python -m scripts.data check` lists them all; correct them, "
                "or set on_bad_rows: drop"
            )
        if cfg.is_main_process:
            path = write_findings(cfg, "dropped_rows.jsonl", bad)
            print(f"Left out {summary}. {first}. All of them: {path}")
    require_pairs(pairs, report)
    if cfg.is_main_process:
        print(held_out_text(report.prompts["test"]))
    limits = {"train": cfg.recipe.train_samples, "test": cfg.recipe.eval_samples}
    return DatasetDict(
        {
            split: rows.shuffle(seed=cfg.dpo.seed).select(range(limits[split]))
            if limits[split] is not None and limits[split] < len(rows)
            else rows
            for split, rows in pairs.items()
        }
    )


def check_preferences(
    cfg: Config, tokenizer: PreTrainedTokenizerBase | None = None, settle: bool = False
) -> tuple[DatasetDict, Report]:
    """The pairs that `cfg` names without the bad rows, as `train` and `test`, and what was found.

    Without a `tokenizer`, nothing that depends on tokens is checked. A `max_length` of `auto` is
    chosen from the tokens: for good with `settle`, else only for this check.

    Raises:
        DataError: the data is not there, is empty, or has no such split or columns.
    """
    source = Source(
        name=cfg.script.dataset_name,
        config=cfg.script.dataset_config,
        revision=cfg.recipe.dataset_revision,
        train=cfg.script.dataset_train_split,
        test=cfg.script.dataset_test_split,
        needs_test="dataset_test_split" in cfg.given,
        format=cfg.recipe.dataset_format,
        columns=cfg.recipe.dataset_columns or {},
        score_margin=cfg.recipe.score_margin,
        held_out=cfg.recipe.test_split_size,
        seed=cfg.dpo.seed,
    )
    splits, report = read_pairs(source, tokenizer, cfg.model.model_revision)
    if tokenizer:
        if cfg.length_is_open and splits["train"]:
            (settle_max_length if settle else estimate_max_length)(
                cfg, token_counts(splits["train"])
            )
        fit_pairs(splits, report, cfg.dpo.max_length, cfg.dpo.truncation_mode)
    return as_splits(splits, report, source), report


def require_pairs(pairs: DatasetDict, report: Report) -> None:
    """Refuse data that leaves nothing to train on, or nothing to measure with.

    Raises:
        DataError: a split has no usable pair.
    """
    for split in (split for split, rows in pairs.items() if len(rows) == 0):
        if report.held_out and any(map(len, pairs.values())):
            raise DataError(
                f"only one prompt has usable pairs{_worst(report.bad())}; it takes two at least, "
                "one to train on and one to hold out"
            )
        total = report.rows[split] or sum(report.rows.values())
        which = split if report.rows[split] else "the data"
        bad = [f for f in report.bad() if f.split == split]
        first = f"; first: {bad[0].where}, {bad[0].detail}" if bad else ""
        raise DataError(
            f"none of the {total} rows of {which} is a usable pair{_worst(bad)}{first}; "
            "python -m scripts.data check names each row and the way to fix it"
        )


def _worst(bad: list[Finding]) -> str:
    """The most frequent faults of bad rows."""
    counts = Counter(f.kind for f in bad).most_common(3)
    return "".join(f"; {count} × {KINDS[kind].what}" for kind, count in counts)


def write_findings(cfg: Config, name: str, findings: Iterable[Finding]) -> str:
    """Write findings, one a line with the way to fix it, to the run folder; its path."""
    path = cfg.run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for finding in findings:
            row = finding._asdict() | {"fix": KINDS[finding.kind].fix}
            file.write(json.dumps(row) + "\n")
    return str(path)


def token_lengths(pairs: Dataset) -> pd.DataFrame:
    """Tokens of prompt, chosen and rejected: one row a pair, template tokens included."""
    return pd.DataFrame(token_counts(pairs), columns=SIDES)


def length_lesson(lengths: pd.DataFrame) -> str:
    """How far length alone tells the chosen answers from the rejected ones, in a sentence."""
    gap = lengths["chosen"] - lengths["rejected"]
    shorter = (gap < 0).mean() + (gap == 0).mean() / 2
    return (
        f"chosen is the shorter answer in {shorter:.0%} of the pairs (ties count half), "
        f"by {-gap.median():.0f} tokens at the median"
    )


def show_text(pairs: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the exact text of the first training pair."""
    for part, text in templated(pairs["train"][0], tokenizer).items():
        print(f"--- {part}\n{text}")


def look(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the lengths of the pairs of either split, and the exact text of the first."""
    pairs = load_preferences(cfg, tokenizer)
    for split, rows in pairs.items():
        print(f"\n{split}: {len(rows)} pairs\n{length_table(token_lengths(rows))}")
    print("\nOne pair as the model sees it:")
    show_text(pairs, tokenizer)


def check_data(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the report on the data, and write its findings and a figure to the run folder.

    Raises:
        DataError: a split has no usable pair, or there are bad rows and `on_bad_rows` is `error`.
    """
    pairs, report = check_preferences(cfg, tokenizer, settle=True)
    print(report_text(report))
    if len(pairs["train"]):
        print("\nOne pair as the model sees it:")
        show_text(pairs, tokenizer)
    from scripts import plots  # matplotlib is needed for this figure only

    print(f"\nAll findings: {write_findings(cfg, 'data_check/findings.jsonl', report.findings)}")
    require_pairs(pairs, report)
    figure = cfg.run_dir / "data_check" / "check.png"
    plots.save(plots.data_check(report), figure)
    print(f"Figure: {figure}")
    bad = len({(f.split, f.where) for f in report.bad()})
    if bad and cfg.recipe.on_bad_rows == "error":
        raise DataError(f"{bad} bad rows; correct them, or set on_bad_rows: drop")
    if bad:
        print(f"A run leaves the {bad} bad rows out (on_bad_rows: drop).")


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    if args.action == "build":
        from scripts.pairs.build import build_pairs, prepare  # which load more: they need a model
        from scripts.pairs.sampling import sampler_class

        job = prepare(args, cfg.dpo.device)  # mistakes show before a model is fetched
        source = find_model(cfg)
        print(source.where)
        sampler = sampler_class(args.backend)(
            cfg.model.model_name_or_path, source.path, source.commit, cfg.model.dtype,
            cfg.dpo.device, args.max_new_tokens, args.temperature, args.top_p,
        )  # fmt: skip
        return build_pairs(args, *job, sampler)
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    (check_data if args.action == "check" else look)(cfg, tokenizer)
