"""Measure the tuned model against the base model on held-out prompts and pairs.

    python -m scripts.evaluate --config outputs/<run>/config.yaml

repeats the evaluation of a finished run from its saved adapter.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("evaluate")  # before the libraries load, so that --help is answered at once

import argparse
import html
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from trl import DPOTrainer

from scripts.adapter import load_adapter, require_adapter
from scripts.config import Config, config_from_args
from scripts.generation import generate_replies
from scripts.measures.statistics import bootstrap
from scripts.measures.text import fact_recall, repeated_ngram_share
from scripts.pairs.tokens import template_options, tokenize_prompts
from scripts.training import assemble

# What is measured: how it is called in the table, and whether more or less of it is better.
MEASURES = {
    "length": "reply length (tokens)",
    "finished": "replies that finish",
    "repeated": "repeated 4-grams",
    "base_nll": "base-model loss per token",
    "facts": "key facts mentioned",
}


@torch.no_grad()
def pair_logps(
    trainer: DPOTrainer, rows: list[dict], max_length: int | None = None, policy: bool = True
) -> dict[str, np.ndarray]:
    """Log-probabilities of both answers of tokenised pairs, under policy and reference, in nats.

    `rows` have `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's trainer tokenises them;
    `max_length` cuts them as in training. Returns arrays of shape (pairs,), in the rows' order:
    `ref_chosen`, `ref_rejected` and, with `policy`, `chosen` and `rejected`. Each is a sum over
    the answer's tokens, the log pi(y|x) of the DPO paper's eq. 7.
    """
    model, size = trainer.model, trainer.args.per_device_eval_batch_size
    collate = replace(trainer.data_collator, max_length=max_length)
    # Rows of like length together: less padding. The order is undone at the end.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i].values())))
    training = model.training
    model.eval()
    sums: dict[str, list[torch.Tensor]] = {}
    for at in range(0, len(order), size):
        batch = collate([rows[i] for i in order[at : at + size]])
        batch = send_to_device(batch, trainer.accelerator.device)
        ref_chosen, ref_rejected = trainer.compute_ref_log_probs(model, batch)
        logps_of = {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
        if policy:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            with trainer.accelerator.autocast():
                logps = model(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    labels=labels,
                    fused_lm_head=True,  # TRL's: log-probabilities without the full logits
                ).log_probs.sum(1)
            logps_of["chosen"], logps_of["rejected"] = logps.chunk(2)
        for name, value in logps_of.items():
            sums.setdefault(name, []).append(value.float().cpu())
    model.train(training)
    back = np.argsort(order)
    return {name: torch.cat(parts).numpy()[back] for name, parts in sums.items()}


def implicit_rewards(logps: dict[str, np.ndarray], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Implicit rewards r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)) of chosen and rejected.

    DPO paper (arXiv 2305.18290), section 4, up to the term that is the same for both answers.
    """
    return (
        beta * (logps["chosen"] - logps["ref_chosen"]),
        beta * (logps["rejected"] - logps["ref_rejected"]),
    )


def evaluate(trainer: DPOTrainer, cfg: Config, test: Dataset) -> tuple[dict, pd.DataFrame]:
    """Compare policy and base on the held-out `test` pairs.

    Returns:
        The figures as in `evaluation.json` (each with its bootstrap 95% interval), and a frame
        with one row a prompt: both replies and every measure of each.
    """
    tokenizer, model = trainer.processing_class, trainer.model
    first: dict[str, int] = {}  # a prompt may stand in several pairs; it is answered once
    for i, prompt in enumerate(test["prompt"]):
        first.setdefault(json.dumps(prompt), i)
    picked = list(first.values())[: cfg.recipe.eval_prompts]
    prompts = [test[i]["prompt"] for i in picked]
    options = [template_options(test[i]) for i in picked]
    replies = {}
    for who, adapter in (("base", model.disable_adapter()), ("tuned", nullcontext())):
        with adapter:
            replies[who] = generate_replies(
                model, tokenizer, prompts, options=options, label=who,
                max_new_tokens=cfg.recipe.max_new_tokens,
                batch_size=cfg.recipe.generation_batch_size,
            )  # fmt: skip
    frame = pd.DataFrame({"prompt": [p[-1]["content"] for p in prompts]})
    facts = [test[i].get("facts") for i in picked]
    for who, rows in replies.items():
        frame[f"{who}"] = [r.text for r in rows]
        frame[f"{who}_length"] = [r.length for r in rows]
        frame[f"{who}_finished"] = [r.finished for r in rows]
        frame[f"{who}_repeated"] = [repeated_ngram_share(r.ids) for r in rows]
        if all(facts):
            pairs = zip(rows, facts, strict=True)
            frame[f"{who}_facts"] = [fact_recall(r.text, f) for r, f in pairs]
    prompt_ids = tokenize_prompts(prompts, tokenizer, options)
    for who, values in _base_nll(trainer, prompt_ids, replies).items():
        frame[f"{who}_base_nll"] = values
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    tokens = trainer.eval_dataset.select_columns(columns).to_list()
    logps = pair_logps(trainer, tokens, max_length=cfg.dpo.max_length)
    return _figures(cfg, frame, *implicit_rewards(logps, trainer.beta)), frame


def _base_nll(
    trainer: DPOTrainer, prompt_ids: list[list[int]], replies: dict
) -> dict[str, np.ndarray]:
    """Loss per token of each reply under the base model: are the tuned replies still fluent?

    Both replies to a prompt make one pair for `pair_logps`, whose reference is the base model.
    """
    rows = []
    for i, ids in enumerate(prompt_ids):
        base, tuned = replies["base"][i].ids, replies["tuned"][i].ids
        rows.append({"prompt_ids": ids, "chosen_ids": base, "rejected_ids": tuned})
    logps = pair_logps(trainer, rows, policy=False)
    lengths = {who: np.array([max(len(r.ids), 1) for r in rows]) for who, rows in replies.items()}
    return {
        "base": -logps["ref_chosen"] / lengths["base"],
        "tuned": -logps["ref_rejected"] / lengths["tuned"],
    }


def _figures(cfg: Config, frame: pd.DataFrame, chosen: np.ndarray, rejected: np.ndarray) -> dict:
    measures = {}
    for name in MEASURES:
        if f"base_{name}" in frame:
            base, tuned = frame[f"base_{name}"], frame[f"tuned_{name}"]
            measures[name] = {
                "base": bootstrap(base),
                "tuned": bootstrap(tuned),
                "change": bootstrap(tuned, base),
            }
    shorter = 1 - frame["tuned_length"].mean() / frame["base_length"].mean()
    accuracy, margin = bootstrap(chosen > rejected), bootstrap(chosen - rejected)
    change = {name: m["change"] for name, m in measures.items()}
    targets = {
        "replies at least 30% shorter": shorter >= 0.30,
        "implicit-reward accuracy at least 0.75": accuracy["mean"] >= 0.75,
        "no more repetition than base": change["repeated"]["mean"] <= 0,
        "at least as many replies finish": change["finished"]["mean"] >= 0,
    }
    if "facts" in change:
        targets["no loss of key facts shown (interval reaches 0)"] = change["facts"]["high"] >= 0
    return {
        "prompts": len(frame),
        "pairs": len(chosen),
        "max_new_tokens": cfg.recipe.max_new_tokens,
        "interval": "bootstrap over prompts (or pairs), 95%, 10000 draws",
        "shorter": float(shorter),
        "reward_accuracy": accuracy,
        "reward_margin": margin,
        "measures": measures,
        "targets": {name: bool(met) for name, met in targets.items()},
    }


def save_evaluation(figures: dict, frame: pd.DataFrame, run_dir: Path) -> None:
    """Write `evaluation.json` and the replies side by side (`replies.jsonl`) into the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "evaluation.json").write_text(json.dumps(figures, indent=2))
    frame.to_json(run_dir / "replies.jsonl", orient="records", lines=True, force_ascii=False)


def evaluation_table(figures: dict) -> pd.DataFrame:
    """The figures as one table: base, tuned, and the change with its 95% interval."""

    def show(value: dict, signed: bool = False) -> str:
        digits = 1 if abs(value["mean"]) >= 10 else 2
        sign = "+" if signed else ""
        mean, low, high = (f"{value[k]:{sign}.{digits}f}" for k in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    rows = {
        label: {
            "base": show(figures["measures"][name]["base"]),
            "tuned": show(figures["measures"][name]["tuned"]),
            "change": show(figures["measures"][name]["change"], signed=True),
        }
        for name, label in MEASURES.items()
        if name in figures["measures"]
    }
    # Before training every implicit reward is 0: no pair is told apart, and no margin is there.
    rows["implicit-reward accuracy"] = {"base": "-", "tuned": show(figures["reward_accuracy"])}
    rows["implicit-reward margin (nats)"] = {"base": "0", "tuned": show(figures["reward_margin"])}
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def side_by_side(frame: pd.DataFrame, rows: int = 6, clip: int = 400) -> str:
    """An HTML table of the first `rows` prompts with both replies and their lengths."""
    cells = []
    for _, row in frame.head(rows).iterrows():
        line = f"<td><b>{html.escape(row['prompt'])}</b></td>"
        for who in ("base", "tuned"):
            text = row[who] if len(row[who]) <= clip else row[who][:clip] + " …"
            state = "" if row[f"{who}_finished"] else ", cut off"
            note = f"<i>{row[f'{who}_length']} tokens{state}</i>"
            line += f"<td>{html.escape(text)}<br>{note}</td>"
        cells.append(f"<tr style='text-align:left;vertical-align:top'>{line}</tr>")
    head = "<tr><th>prompt</th><th>before</th><th>after</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(cells)}</tbody></table>"


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    adapter = require_adapter(cfg)
    run = assemble(cfg)
    load_adapter(run.trainer.model, adapter)
    figures, frame = evaluate(run.trainer, cfg, run.pairs["test"])
    save_evaluation(figures, frame, cfg.run_dir)
    print(evaluation_table(figures).to_string())


if __name__ == "__main__":
    cli.command(main, ARGS)
