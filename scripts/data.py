"""Load preference pairs in TRL's explicit conversational form, and look at them.

    python -m scripts.data --config configs/smollm2-135m-cpu.yaml

prints the lengths of the pairs that a config names and the exact text of the first one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from scripts.config import (
    ROOT,
    Config,
    RecipeError,
    argument_parser,
    command,
    config_from_args,
)


class DataError(RecipeError):
    """The data cannot be read as preference pairs: what, where and how to mend it."""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def from_explicit(row: dict) -> dict:
    """TRL's explicit prompt: `prompt`, `chosen`, `rejected`, each text or a list of messages."""
    return {
        column: [_message(role, row[column])] if isinstance(row[column], str) else row[column]
        for column, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    }


def from_orca(row: dict) -> dict:
    """Intel/orca_dpo_pairs: `system` (often empty), `question`, `chosen`, `rejected` as text."""
    system = [_message("system", row["system"])] if (row.get("system") or "").strip() else []
    return {
        "prompt": [*system, _message("user", row["question"])],
        "chosen": [_message("assistant", row["chosen"])],
        "rejected": [_message("assistant", row["rejected"])],
    }


# The columns that tell a format, and how one of its rows becomes messages.
FORMATS: dict[str, tuple[set[str], Callable[[dict], dict]]] = {
    "explicit": ({"prompt", "chosen", "rejected"}, from_explicit),
    "orca": ({"question", "chosen", "rejected"}, from_orca),
}


def load_preferences(cfg: Config) -> DatasetDict:
    """The pairs that `cfg` names, as `train` and `test` splits.

    `dataset_name` is a folder of this project or of yours (a data card may name its splits) or a
    dataset on the hub. A dataset without a test split gives `test_split_size` of its rows for one.
    Rows whose two answers are the same, or one of which is empty, teach nothing and are left out.

    Returns:
        Columns `prompt`, `chosen` and `rejected`, each a list of `{"role", "content"}` messages;
        any further column of the source is kept.

    Raises:
        DataError: the data is not there, has no such split or columns, or no usable row.
    """
    args, recipe = cfg.script, cfg.recipe
    name = args.dataset_name
    if name is None:
        raise DataError("dataset_name is not set: name a folder with pairs or a hub dataset")
    local = next((p for p in (ROOT / name, Path(name)) if p.is_dir()), None)
    try:
        # A folder is read anew each time: the cache of `datasets` may not notice an edited file.
        fresh = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
        source = load_dataset(str(local or name), args.dataset_config, **(fresh if local else {}))
    except Exception as error:  # each of its many loaders raises errors of its own
        reason = str(error).splitlines()[0]
        raise DataError(f"cannot load dataset {args.dataset_name!r}: {reason}") from error
    if args.dataset_train_split not in source:
        raise DataError(
            f"{args.dataset_name} has no split {args.dataset_train_split!r}, only "
            f"{', '.join(source)}; set dataset_train_split"
        )
    train = source[args.dataset_train_split]
    if args.dataset_test_split in source:
        test = source[args.dataset_test_split]
    else:
        parts = train.train_test_split(recipe.test_split_size, seed=cfg.dpo.seed)
        train, test = parts["train"], parts["test"]
    return DatasetDict(
        train=_as_pairs(train, recipe.dataset_format, recipe.train_samples, cfg.dpo.seed),
        test=_as_pairs(test, recipe.dataset_format, recipe.eval_samples, cfg.dpo.seed),
    )


def _as_pairs(rows: Dataset, name: str, limit: int | None, seed: int) -> Dataset:
    columns = set(rows.column_names)
    if name == "auto":
        name = next((n for n, (needed, _) in FORMATS.items() if needed <= columns), "")
    if name not in FORMATS or not FORMATS[name][0] <= columns:
        wanted = "; ".join(f"{n}: {', '.join(sorted(c))}" for n, (c, _) in FORMATS.items())
        raise DataError(
            f"columns {', '.join(sorted(columns))} fit no known format ({wanted}); rename the "
            "columns, or set dataset_format to the format they are in"
        )
    if limit is not None and limit < len(rows):
        rows = rows.shuffle(seed=seed).select(range(limit))
    used = [c for c in ("system", "question") if name == "orca" and c in columns]
    pairs = rows.map(FORMATS[name][1], remove_columns=used, desc=f"Reading {name} pairs")
    usable = pairs.filter(_is_usable, desc="Leaving out empty and equal answers")
    if len(usable) < len(pairs):
        print(f"Left out {len(pairs) - len(usable)} pairs with an empty answer or two equal ones.")
    if len(usable) == 0:
        raise DataError(f"none of the {len(rows)} rows is a usable pair")
    return usable


def _is_usable(pair: dict) -> bool:
    chosen, rejected = (pair[side][-1]["content"].strip() for side in ("chosen", "rejected"))
    return bool(chosen) and bool(rejected) and chosen != rejected


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


def main() -> None:
    from scripts.models import load_tokenizer, resolve_model

    cfg = config_from_args(argument_parser(__doc__).parse_args())
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path)
    pairs = load_preferences(cfg)
    for split, rows in pairs.items():
        print(f"\n{split}: {len(rows)} pairs")
        print(length_table(token_lengths(rows, tokenizer)).to_string())
    for part, text in templated(pairs["train"][0], tokenizer).items():
        print(f"\n--- {part}\n{text}")


if __name__ == "__main__":
    command(main)
