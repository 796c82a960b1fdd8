"""Measure the tuned model against the base model on held-out prompts and pairs.

    python -m scripts.evaluate --config outputs/<run>/config.yaml

repeats the evaluation of a finished run, from the adapter (or whole model) that it saved.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("evaluate")

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head, use_adapter

from scripts.adapter import load_adapter, refuse_stale, require_adapter
from scripts.base import write_whole
from scripts.config import Config, config_from_args
from scripts.intervals import DRAWS, aims_of, bootstrap, length_controlled
from scripts.model import free_memory, load_model
from scripts.pairs.build import Judge, make_judge
from scripts.pairs.generation import Reply, generate_replies
from scripts.pairs.grounded import split_sentences
from scripts.pairs.report import length_bias
from scripts.pairs.text import repeated_ngram_share
from scripts.probes import Probe, main_probe, side_probes
from scripts.progress import Progress
from scripts.sharing.forward import log_probs_only, share_prefixes
from scripts.sharing.trainer import PrefixSharedDPOTrainer
from scripts.tables import BASELINES, checked_wins, compared, evaluation_table, win_rates
from scripts.training import assemble


def evaluate(trainer: DPOTrainer, cfg: Config, test: Dataset) -> tuple[dict, pd.DataFrame]:
    """Compare policy and base: by their replies to held-out prompts, and on the `test` pairs.

    The prompts are those of the pairs or, with `questions`, questions on held-out passages. Side
    probes show what was memorised and where tuning did harm, and `baselines` what the base model
    can do by other means.

    Returns:
        The figures as in `evaluation.json` (each with its bootstrap 95% interval), and a frame
        with one row a prompt: all replies and every measure of each.

    Raises:
        AdapterError: `trainer` was built from another config than `cfg`.
    """
    refuse_stale(trainer, cfg)
    restore_reference(trainer, cfg)
    probe = main_probe(cfg, test)
    frame, replies = _ask_both(trainer, cfg, probe)
    for who, values in _base_nll(trainer, replies).items():
        frame[f"{who}_base_nll"] = values
    if cfg.recipe.baselines:
        _ask_baselines(trainer, cfg, probe, frame)
    # Not `test` itself: the trainer drops pairs whose prompt alone is as long as `max_length`.
    pairs = trainer.eval_dataset
    tokens = pairs.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list()
    logps = pair_logps(trainer, tokens, cfg.dpo.max_length, label="held-out pairs scored")
    chosen, rejected = implicit_rewards(logps, trainer.beta)
    beside = {
        name: compared(_ask_both(trainer, cfg, side, label=name)[0])
        for name, side in side_probes(cfg).items()
    }
    prompts = [json.dumps(prompt) for prompt in pairs["prompt"]]
    figures = _figures(cfg, frame, chosen - rejected, prompts, beside)
    figures["length"] = length_follows(tokens, chosen - rejected, cfg.dpo.max_length)
    return figures, frame


def _ask_both(
    trainer: DPOTrainer, cfg: Config, probe: Probe, label: str = ""
) -> tuple[pd.DataFrame, dict[str, list[Reply]]]:
    """Replies of base and tuned to the prompts of `probe`, with their measures."""
    frame = pd.DataFrame({"prompt": [p[-1]["content"] for p in probe.prompts], **probe.columns})
    frame["cluster"] = probe.clusters or [json.dumps(p) for p in probe.prompts]
    replies = {}
    for who, answering in (("base", reference(trainer)), ("tuned", nullcontext(trainer.model))):
        with answering as model:
            replies[who] = replies_that_fit(
                trainer, cfg, model, probe.prompts, probe.options, f"{label} {who}".strip()
            )
        _add_measures(frame, who, replies[who], probe)
    return frame, replies


def replies_that_fit(
    trainer: DPOTrainer, cfg: Config, model: PreTrainedModel, prompts: list, options: list | None,
    label: str, **decoding: float,
) -> list[Reply]:  # fmt: skip
    """Replies, as many at a time as the config says; half as many each time memory runs out."""
    size = cfg.recipe.generation_batch_size
    while True:
        free_memory()  # blocks of other sizes, which would stay beside the new ones
        try:
            return generate_replies(
                model, trainer.processing_class, prompts, options=options, label=label,
                max_new_tokens=cfg.recipe.max_new_tokens, batch_size=size, **decoding,
            )  # fmt: skip
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
        size //= 2
        print(f"{label}: out of memory; trying again, {size} at a time")


def _ask_baselines(trainer: DPOTrainer, cfg: Config, probe: Probe, frame: pd.DataFrame) -> None:
    """Add the replies of the `BASELINES` and their measures to `frame`."""
    briefly = [
        [*earlier, last | {"content": last["content"] + probe.brief}]
        for *earlier, last in probe.prompts
    ]
    ways = {"asked": (briefly, {}), "unrepeated": (probe.prompts, {"unrepeated": 4})}
    with reference(trainer) as model:
        for who, (prompts, decoding) in ways.items():
            replies = replies_that_fit(
                trainer, cfg, model, prompts, probe.options, BASELINES[who], **decoding
            )
            _add_measures(frame, who, replies, probe)
    texts = [(split_sentences(text) or [""])[0] for text in frame["base"]]
    ids = trainer.processing_class(texts, add_special_tokens=False)["input_ids"]
    cut = [Reply(*both, finished=False, prompt_ids=[]) for both in zip(texts, ids, strict=True)]
    _add_measures(frame, "cut", cut, probe)
    frame["cut_finished"] = True  # by the cut


def _add_measures(frame: pd.DataFrame, who: str, replies: list[Reply], probe: Probe) -> None:
    """Add to `frame` the text of each of `replies`, and its measures."""
    frame[who] = [r.text for r in replies]
    frame[f"{who}_length"] = [r.length for r in replies]
    frame[f"{who}_finished"] = [r.finished for r in replies]
    frame[f"{who}_repeated"] = [repeated_ngram_share(r.ids) for r in replies]
    scores = pd.DataFrame([probe.score(i, r.text) for i, r in enumerate(replies)]).astype(float)
    for name in scores:
        frame[f"{who}_{name}"] = scores[name].to_numpy()


def _base_nll(trainer: DPOTrainer, replies: dict[str, list[Reply]]) -> dict[str, np.ndarray]:
    """Loss per token of each reply under the base model: are the tuned replies still fluent?

    Both replies to a prompt make one pair for `pair_logps`, whose reference is the base model,
    after the very tokens that they were generated from.
    """
    rows = [
        {"prompt_ids": base.prompt_ids, "chosen_ids": base.ids, "rejected_ids": tuned.ids}
        for base, tuned in zip(replies["base"], replies["tuned"], strict=True)
    ]
    logps = pair_logps(trainer, rows, policy=False, label="pairs of replies scored by the base")
    lengths = {who: np.array([len(r.ids) for r in given]) for who, given in replies.items()}
    return {
        "base": -logps["ref_chosen"] / lengths["base"],
        "tuned": -logps["ref_rejected"] / lengths["tuned"],
    }


@contextmanager
def reference(trainer: DPOTrainer) -> Iterator[PreTrainedModel]:
    """The model as it was before training, wherever `trainer` keeps it.

    With LoRA that is the same model, its adapter switched off, or TRL's frozen copy of the adapter
    that it started from; without LoRA, a second model.
    """
    if trainer.ref_model is not None:
        yield trainer.ref_model
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield trainer.model


def restore_reference(trainer: DPOTrainer, cfg: Config) -> None:
    """Without LoRA: load the model as it was before training again, if TRL has dropped it
    (`precompute_ref_log_probs`) or moved it along with the policy (`sync_ref_model`)."""
    dropped = trainer.ref_model is None and not isinstance(trainer.model, PeftModel)
    if dropped or trainer.args.sync_ref_model:
        trainer.ref_model = load_model(cfg, trainer.model.config.name_or_path)
        add_fused_lm_head(trainer.ref_model)
        # By the same arithmetic as the policy, so that an untrained policy differs by exactly 0.
        if isinstance(trainer, PrefixSharedDPOTrainer) and trainer.refusal is None:
            share_prefixes(trainer.ref_model, trainer.prefix_attention)


@torch.no_grad()
def pair_logps(
    trainer: DPOTrainer, rows: list[dict], max_length: int | None = None, policy: bool = True,
    label: str = "pairs scored",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Log-probabilities of both answers of tokenised pairs, under policy and reference, in nats.

    Each is the sum over a whole answer, log pi(y|x) of the DPO paper's eq. 7, and both models are
    scored alike: `ld_alpha`, which weighs an answer's tail less in training, plays no part.

    `rows` have `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's trainer tokenises them;
    `max_length` cuts them as in training. Returns arrays of shape (pairs,), in the order of `rows`:
    `ref_chosen`, `ref_rejected` and, with `policy`, `chosen` and `rejected`.
    """
    free_memory()
    model, size = trainer.model, trainer.args.per_device_eval_batch_size
    collate = replace(trainer.data_collator, max_length=max_length)
    names = ["ref_chosen", "ref_rejected"] + ["chosen", "rejected"] * policy
    logps = {name: np.empty(len(rows), np.float32) for name in names}
    # Rows of similar length together: less padding.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i].values())))
    training, bar = model.training, Progress(len(rows), patience=3)
    model.eval()
    for at in range(0, len(order), size):
        some = order[at : at + size]
        batch = send_to_device(collate([rows[i] for i in some]), trainer.accelerator.device)
        with reference(trainer) as ref_model:
            sums = _answer_logps(trainer, ref_model, batch)
        if policy:
            sums += _answer_logps(trainer, model, batch)
        for name, values in zip(names, sums, strict=True):
            logps[name][some] = values.numpy()
        done = at + len(some)
        bar.show(done, f"{label}: {done}/{len(rows)}, {bar.seconds:.0f} s")
    model.train(training)
    return logps


def _answer_logps(
    trainer: DPOTrainer, model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(y|x) of the chosen and of the rejected answers of TRL's batch, (pairs,) each."""
    with trainer.accelerator.autocast(), log_probs_only():
        log_probs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            use_cache=False,
            fused_lm_head=True,  # TRL's: log-probabilities without the full logits
        ).log_probs
    return log_probs.float().sum(1).cpu().chunk(2)


def implicit_rewards(logps: dict[str, np.ndarray], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Implicit rewards r(x, y) = beta * log(pi(y|x) / pi_ref(y|x)) of chosen and rejected.

    DPO paper (arXiv 2305.18290), section 4, up to the term that is the same for both answers.
    """
    return (
        beta * (logps["chosen"] - logps["ref_chosen"]),
        beta * (logps["rejected"] - logps["ref_rejected"]),
    )


def length_follows(rows: list[dict], margins: np.ndarray, max_length: int | None) -> dict:
    """How well length alone tells tokenised pairs apart, and how closely `margins` follow it.

    Returns `rule` (the answer that wins more often: `shorter` or `longer`), `rule_accuracy`, and
    `margin_correlation` with the tokens by which the rejected answer is longer; None if one of the
    two does not vary. Answers are cut at `max_length`, as in training.
    """
    limit = max_length or np.inf
    prompt, *answers = (
        np.array([len(row[f"{part}_ids"]) for row in rows], float)
        for part in ("prompt", "chosen", "rejected")
    )
    chosen, rejected = (np.minimum(tokens, limit - prompt) for tokens in answers)
    bias = length_bias(np.stack([prompt, chosen, rejected], 1))
    varies = len(rows) > 1 and np.ptp(margins) > 0 and np.ptp(rejected - chosen) > 0
    return {
        "rule": "longer" if bias["chosen_longer"] > bias["chosen_shorter"] else "shorter",
        "rule_accuracy": bias["length_rule_accuracy"],
        "margin_correlation": (
            float(np.corrcoef(margins, rejected - chosen)[0, 1]) if varies else None
        ),
    }


def _figures(
    cfg: Config, frame: pd.DataFrame, margins: np.ndarray, prompts: list[str], beside: dict
) -> dict:
    """What `evaluation.json` holds; `prompts` names the prompt of each pair of `margins`."""
    measures = compared(frame)
    base, tuned = frame["base_length"].to_numpy(), frame["tuned_length"].to_numpy()
    whole = {
        "shorter": bootstrap(base - tuned, per=base.clip(1), prompts=frame["cluster"]),
        # A tie counts half.
        "reward_accuracy": bootstrap((np.sign(margins) + 1) / 2, prompts=prompts),
        "reward_margin": bootstrap(margins, prompts=prompts),
    }
    aimed_at = whole | {name: m["change"] for name, m in measures.items()}
    aimed_at["tuned_finished"] = measures["finished"]["tuned"]
    for name, side in beside.items():
        aimed_at |= {f"{name}: {measure}": m["change"] for measure, m in side.items()}
    checked = "exact" in measures
    drawn = "passages (with all their questions)" if checked else "prompts (with all their pairs)"
    judge = "the checker that measures exact answers, which also ranked the pairs"
    return {
        "prompts": len(frame),
        "pairs": len(margins),
        "max_new_tokens": cfg.recipe.max_new_tokens,
        "interval": f"bootstrap of {drawn}, 95%, {DRAWS} draws",
        **whole,
        "measures": measures,
        "beside": beside,
        "baselines": {
            label: compared(frame, who, "tuned") for who, label in BASELINES.items() if who in frame
        },
        "targets": {
            aim.text: aim.verdict(aimed_at[aim.figure])
            for aim in aims_of(cfg.recipe.aims, checked)
            if aim.figure in aimed_at
        },
    } | ({"win_rate": _win_rate(frame, checked_wins(frame), judge)} if checked else {})


def judged_wins(frame: pd.DataFrame, prompts: list, judge: Judge) -> np.ndarray:
    """1 where `judge` prefers the tuned reply, 0 where the base's, 0.5 for a tie.

    An endpoint is asked in both orders, and a verdict that depends on the order is a tie. `prompts`
    are the conversations that the rows of `frame` reply to.
    """

    def win(at: int) -> float:
        replies = [
            {"text": frame[who][at], "tokens": int(frame[f"{who}_length"][at]), "style": who,
             "finished": True}
            for who in ("base", "tuned")
        ]  # fmt: skip
        preferred = judge({"id": f"reply-{at}", "messages": prompts[at]}, replies)
        return float(preferred[0].chosen["style"] == "tuned") if preferred else 0.5

    with ThreadPoolExecutor(judge.workers) as pool:
        return np.array(list(pool.map(win, range(len(frame)))))


def _win_rate(frame: pd.DataFrame, wins: np.ndarray, judge: str) -> dict:
    lengths = frame["tuned_length"], frame["base_length"]
    return {"judge": judge} | length_controlled(wins, *lengths, frame["cluster"])


def save_evaluation(figures: dict, frame: pd.DataFrame, run_dir: Path) -> None:
    """Write `evaluation.json` and the replies side by side (`replies.jsonl`) into the run folder; a
    kill or a full disk leaves an earlier evaluation as it was."""
    replies = frame.to_json(orient="records", lines=True, force_ascii=False)
    write_whole(run_dir / "replies.jsonl", replies)
    write_whole(run_dir / "evaluation.json", json.dumps(figures, indent=2, allow_nan=False))


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    trained = require_adapter(cfg)
    run = assemble(cfg)
    load_adapter(run.trainer.model, trained)
    judge = None
    if args.judge != "checker":  # before any reply
        judge = make_judge(args, cfg.dpo.device)
    figures, frame = evaluate(run.trainer, cfg, run.pairs["test"])
    if judge:
        wins = judged_wins(frame, main_probe(cfg, run.pairs["test"]).prompts, judge)
        figures["win_rate"] = _win_rate(frame, wins, judge.name)
    if cfg.is_main_process:
        save_evaluation(figures, frame, cfg.run_dir)
        print(evaluation_table(figures).to_string())
        if "win_rate" in figures:
            print(f"\njudge: {figures['win_rate']['judge']}\n{win_rates(figures).to_string()}")
