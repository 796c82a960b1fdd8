"""DPO going wrong on purpose, and its cures: train a few short runs and keep what came of them.

    python -m scripts.lessons --out notebooks/lessons.json

Each run takes about two minutes on two cores with the default model. `dpo_explained.ipynb` draws
the file. The runs are small on purpose: they show a direction, not a size.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("lessons")

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, DatasetDict
from trl import DPOTrainer

from scripts.base import DEFAULT_CONFIG
from scripts.config import Config, load_config, parse_overrides
from scripts.data import load_preferences
from scripts.evaluate import pair_logps, reference
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.pairs.generation import generate_replies
from scripts.pairs.load import token_counts
from scripts.pairs.text import are_facts, fact_recall
from scripts.pairs.tokens import template_options
from scripts.probes import pick_prompts
from scripts.run_folder import describe_machine
from scripts.run_log import history
from scripts.training import assemble

SIDES = ("chosen", "rejected")
DPO_ALONE = {"loss_type": "sigmoid", "loss_weights": None}
WITH_SFT = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
PER_TOKEN = {"loss_type": "sigmoid_norm", "loss_weights": None, "beta": 5.0}
# With the default config, unless others are named. Answers of a few dozen tokens, where the
# failures show; on the short ones of data/grounded the chosen answer rises with DPO alone.
PAIRS = {"dataset_name": "data/concise", "max_length": 256}
# What all runs share: small batches, and a learning rate high enough to go wrong soon.
SHORT = {
    "learning_rate": 5e-4, "per_device_train_batch_size": 4, "warmup_steps": 2, "logging_steps": 1,
    "report_to": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One short run: what its config says otherwise, and which pairs it trains on.

    `pairs` is `alike` (answers of like length) or `lopsided` (the rejected one far longer).
    """

    title: str
    pairs: str
    overrides: dict = field(default_factory=dict)


ARMS = {
    # The loss asks for a margin and nothing else (DPO paper, eq. 7). With answers much alike, a
    # step against the rejected one goes against the chosen one too (Smaug, arXiv 2402.13228; Razin
    # et al., 2410.08847, section 3).
    "alone": Arm("DPO alone", "alike", DPO_ALONE),
    # Cure: an SFT term, at full weight as Iterative RPO has it (2404.19733, section 2), and at 0.2
    # as Llama 3 had it (2407.21783, section 4.1.4).
    "sft": Arm("SFT term", "alike", WITH_SFT),
    "sft_fifth": Arm("SFT term, weight 0.2", "alike", WITH_SFT | {"loss_weights": [1.0, 0.2]}),
    # The shorter answer is always the right one, so length is all there need be learned (Park et
    # al., 2403.19159). Cures: the pairs of `alone`, and log-ratios per token (SimPO, 2405.14734,
    # section 2.2; Tulu 3, 2411.15124), whose beta is so many times larger.
    "lopsided": Arm("lopsided pairs", "lopsided", DPO_ALONE),
    "norm": Arm("lopsided, log-ratios per token", "lopsided", PER_TOKEN),
}


@dataclass(frozen=True)
class Size:
    """How large the runs are: pairs trained on and held out, passes, prompts replied to."""

    pairs: int = 32
    held_out: int = 40
    epochs: int = 2
    prompts: int = 16
    max_new_tokens: int = 64


def pick_pairs(pairs: DatasetDict, size: Size, kind: str) -> DatasetDict:
    """Pairs to train on by their lengths, and held-out ones on which length tells nothing: half
    of these have the longer answer chosen, half the shorter. `kind` is an `Arm.pairs`."""

    def gap(split: str) -> np.ndarray:
        """log(rejected tokens / chosen tokens): above 0, the rejected answer is the longer."""
        _, chosen, rejected = token_counts(pairs[split]).T
        return np.log(rejected / chosen)

    gaps, held = gap("train"), gap("test")
    order = np.argsort(np.abs(gaps) if kind == "alike" else -gaps, kind="stable")
    half = size.held_out // 2
    test = np.concatenate([np.flatnonzero(held < 0)[:half], np.flatnonzero(held > 0)[:half]])
    return DatasetDict(
        {
            "train": pairs["train"].select(sorted(order[: size.pairs].tolist())),
            "test": pairs["test"].select(test.tolist()),
        }
    )


def run_arms(config: str, overrides: dict, size: Size, names: list[str]) -> Iterator[dict]:
    """Train every arm and measure it; yields the results so far, plain data, after each.

    Rewards and margins are in nats, lengths in tokens, `chosen` and `rejected` log-ratios
    log pi(y|x) - log pi_ref(y|x) of whole held-out answers.
    """
    if config == DEFAULT_CONFIG and "dataset_name" not in overrides:
        overrides = PAIRS | overrides
    base_cfg = load_config(config, overrides)
    path, _ = resolve_model(base_cfg.model.model_name_or_path, base_cfg.model.model_revision)
    tokenizer = load_tokenizer(path, base_cfg.model.model_revision)
    every_pair = load_preferences(base_cfg, tokenizer)
    machine = describe_machine()
    del machine["commit"]  # the file is committed after it
    results = {"model": base_cfg.model.model_name_or_path, "data": base_cfg.script.dataset_name,
               "machine": machine, "size": vars(size), "arms": {}}  # fmt: skip
    for name in names:
        arm, started = ARMS[name], time.monotonic()
        short = SHORT | {"num_train_epochs": size.epochs,
                         "output_dir": str(base_cfg.run_dir / "lessons" / name)}  # fmt: skip
        cfg = load_config(config, short | overrides | arm.overrides)
        pairs = pick_pairs(every_pair, size, arm.pairs)
        trainer = assemble(cfg, pairs).trainer
        if "base" not in results:
            with reference(trainer) as model:
                results["base"] = measure_replies(model, trainer, pairs["test"], size)
        trainer.train()
        tokens = {side: list(map(len, trainer.train_dataset[f"{side}_ids"])) for side in SIDES}
        medians = {side: float(np.median(lengths)) for side, lengths in tokens.items()}
        result = {
            "title": arm.title,
            "overrides": arm.overrides,
            "beta": cfg.dpo.beta,
            "learning_rate": cfg.dpo.learning_rate,
            "pairs": {"count": len(tokens["chosen"]), **medians},
            "steps": step_log(trainer),
            "held_out": measure_pairs(trainer, cfg),
            "replies": measure_replies(trainer.model, trainer, pairs["test"], size),
        }
        seconds = time.monotonic() - started
        results["arms"][name] = result | {"seconds": round(seconds, 1)}
        ends = [f"{np.mean(result['held_out'][side]):+.1f} nats {side}" for side in SIDES]
        tokens = result["replies"]["length"]
        print(f"{name}: {seconds:.0f} s; {', '.join(ends)}; {tokens:.0f} tokens", flush=True)
        yield results
        del trainer
        free_memory()


def step_log(trainer: DPOTrainer) -> dict[str, list[float]]:
    """The log of a run by column: loss, rewards, margins and accuracy at each step."""
    frame = history(trainer.state.log_history)
    names = ["loss", *(f"rewards/{n}" for n in (*SIDES, "margins", "accuracies"))]
    return {"step": frame.index.tolist(), **{n: frame[n].round(5).tolist() for n in names}}


def measure_pairs(trainer: DPOTrainer, cfg: Config) -> dict:
    """Held-out pairs: log-ratios of whole answers in nats, margins, and accuracy by which answer is
    the longer (ties count half; None where there is no pair).

    `margin` is what the arm's loss compares, without beta: log-ratios of answers, or, for
    `sigmoid_norm`, per token. `length_gap` is log(rejected tokens / chosen tokens).
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = trainer.eval_dataset.select_columns(columns).to_list()
    logps = pair_logps(trainer, rows, max_length=cfg.dpo.max_length)
    limit = cfg.dpo.max_length or np.inf
    ratios, tokens, compared = {}, {}, {}
    for side in SIDES:
        ratios[side] = logps[side] - logps[f"ref_{side}"]
        lengths = [min(len(r[f"{side}_ids"]), limit - len(r["prompt_ids"])) for r in rows]
        tokens[side] = np.array(lengths)
        compared[side] = ratios[side] / (tokens[side] if "sigmoid_norm" in cfg.dpo.loss_type else 1)
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
    """Greedy replies to held-out prompts: their tokens, and the share of key facts that they
    mention (None where the data lists none)."""
    rows = test.select(pick_prompts(test["prompt"], size.prompts, seed=0))
    replies = generate_replies(
        model, trainer.processing_class, rows["prompt"],
        options=[template_options(row) for row in rows],
        max_new_tokens=size.max_new_tokens, batch_size=size.prompts, label=None,
    )  # fmt: skip
    facts = rows["facts"] if "facts" in rows.column_names else [None]
    recalled = None
    if all(map(are_facts, facts)):
        both = zip(replies, facts, strict=True)
        recalled = float(np.mean([fact_recall(reply.text, listed) for reply, listed in both]))
    return {"length": float(np.mean([r.length for r in replies])), "right": recalled}


def main(args: argparse.Namespace) -> None:
    overrides = parse_overrides(args.overrides)
    if args.output_dir:
        overrides["output_dir"] = args.output_dir
    args.out.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "scripts.lessons", *sys.argv[1:]])
    for results in run_arms(args.config, overrides, Size(), args.arms or list(ARMS)):
        kept = {"command": command, **results}
        args.out.write_text(json.dumps(kept, ensure_ascii=False) + "\n")  # what is done is kept
    print(f"kept in {args.out}")
