"""DPO that goes wrong on purpose, and its cures: a few short runs over the same model.

Each arm trains a fresh adapter, is scored on held-out pairs, and answers a few held-out prompts.
What is compared is small on purpose; the arms show a direction, not a size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset, DatasetDict
from trl import DPOTrainer

from scripts.config import Config, load_config
from scripts.data import load_preferences
from scripts.evaluate import length_follows, pair_logps, reference
from scripts.generation import Reply, generate_replies
from scripts.measures.text import are_facts, fact_recall
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.monitoring.steps import history
from scripts.pairs.tokens import template_options, tokenize_pairs
from scripts.probes import pick_prompts
from scripts.training import assemble


@dataclass(frozen=True)
class Arm:
    """One short run: what its config says otherwise, and whether its pairs are of like length."""

    title: str
    overrides: dict = field(default_factory=dict)
    balanced: bool = False


ARMS = {
    # The failure: the loss asks for a margin and for nothing else (DPO paper, eq. 7), and the
    # cheapest margin is to push both answers down (Razin et al., arXiv 2410.08847, section 3).
    "sigmoid": Arm("DPO alone", {"loss_type": "sigmoid", "loss_weights": None}),
    # Cure of displacement: RPO (arXiv 2404.19733, section 2); Llama 3 (2407.21783, section 4.1.4).
    "sft": Arm("with an SFT term", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    # Cures of length hacking: log-ratios per token (Tulu 3, arXiv 2411.15124, section 5.1.2), whose
    # beta is so many times larger, and pairs that length does not tell apart.
    "norm": Arm("log-ratios per token", {"loss_type": "sigmoid_norm", "loss_weights": None,
                                         "beta": 5.0}),
    "balanced": Arm("pairs of like length", {"loss_type": "sigmoid", "loss_weights": None},
                    balanced=True),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How large the runs are: pairs trained on and held out, passes, prompts replied to."""

    pairs: int = 32
    held_out: int = 24
    epochs: int = 2
    prompts: int = 12
    max_new_tokens: int = 96


def pick_pairs(pairs: DatasetDict, tokenizer, size: Size, balanced: bool, seed: int) -> DatasetDict:
    """`size.pairs` pairs to train on, drawn by `seed`, or those nearest to equal length."""
    train = pairs["train"]
    rows = np.random.default_rng(seed).permutation(len(train))[: size.pairs]
    if balanced:
        tokens = tokenize_pairs(train.to_list(), tokenizer)
        ratio = [np.log(len(row["rejected_ids"]) / len(row["chosen_ids"])) for row in tokens]
        rows = np.argsort(np.abs(ratio), kind="stable")[: size.pairs]
    test = pairs["test"].select(range(min(size.held_out, len(pairs["test"]))))
    return DatasetDict({"train": train.select(sorted(rows.tolist())), "test": test})


def run_arms(
    config: str, overrides: dict, size: Size, names: list[str] | None = None
) -> Iterator[dict]:
    """Train every arm and measure it; yields the results so far, plain data, after each.

    Rewards and margins are in nats, lengths in tokens, `chosen` and `rejected` log-ratios
    log pi(y|x) - log pi_ref(y|x) of whole held-out answers.
    """
    base_cfg = load_config(config, overrides)
    path, _ = resolve_model(base_cfg.model.model_name_or_path, base_cfg.model.model_revision)
    tokenizer = load_tokenizer(path, base_cfg.model.model_revision)
    every_pair = load_preferences(base_cfg, tokenizer)
    results = {"config": config, "model": base_cfg.model.model_name_or_path, "arms": {}}
    results["size"] = vars(size)
    for name in names or list(ARMS):
        arm = ARMS[name]
        started = time.monotonic()
        cfg = load_config(config, _settings(base_cfg, size, name) | overrides | arm.overrides)
        pairs = pick_pairs(every_pair, tokenizer, size, arm.balanced, cfg.dpo.seed)
        trainer = assemble(cfg, pairs).trainer
        if "base" not in results:
            with reference(trainer) as model:
                results["base"] = measure_replies(model, trainer, pairs["test"], size)
        trainer.train()
        result = {"title": arm.title, "overrides": arm.overrides, "beta": cfg.dpo.beta}
        result |= {"pairs": pair_lengths(trainer.train_dataset), "steps": _steps(trainer)}
        result["held_out"] = measure_pairs(trainer, cfg)
        result["replies"] = measure_replies(trainer.model, trainer, pairs["test"], size)
        result["seconds"] = round(time.monotonic() - started, 1)
        results["arms"][name] = result
        print(f"{name}: {result['seconds']:.0f} s, {in_a_line(result)}", flush=True)
        yield results
        del trainer
        free_memory()


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
    """Log-ratios of held-out answers, accuracy, and how far the margin follows length alone.

    `length` is what `evaluate.length_follows` returns; near 1, `margin_correlation` says that the
    margin tells how long the answers are and little else.
    """
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    rows = trainer.eval_dataset.select_columns(columns).to_list()
    logps = pair_logps(trainer, rows, max_length=cfg.dpo.max_length)
    chosen = logps["chosen"] - logps["ref_chosen"]
    rejected = logps["rejected"] - logps["ref_rejected"]
    margin = chosen - rejected
    return {
        "chosen": np.round(chosen, 4).tolist(),
        "rejected": np.round(rejected, 4).tolist(),
        "accuracy": float(((np.sign(margin) + 1) / 2).mean()),
        "length": length_follows(rows, margin, cfg.dpo.max_length),
    }


def measure_replies(model, trainer: DPOTrainer, test: Dataset, size: Size) -> dict:
    """Greedy replies to held-out prompts: tokens, how many finish, key facts, and one of them."""
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
            "facts": _facts(rows, replies), **first}  # fmt: skip


def _facts(rows: Dataset, replies: list[Reply]) -> float | None:
    """The mean share of key facts that replies mention; None where the data lists none."""
    listed = rows["facts"] if "facts" in rows.column_names else []
    if not listed or not all(map(are_facts, listed)):
        return None
    recalls = [fact_recall(r.text, facts) for r, facts in zip(replies, listed, strict=True)]
    return float(np.mean(recalls))


def in_a_line(result: dict) -> str:
    """An arm's result in one line."""
    held, replies = result["held_out"], result["replies"]
    facts = "" if replies["facts"] is None else f", facts {replies['facts']:.2f}"
    return (
        f"chosen log-ratio {np.mean(held['chosen']):+.1f} nats, "
        f"rejected {np.mean(held['rejected']):+.1f}, accuracy {held['accuracy']:.2f}, "
        f"length correlation {held['length']['margin_correlation'] or 0:+.2f}; "
        f"replies of {replies['length']:.0f} tokens, {replies['finished']:.2f} finish{facts}"
    )
