"""DPO that goes wrong on purpose, and its cures: a few short runs over the same model.

Each arm trains a fresh adapter, is scored on held-out pairs, and answers a few held-out prompts.
What is compared is small on purpose; the arms show a direction, not a size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from trl import DPOTrainer

from scripts.base import DEFAULT_CONFIG
from scripts.config import Config, load_config
from scripts.data import load_preferences
from scripts.evaluate import pair_logps, reference
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.pairs import grounded
from scripts.pairs.generation import Reply, generate_replies
from scripts.pairs.text import are_facts, fact_recall
from scripts.pairs.tokens import template_options, tokenize_pairs
from scripts.probes import pick_prompts
from scripts.run_folder import describe_machine
from scripts.run_log import history
from scripts.training import assemble


@dataclass(frozen=True)
class Arm:
    """One short run: what its config says otherwise, and which pairs it trains on.

    `pairs` is `alike` (answers of like length) or `lopsided` (the rejected one far longer).
    """

    title: str
    pairs: str
    overrides: dict = field(default_factory=dict)


DPO_ALONE = {"loss_type": "sigmoid", "loss_weights": None}
SIDES = ("chosen", "rejected")
ARMS = {
    # The loss asks for a margin and for nothing else (DPO paper, eq. 7). With answers much alike,
    # a step against the rejected one goes against the chosen one too (Smaug, arXiv 2402.13228;
    # Razin et al., 2410.08847, section 3).
    "alone": Arm("DPO alone", "alike", DPO_ALONE),
    # Cure: an SFT term. Iterative RPO (2404.19733, section 2) has it at full weight, Llama 3
    # (2407.21783, section 4.1.4) at 0.2.
    "sft": Arm("SFT term", "alike",
               {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    "sft_fifth": Arm("SFT term, weight 0.2", "alike",
                     {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}),
    # The shorter answer is always the right one, so that length is all there need be learned
    # (Park et al., 2403.19159). Cures: the arm `alone`, whose pairs length does not tell apart, and
    # log-ratios per token (SimPO, 2405.14734, section 2.2; Tulu 3, 2411.15124), whose beta is so
    # many times larger.
    "lopsided": Arm("lopsided pairs", "lopsided", DPO_ALONE),
    "norm": Arm("lopsided, log-ratios per token", "lopsided",
                {"loss_type": "sigmoid_norm", "loss_weights": None, "beta": 5.0}),
}  # fmt: skip


# With the default config, unless others are named. Answers of a few dozen tokens, where the
# failures show; on the short ones of data/grounded the chosen answer rises with DPO alone.
PAIRS = {"dataset_name": "data/concise", "max_length": 256}


@dataclass(frozen=True)
class Size:
    """How large the runs are: pairs trained on and held out, passes, prompts replied to."""

    pairs: int = 32
    held_out: int = 40
    epochs: int = 2
    prompts: int = 16
    max_new_tokens: int = 64


def length_gaps(rows: Dataset, tokenizer) -> np.ndarray:
    """log(rejected tokens / chosen tokens) of each pair: above 0, the rejected is the longer."""
    tokens = tokenize_pairs(rows.to_list(), tokenizer)
    return np.array([np.log(len(t["rejected_ids"]) / len(t["chosen_ids"])) for t in tokens])


def answered(pairs: DatasetDict) -> DatasetDict:
    """Without the questions that their text does not answer, where the data says which: there the
    right answer is always the same short one."""
    for split, rows in pairs.items():
        if "answerable" in rows.column_names:
            pairs[split] = rows.select(np.flatnonzero(rows["answerable"]))
    return pairs


def pick_pairs(pairs: DatasetDict, tokenizer, size: Size, kind: str) -> DatasetDict:
    """Pairs to train on by their lengths, and held-out ones on which length tells nothing.

    `kind` is an `Arm.pairs`. Of the held-out pairs, half have the longer answer chosen and half
    the shorter, as far as there are such; a rule "the shorter wins" is right in half of them.
    """
    gaps = length_gaps(pairs["train"], tokenizer)
    order = np.argsort(np.abs(gaps) if kind == "alike" else -gaps, kind="stable")
    held = length_gaps(pairs["test"], tokenizer)
    half = size.held_out // 2
    test = np.concatenate([np.flatnonzero(held < 0)[:half], np.flatnonzero(held > 0)[:half]])
    return DatasetDict(
        {
            "train": pairs["train"].select(sorted(order[: size.pairs].tolist())),
            "test": pairs["test"].select(test.tolist()),
        }
    )


def run_arms(
    config: str, overrides: dict, size: Size, names: list[str] | None = None
) -> Iterator[dict]:
    """Train every arm and measure it; yields the results so far, plain data, after each.

    Rewards and margins are in nats, lengths in tokens, `chosen` and `rejected` log-ratios
    log pi(y|x) - log pi_ref(y|x) of whole held-out answers.
    """
    if config == DEFAULT_CONFIG and "dataset_name" not in overrides:
        overrides = PAIRS | overrides
    base_cfg = load_config(config, overrides)
    path, _ = resolve_model(base_cfg.model.model_name_or_path, base_cfg.model.model_revision)
    tokenizer = load_tokenizer(path, base_cfg.model.model_revision)
    every_pair = answered(load_preferences(base_cfg, tokenizer))
    results = where_and_what(base_cfg) | {"size": vars(size), "arms": {}}
    for name in names or list(ARMS):
        arm = ARMS[name]
        started = time.monotonic()
        cfg = load_config(config, _settings(base_cfg, size, name) | overrides | arm.overrides)
        pairs = pick_pairs(every_pair, tokenizer, size, arm.pairs)
        trainer = assemble(cfg, pairs).trainer
        if "base" not in results:
            with reference(trainer) as model:
                results["base"] = measure_replies(model, trainer, pairs["test"], size)
        trainer.train()
        result = {"title": arm.title, "overrides": arm.overrides, "beta": cfg.dpo.beta}
        result["learning_rate"] = cfg.dpo.learning_rate
        result |= {"pairs": pair_lengths(trainer.train_dataset), "steps": _steps(trainer)}
        result["held_out"] = measure_pairs(trainer, cfg)
        result["replies"] = measure_replies(trainer.model, trainer, pairs["test"], size)
        result["seconds"] = round(time.monotonic() - started, 1)
        results["arms"][name] = result
        print(f"{name}: {result['seconds']:.0f} s, {in_a_line(result)}", flush=True)
        yield results
        del trainer
        free_memory()


def where_and_what(cfg: Config) -> dict:
    """What the runs are of, and the machine and the libraries that they run on."""
    machine = describe_machine()
    del machine["commit"]  # the file is committed after it
    data = cfg.script.dataset_name
    return {"model": cfg.model.model_name_or_path, "data": data, "machine": machine}


def _settings(cfg: Config, size: Size, name: str) -> dict:
    """What all arms share: small batches, and a learning rate high enough to go wrong soon."""
    return {
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 4,
        "num_train_epochs": size.epochs,
        "warmup_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": str(cfg.run_dir / "lessons" / name),
    }


def _steps(trainer: DPOTrainer) -> dict[str, list[float]]:
    """The log of a run by column: loss, rewards, margins and accuracy at each step."""
    frame = history(trainer.state.log_history)
    wanted = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    steps = {name: frame[name].round(5).tolist() for name in ["loss", *wanted]}
    return {"step": frame.index.tolist(), **steps}


def pair_lengths(dataset: Dataset) -> dict[str, float]:
    """How many pairs a trainer has, and the median tokens of both answers."""
    chosen, rejected = (
        [len(ids) for ids in dataset[side]] for side in ("chosen_ids", "rejected_ids")
    )
    medians = {"chosen": float(np.median(chosen)), "rejected": float(np.median(rejected))}
    return {"count": len(chosen), **medians}


def measure_pairs(trainer: DPOTrainer, cfg: Config) -> dict:
    """Held-out pairs: log-ratios of whole answers, margins, and accuracy by which is the longer.

    Log-ratios are in nats. `margin` is what the arm's loss compares: log-ratios of answers, or, for
    `sigmoid_norm`, per token; chosen minus rejected, without beta. `length_gap` is
    log(rejected tokens / chosen tokens). Accuracies count ties half; None where there is no pair.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = trainer.eval_dataset.select_columns(columns).to_list()
    logps = pair_logps(trainer, rows, max_length=cfg.dpo.max_length)
    ratios = {side: logps[side] - logps[f"ref_{side}"] for side in SIDES}
    limit = cfg.dpo.max_length or np.inf
    tokens = {
        side: np.array([min(len(r[f"{side}_ids"]), limit - len(r["prompt_ids"])) for r in rows])
        for side in SIDES
    }
    compared = {
        side: ratios[side] / (tokens[side] if "sigmoid_norm" in cfg.dpo.loss_type else 1)
        for side in SIDES
    }
    margin = compared["chosen"] - compared["rejected"]
    gap = np.log(tokens["rejected"] / tokens["chosen"])
    won = (np.sign(margin) + 1) / 2
    return {
        **{side: np.round(ratios[side], 3).tolist() for side in SIDES},
        "margin": np.round(margin, 4).tolist(),
        "length_gap": np.round(gap, 3).tolist(),
        "accuracy": {
            name: float(won[which].mean()) if which.any() else None
            for name, which in (("chosen longer", gap < 0), ("chosen shorter", gap > 0))
        },
    }


def measure_replies(model, trainer: DPOTrainer, test: Dataset, size: Size) -> dict:
    """Greedy replies to held-out prompts: tokens, how many finish, how many are right, and one."""
    picked = pick_prompts(test["prompt"], size.prompts, seed=0)
    rows = test.select(picked)
    replies = generate_replies(
        model, trainer.processing_class, rows["prompt"],
        options=[template_options(row) for row in rows],
        max_new_tokens=size.max_new_tokens, batch_size=size.prompts, label=None,
    )  # fmt: skip
    first = {"prompt": rows[0]["prompt"][-1]["content"], "reply": replies[0].text}
    return {"length": float(np.mean([r.length for r in replies])),
            "finished": float(np.mean([r.finished for r in replies])),
            "right": _right(rows, replies), **first}  # fmt: skip


def _right(rows: Dataset, replies: list[Reply]) -> float | None:
    """The share of replies with an accepted answer and no wrong one, or of the key facts that they
    mention; None where the data lists neither."""
    names = set(rows.column_names)
    if {"question", "accept", "wrong", "answerable"} <= names:
        asked = zip(rows, replies, strict=True)
        return float(np.mean([grounded.check(r.text, "", row).right for row, r in asked]))
    if "facts" in names and all(map(are_facts, rows["facts"])):
        facts = zip(replies, rows["facts"], strict=True)
        return float(np.mean([fact_recall(reply.text, listed) for reply, listed in facts]))
    return None


def in_a_line(result: dict) -> str:
    """An arm's result in one line."""
    held, replies = result["held_out"], result["replies"]
    right = "" if replies["right"] is None else f", {replies['right']:.2f} right"
    accuracy = ", ".join(
        f"{value:.2f} with the {name}"
        for name, value in held["accuracy"].items()
        if value is not None
    )
    return (
        f"chosen log-ratio {np.mean(held['chosen']):+.1f} nats, "
        f"rejected {np.mean(held['rejected']):+.1f}; accuracy {accuracy}; "
        f"replies of {replies['length']:.0f} tokens, {replies['finished']:.2f} finish{right}"
    )


def displacement_in_words(results: dict) -> str:
    """What became of the chosen answers, with and without an SFT term: a line an arm."""
    lines = []
    for name in ("alone", "sft", "sft_fifth"):
        arm = results["arms"][name]
        chosen, rejected = (np.array(arm["held_out"][side]) for side in SIDES)
        went, also = (
            f"{'rose' if side.mean() > 0 else 'fell'} by {abs(side.mean()):.1f}"
            for side in (chosen, rejected)
        )
        lines.append(
            f"{arm['title']}: held-out chosen answers {went} nats "
            f"({(chosen < 0).mean():.0%} of them fell), rejected ones {also}; "
            f"{(chosen > rejected).mean():.0%} of the pairs right"
        )
    return "\n".join(lines)


def length_in_words(results: dict) -> str:
    """How often each arm is right where length says the wrong thing, and where the right one."""
    lines = []
    trained_on = {name: results["arms"][name]["title"] for name in ("lopsided", "norm")}
    for name, title in (trained_on | {"alone": "pairs of like length"}).items():
        right = results["arms"][name]["held_out"]["accuracy"]
        lines.append(
            f"{title}: {right['chosen longer']:.0%} right where the chosen answer is the "
            f"longer, {right['chosen shorter']:.0%} where it is the shorter"
        )
    return "\n".join(lines)


def table(results: dict) -> pd.DataFrame:
    """The arms of `lessons.json` beside the model before training, one row each."""
    rows = {"before training": {"replies (tokens)": results["base"]["length"],
                                "key facts": results["base"]["right"]}}  # fmt: skip
    for arm in results["arms"].values():
        held = arm["held_out"]
        rows[arm["title"]] = {
            "chosen (nats)": np.mean(held["chosen"]),
            "rejected (nats)": np.mean(held["rejected"]),
            **{f"accuracy, {name}": value for name, value in held["accuracy"].items()},
            "replies (tokens)": arm["replies"]["length"],
            "key facts": arm["replies"]["right"],
        }
    frame = pd.DataFrame(rows).T.astype(float)
    first = list(rows[next(iter(results["arms"].values()))["title"]])
    return frame[first]
