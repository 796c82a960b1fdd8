"""Measure the tuned model against the base model on held-out prompts and pairs.

    python -m scripts.evaluate --config outputs/<run>/config.yaml

repeats the evaluation of a finished run from the adapter, or the whole model, that it saved.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("evaluate")  # before the libraries load, so that --help is answered at once

import argparse
import html
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
from scripts.training import assemble

# What is measured of each reply, as columns and figures name it, and as the table does.
MEASURES = {
    "exact": "right, nothing wrong or made up",
    "first": "right in the first sentence",
    "mentioned": "right answer mentioned",
    "declined": "not in the text, and says so",
    "refused": "in the text, yet declined",
    "unsupported": "sentences that the text lacks",
    "length": "reply length (tokens)",
    "finished": "replies that finish",
    "repeated": "repeated 4-grams",
    "base_nll": "base-model loss per token",
    "facts": "key facts mentioned",
    "follows": "instructions followed",
}
PARTIAL = "replies.partial.jsonl"  # in the run folder while the models still reply


@contextmanager
def reference(trainer: DPOTrainer) -> Iterator[PreTrainedModel]:
    """The model as it was before training, however `trainer` keeps it.

    A run with an adapter has one model, and its reference is that model with the adapter switched
    off (or with TRL's frozen copy of an adapter that was there already); a run without one has a
    second model.
    """
    if trainer.ref_model is not None:
        yield trainer.ref_model
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            yield trainer.model


@torch.no_grad()
def pair_logps(
    trainer: DPOTrainer, rows: list[dict], max_length: int | None = None, policy: bool = True,
    label: str = "pairs scored",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Log-probabilities of both answers of tokenised pairs, under policy and reference, in nats.

    Each is a sum over the whole answer, the log pi(y|x) of the DPO paper's eq. 7, and one function
    scores both models: `ld_alpha`, which weighs an answer's tail down while training, has no part
    in it, nor have reference log-probabilities that TRL keeps for the loss.

    `rows` have `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's trainer tokenises them;
    `max_length` cuts them as in training; `label` heads the bar of a long pass. Returns arrays of
    shape (pairs,), in the rows' order: `ref_chosen`, `ref_rejected` and, with `policy`, `chosen`
    and `rejected`.
    """
    free_memory()
    model, size = trainer.model, trainer.args.per_device_eval_batch_size
    collate = replace(trainer.data_collator, max_length=max_length)
    # Rows of like length together: less padding. The order is undone at the end.
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i].values())))
    training = model.training
    model.eval()
    sums: dict[str, list[torch.Tensor]] = {}
    bar = Progress(len(rows), patience=3)
    for at in range(0, len(order), size):
        batch = collate([rows[i] for i in order[at : at + size]])
        batch = send_to_device(batch, trainer.accelerator.device)
        with reference(trainer) as ref_model:
            chosen, rejected = _answer_logps(trainer, ref_model, batch)
        scored = {"ref_chosen": chosen, "ref_rejected": rejected}
        if policy:
            chosen, rejected = _answer_logps(trainer, model, batch)
            scored |= {"chosen": chosen, "rejected": rejected}
        for name, value in scored.items():
            sums.setdefault(name, []).append(value)
        done = min(at + size, len(rows))
        bar.show(done, f"{label}: {done}/{len(rows)}, {bar.seconds:.0f} s")
    model.train(training)
    back = np.argsort(order)
    return {name: torch.cat(parts).numpy()[back] for name, parts in sums.items()}


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


def evaluate(trainer: DPOTrainer, cfg: Config, test: Dataset) -> tuple[dict, pd.DataFrame]:
    """Compare policy and base: by their replies to held-out prompts, and on the `test` pairs.

    The prompts are those of the pairs or, with `questions`, questions on held-out passages; then
    side probes show what was memorised and where harm was done, and `baselines` what the base does
    by other means. What a model replies goes into the run folder as soon as it is through, as
    `replies.partial.jsonl`, so that a failure on the way costs no more than that model's replies.

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
        if cfg.is_main_process:
            _write_lines(frame, cfg.run_dir / PARTIAL)
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    tokens = trainer.eval_dataset.select_columns(columns).to_list()
    logps = pair_logps(
        trainer, tokens, max_length=cfg.dpo.max_length, label="held-out pairs scored"
    )
    # Not `test`'s own: the trainer leaves pairs out whose prompt alone is as long as `max_length`.
    keys = [json.dumps(prompt) for prompt in trainer.eval_dataset["prompt"]]
    beside = {
        name: compared(_ask_both(trainer, cfg, side, label=name)[0])
        for name, side in side_probes(cfg).items()
    }
    chosen, rejected = implicit_rewards(logps, trainer.beta)
    figures = _figures(cfg, frame, chosen, rejected, keys, beside)
    figures["length"] = length_follows(tokens, chosen - rejected, cfg.dpo.max_length)
    return figures, frame


def _ask_both(
    trainer: DPOTrainer, cfg: Config, probe: Probe, label: str = ""
) -> tuple[pd.DataFrame, dict[str, list[Reply]]]:
    """Replies of base and tuned to the prompts of `probe`, with their measures."""
    frame = pd.DataFrame({"prompt": [p[-1]["content"] for p in probe.prompts]})
    for name, values in probe.columns.items():
        frame[name] = values
    frame["cluster"] = probe.clusters or [json.dumps(p) for p in probe.prompts]
    replies = {}
    for who, answering in (("base", reference(trainer)), ("tuned", nullcontext(trainer.model))):
        with answering as model:
            replies[who] = _generate(
                trainer, cfg, model, probe.prompts, probe.options, f"{label} {who}".strip()
            )
        _add_measures(frame, who, replies[who], probe)
        if cfg.is_main_process and not label:
            cfg.run_dir.mkdir(parents=True, exist_ok=True)
            _write_lines(frame, cfg.run_dir / PARTIAL)
    return frame, replies


def _generate(
    trainer: DPOTrainer, cfg: Config, model: PreTrainedModel, prompts: list, options: list | None,
    label: str, **decoding: float,
) -> list[Reply]:  # fmt: skip
    """Replies, as many at a time as the config says, or fewer where memory does not hold them."""
    size = cfg.recipe.generation_batch_size
    while True:
        free_memory()  # what went before let go of blocks of other sizes, which would lie beside
        try:
            return generate_replies(
                model, trainer.processing_class, prompts, options=options, label=label,
                max_new_tokens=cfg.recipe.max_new_tokens, batch_size=size, **decoding,
            )  # fmt: skip
        except RuntimeError as error:
            if size == 1 or not should_reduce_batch_size(error):
                raise
        size //= 2
        print(f"{label}: out of memory; once more, {size} replies at a time")


# What the base model does without any training, and is cheaper; a tuning has to beat it.
BASELINES = {
    "asked": "base, asked to be brief",
    "cut": "base, first sentence only",
    "unrepeated": "base, no 4-gram twice",
}


def _ask_baselines(trainer: DPOTrainer, cfg: Config, probe: Probe, frame: pd.DataFrame) -> None:
    """Add the replies of the `BASELINES` and their measures to `frame`."""
    asked = [
        [*earlier, last | {"content": last["content"] + probe.brief}]
        for *earlier, last in probe.prompts
    ]
    with reference(trainer) as model:
        _add_measures(
            frame,
            "asked",
            _generate(trainer, cfg, model, asked, probe.options, BASELINES["asked"]),
            probe,
        )
        unrepeated = _generate(
            trainer, cfg, model, probe.prompts, probe.options, BASELINES["unrepeated"], unrepeated=4
        )
    _add_measures(frame, "unrepeated", unrepeated, probe)
    cut = []
    for text in frame["base"]:
        text = (split_sentences(text) or [""])[0]
        ids = trainer.processing_class(text, add_special_tokens=False)["input_ids"]
        cut.append(Reply(text, ids, finished=False, prompt_ids=[]))
    _add_measures(frame, "cut", cut, probe)
    frame["cut_finished"] = True  # by the cut


def length_follows(rows: list[dict], margins: np.ndarray, max_length: int | None) -> dict:
    """How far length alone tells tokenised pairs apart, and how far their `margins` follow it.

    Returns `rule` (`shorter` or `longer`: the answer that wins more often), `rule_accuracy`, and
    `margin_correlation`, that of the margins with the tokens by which the rejected answer is the
    longer; None where one of them does not vary. Answers are cut at `max_length`, as in training.
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


def restore_reference(trainer: DPOTrainer, cfg: Config) -> None:
    """Load the model as it was before training again, where TRL has let it go or changed it.

    That concerns only runs without an adapter: `precompute_ref_log_probs` scores the pairs once
    and keeps no reference, and `sync_ref_model` moves it along with the policy.
    """
    dropped = trainer.ref_model is None and not isinstance(trainer.model, PeftModel)
    if dropped or trainer.args.sync_ref_model:
        trainer.ref_model = load_model(cfg, trainer.model.config.name_or_path)
        add_fused_lm_head(trainer.ref_model)
        # By the same arithmetic as the policy, so that an untrained policy differs by exactly 0.
        if isinstance(trainer, PrefixSharedDPOTrainer) and trainer.refusal is None:
            share_prefixes(trainer.ref_model, trainer.prefix_attention)


def _add_measures(frame: pd.DataFrame, who: str, replies: list[Reply], probe: Probe) -> None:
    """Add to `frame` what each of `replies` says, and what its text and tokens measure."""
    frame[who] = [r.text for r in replies]
    frame[f"{who}_length"] = [r.length for r in replies]
    frame[f"{who}_finished"] = [r.finished for r in replies]
    frame[f"{who}_repeated"] = [repeated_ngram_share(r.ids) for r in replies]
    scores = pd.DataFrame([probe.score(i, r.text) for i, r in enumerate(replies)]).astype(float)
    for name in scores:
        frame[f"{who}_{name}"] = scores[name].to_numpy()


def _base_nll(trainer: DPOTrainer, replies: dict[str, list[Reply]]) -> dict[str, np.ndarray]:
    """Loss per token of each reply under the base model: are the tuned replies still fluent?

    Both replies to a prompt make one pair for `pair_logps`, whose reference is the base model.
    They are scored after the very tokens that they were generated from.
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


def compared(frame: pd.DataFrame, one: str = "base", other: str = "tuned") -> dict[str, dict]:
    """Each measure of two models' replies, and the change prompt by prompt, with its interval.

    `both_finish` is the change on the prompts to which both give a reply that finishes: a figure
    that only gained because the other was cut off at the limit shows there.
    """
    both = (frame[f"{one}_finished"] & frame[f"{other}_finished"]).to_numpy(bool)
    measures = {}
    for name in MEASURES:
        if f"{one}_{name}" not in frame or f"{other}_{name}" not in frame:
            continue
        first, second = (frame[f"{who}_{name}"].to_numpy(float) for who in (one, other))
        asked = ~np.isnan(first)  # not every measure is of every prompt
        if not asked.any():
            continue
        draw = {"prompts": frame["cluster"][asked]}
        measures[name] = {
            one: bootstrap(first[asked], **draw),
            other: bootstrap(second[asked], **draw),
            "change": bootstrap((second - first)[asked], **draw),
        }
        if (asked & both).any():
            measures[name]["both_finish"] = bootstrap(
                (second - first)[asked & both], prompts=frame["cluster"][asked & both]
            )
    return measures


def checked_wins(frame: pd.DataFrame) -> np.ndarray:
    """1 where the tuned reply is better by the checker of the questions, 0 where it is worse.

    Better is exact before anything else, then right in the first sentence; all else is a tie, 0.5.
    """
    grade = {
        who: 2 * frame[f"{who}_exact"] + frame[f"{who}_first"].fillna(0)
        for who in ("base", "tuned")
    }
    return (np.sign(grade["tuned"] - grade["base"]).to_numpy() + 1) / 2


def judged_wins(frame: pd.DataFrame, prompts: list, judge: Judge) -> np.ndarray:
    """1 where `judge` prefers the tuned reply, 0 where the base's, 0.5 for a tie.

    An endpoint is asked in both orders, and a verdict that turns with the order is a tie. `prompts`
    are the conversations that the rows of `frame` reply to.
    """

    def win(at: int) -> float:
        replies = [
            {"text": frame[who][at], "tokens": int(frame[f"{who}_length"][at]), "style": who}
            for who in ("base", "tuned")
        ]
        prompt = {"id": f"reply-{at}", "messages": prompts[at]}
        preferred = judge(prompt, [reply | {"finished": True} for reply in replies])
        return float(preferred[0].chosen["style"] == "tuned") if preferred else 0.5

    with ThreadPoolExecutor(judge.workers) as pool:
        return np.array(list(pool.map(win, range(len(frame)))))


def _figures(
    cfg: Config, frame: pd.DataFrame, chosen: np.ndarray, rejected: np.ndarray, prompts: list[str],
    beside: dict[str, dict],
) -> dict:  # fmt: skip
    """What `evaluation.json` holds; `prompts` names the prompt of each pair of rewards."""
    measures = compared(frame)
    base, tuned = frame["base_length"].to_numpy(), frame["tuned_length"].to_numpy()
    whole = {
        "shorter": bootstrap(base - tuned, per=base.clip(1), prompts=frame["cluster"]),
        # A tie tells nothing, as a coin does: half.
        "reward_accuracy": bootstrap((np.sign(chosen - rejected) + 1) / 2, prompts=prompts),
        "reward_margin": bootstrap(chosen - rejected, prompts=prompts),
    }
    aimed_at = whole | {name: m["change"] for name, m in measures.items()}
    aimed_at["tuned_finished"] = measures["finished"]["tuned"]
    for name, side in beside.items():
        aimed_at |= {f"{name}: {measure}": m["change"] for measure, m in side.items()}
    figures = {
        "prompts": len(frame),
        "pairs": len(chosen),
        "max_new_tokens": cfg.recipe.max_new_tokens,
        "interval": f"bootstrap of prompts (with all their pairs), 95%, {DRAWS} draws",
        **whole,
        "measures": measures,
        "beside": beside,
        "baselines": {
            label: compared(frame, who, "tuned") for who, label in BASELINES.items() if who in frame
        },
        "targets": {
            aim.text: aim.verdict(aimed_at[aim.figure])
            for aim in aims_of(cfg.recipe.aims, "exact" in measures)
            if aim.figure in aimed_at
        },
    }
    if "exact" in measures:
        figures["interval"] = (
            f"bootstrap of passages (with all their questions), 95%, {DRAWS} draws"
        )
        figures["win_rate"] = {
            "judge": "the checker that measures exact answers, which also ranked the pairs"
        } | length_controlled(checked_wins(frame), tuned, base, frame["cluster"])
    return figures


def save_evaluation(figures: dict, frame: pd.DataFrame, run_dir: Path) -> None:
    """Write `evaluation.json` and the replies side by side (`replies.jsonl`) into the run; a kill
    or a full disk leaves an earlier evaluation as it was."""
    lines = frame.to_json(orient="records", lines=True, force_ascii=False)
    write_whole(run_dir / "replies.jsonl", lines)
    write_whole(run_dir / "evaluation.json", json.dumps(figures, indent=2, allow_nan=False))
    (run_dir / PARTIAL).unlink(missing_ok=True)


def _write_lines(frame: pd.DataFrame, path: Path) -> None:
    frame.to_json(path, orient="records", lines=True, force_ascii=False)


def show(value: dict, signed: bool = False) -> str:
    """A figure with its interval in words, as `bootstrap` returns it."""
    sign, digits = "+" if signed else "", 1 if abs(value["mean"]) >= 10 else 2
    ends = [value["low"], value["high"]]
    mean, *ends = (f"{x:{sign}.{digits}f}" for x in [value["mean"], *ends] if x is not None)
    return f"{mean} [{', '.join(ends) or 'one prompt'}]"


def measures_table(measures: dict) -> pd.DataFrame:
    """Base, tuned, the change with its 95% interval, and the change where both replies finish."""
    rows = {}
    for name, label in MEASURES.items():
        if name in measures:
            m = measures[name]
            rows[label] = {"base": show(m["base"]), "tuned": show(m["tuned"])}
            rows[label]["change"] = show(m["change"], signed=True)
            both = m.get("both_finish")
            rows[label]["change where both finish"] = show(both, signed=True) if both else ""
    return pd.DataFrame.from_dict(rows, orient="index")


def evaluation_table(figures: dict) -> pd.DataFrame:
    """The figures as one table: base, tuned, and the change with its 95% interval."""
    table = measures_table(figures["measures"])
    # Before training every implicit reward is 0: each pair is a tie, and there is no margin.
    rewards = {
        "implicit-reward accuracy": {"base": "0.50", "tuned": show(figures["reward_accuracy"])},
        "implicit-reward margin (nats)": {"base": "0", "tuned": show(figures["reward_margin"])},
    }
    return pd.concat([table, pd.DataFrame.from_dict(rewards, orient="index")]).fillna("")


def win_rates(figures: dict) -> pd.DataFrame:
    """The tuned model's win rate over the base, as it is and with length taken out."""
    rates = figures.get("win_rate", {})
    names = {"raw": "win rate", "length_controlled": "at equal length"}
    rows = {text: show(rates[name]) for name, text in names.items() if name in rates}
    return pd.DataFrame({"tuned over base": rows})


# Columns of the table of baselines: what a reply should be.
COMPARED = ("exact", "first", "mentioned", "declined", "facts", "length", "finished", "repeated")


def baselines_table(figures: dict) -> pd.DataFrame:
    """What the base does by other means, beside the base as it is and the tuned model."""
    measures = figures["measures"]
    names = [name for name in COMPARED if name in measures]
    rows = {"base": {MEASURES[n]: show(measures[n]["base"]) for n in names}}
    for label, against in figures["baselines"].items():
        (who,) = (w for w, text in BASELINES.items() if text == label)
        rows[label] = {MEASURES[n]: show(against[n][who]) for n in names}
    rows["tuned with DPO"] = {MEASURES[n]: show(measures[n]["tuned"]) for n in names}
    return pd.DataFrame.from_dict(rows, orient="columns")


def losses(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows whose tuned reply is the worse one by the checker, the worst first."""
    worse = frame[checked_wins(frame) == 0]
    return worse.sort_values(["base_exact", "tuned_unsupported"], ascending=False, kind="stable")


def side_by_side(frame: pd.DataFrame, clip: int = 400) -> str:
    """An HTML table of the prompts in `frame` with both replies and their lengths.

    Replies to questions on a text stand beside it, each marked right or wrong by the checker.
    """
    cells = []
    # On each cell: JupyterLab's own style for cells of tables is to the right.
    cell = "<td style='text-align:left;vertical-align:top'>"
    for _, row in frame.iterrows():
        asked = f"<b>{html.escape(row.get('question') or row['prompt'])}</b>"
        if "passage" in row:
            asked = f"{html.escape(row['passage'])}<br>{asked}"
        line = f"{cell}{asked}</td>"
        for who in ("base", "tuned"):
            text = row[who] if len(row[who]) <= clip else row[who][:clip] + " …"
            state = "" if row[f"{who}_finished"] else ", cut off"
            note = f"{row[f'{who}_length']} tokens{state}"
            if f"{who}_exact" in row:
                note = f"{'✓ right' if row[f'{who}_exact'] else '✗ not right'}, {note}"
            line += f"{cell}{html.escape(text)}<br><i>{note}</i></td>"
        cells.append(f"<tr>{line}</tr>")
    head = "".join(
        f"<th style='text-align:left;width:{width}%'>{name}</th>"
        for name, width in (("prompt", 40), ("before", 30), ("after", 30))
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>"


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    trained = require_adapter(cfg)
    run = assemble(cfg)
    load_adapter(run.trainer.model, trained)
    judge = make_judge(args, cfg) if args.judge != "checker" else None  # before any reply
    figures, frame = evaluate(run.trainer, cfg, run.pairs["test"])
    if judge:
        wins = judged_wins(frame, main_probe(cfg, run.pairs["test"]).prompts, judge)
        lengths = frame["tuned_length"], frame["base_length"]
        figures["win_rate"] = {"judge": judge.name} | length_controlled(
            wins, *lengths, frame["cluster"]
        )
    if cfg.is_main_process:
        save_evaluation(figures, frame, cfg.run_dir)
        print(evaluation_table(figures).to_string())
        if "win_rate" in figures:
            print(f"\njudge: {figures['win_rate']['judge']}\n{win_rates(figures).to_string()}")


if __name__ == "__main__":
    cli.command(main, ARGS)
