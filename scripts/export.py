"""Merge the adapter into 16-bit weights, and prove that the merged model is the one evaluated.

    python -m scripts.export --config outputs/<run>/config.yaml

What was trained and evaluated is an adapter on 4-bit weights. Merging into 4 bits would round the
adapter away, so it goes into 16-bit weights. `merge_into` says which: the 4-bit weights written out
("dequantized"), on which the adapter was trained, or the original ones, which it never met.

`prove` compares every form with the evaluated policy in one table; `gguf` writes files for
llama.cpp and Ollama; `serve-files` writes what Ollama, vLLM and NIM need; `push` sends adapter or
merged model to the hub.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("export")

import argparse
import shutil
from dataclasses import dataclass

import pandas as pd
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scripts.adapter import refuse_other_base, require_adapter
from scripts.base import RecipeError
from scripts.config import Config, config_from_args
from scripts.data import load_preferences
from scripts.gguf import make_gguf, require_tools
from scripts.model import free_memory, load_model, load_tokenizer, resolve_model
from scripts.pairs.generation import generate_replies
from scripts.plan_memory import require_room
from scripts.probes import Probe, main_probe
from scripts.proof import (
    completion_logps,
    kept_replies,
    mean_gap,
    plain_model,
    proof_table,
    reply_measures,
    require_merged,
)
from scripts.publish import push
from scripts.serve import write_serving

# Nats a token: a merge this close is as good as arithmetic can tell. Two ways of 16-bit arithmetic
# scatter by less than 0.01; a policy on NF4 weights, in bfloat16, lies 0.03 from the very same
# weights in float16 (default run, CPU, where bitsandbytes also rounds the scales to bfloat16), and
# 0.05 on a single answer.
NOISE, NF4_NOISE = 0.01, 0.1
UNPROVED = "merged.unproved"  # in the run folder: written, and not read back yet


class MergeError(RecipeError):
    """The merged model does not say what the evaluated one says."""


@dataclass(frozen=True)
class Form:
    """The adapter on, or merged into, `original` or `dequantized` weights of `dtype`."""

    weights: str
    dtype: str
    merged: bool = True

    @property
    def name(self) -> str:
        """The form's row in the table."""
        weights = {"original": "the original weights", "dequantized": "dequantized NF4"}
        how = "merged into" if self.merged else "adapter on"
        return f"{how} {weights[self.weights]}, {self.dtype}"


FORMS = [
    Form(weights, dtype, merged)
    for weights, merged in (("original", False), ("original", True), ("dequantized", True))
    for dtype in ("float16", "bfloat16")
]


def is_quantized(cfg: Config) -> bool:
    """Whether the run trains an adapter on weights of 4 or 8 bits."""
    return cfg.model.load_in_4bit or cfg.model.load_in_8bit


def shipped_form(cfg: Config) -> Form:
    """The form that `export` writes for this config; without 4 bits, the weights are original."""
    return Form(cfg.recipe.merge_into if is_quantized(cfg) else "original", cfg.recipe.merge_dtype)


def load_to_merge(cfg: Config, base: str, form: Form | None = None) -> PreTrainedModel:
    """The weights to merge the run's adapter into, in 16 bits; `form` is by default the config's.

    `dequantized` quantizes the base as training did and writes its 16 levels out
    (https://huggingface.co/docs/transformers/main/en/quantization/bitsandbytes, "Dequantizing").
    float16 beats bfloat16 here: it keeps three more bits of each weight, and what training adds is
    small. A run without an adapter has its own whole model, and nothing to merge.

    Raises:
        AdapterError: there is no adapter yet, or it was trained on another model.
    """
    form, trained = form or shipped_form(cfg), require_adapter(cfg)
    if not cfg.model.use_peft:
        return plain_model(cfg, trained, form.dtype)
    refuse_other_base(trained, base)
    if form.weights == "original":
        return plain_model(cfg, base, form.dtype)
    dtype = getattr(torch, form.dtype)
    model = load_model(cfg, base).dequantize(dtype).to(dtype)  # norms and embeddings too
    model.config.use_cache = True  # training had switched it off
    return model


def load_form(cfg: Config, base: str, form: Form) -> PreTrainedModel:
    """The tuned model in this form."""
    model = load_to_merge(cfg, base, form)
    if not cfg.model.use_peft:
        return model
    model = PeftModel.from_pretrained(model, require_adapter(cfg)).eval()
    return model.merge_and_unload(safe_merge=True) if form.merged else model


def evaluated_policy(
    cfg: Config, base: str, rows: list[dict]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Score `rows` by what was evaluated, the adapter on weights as training had them, and by the
    same before training; each as `completion_logps` gives it.

    A run without an adapter is scored in float32, and so is its base: two ways of 16-bit arithmetic
    differ by more than the rounding of the weights, which is what we want to see there.
    """
    trained = require_adapter(cfg)
    if not cfg.model.use_peft:
        policy = completion_logps(plain_model(cfg, trained, "float32"), rows)
        return policy, completion_logps(plain_model(cfg, base, "float32"), rows)
    refuse_other_base(trained, base)
    model = PeftModel.from_pretrained(load_model(cfg, base), trained).eval()
    policy = completion_logps(model, rows)
    with model.disable_adapter():
        return policy, completion_logps(model, rows)


def prove_merge(cfg: Config, base: str, rows: list[dict]) -> dict[str, float]:
    """Read back the merged model saved in `merged.unproved/`; if it says what the evaluated policy
    says, rename it to `merged/`, else delete it. `rows` are tokenised held-out pairs.

    Returns:
        Mean absolute differences per token, in nats: `effect` (policy against reference: what
        training changed) and `error` (merged against policy: what merging changed).

    Raises:
        MergeError: `error` is more than a tenth of `effect`, and more than arithmetic itself
            scatters (`NOISE`), so that a run of a few steps can be merged too. Where the config
            asks for the original weights in place of 4-bit ones, the bound is half of `effect`:
            nearer to the tuned policy than to the untrained one.
    """
    target, trial = cfg.run_dir / "merged", cfg.run_dir / UNPROVED
    if not trial.is_dir():
        done = f" ({target} is proved already)" * target.is_dir()
        raise MergeError(f"there is no {trial}: save the merged model there first{done}")
    policy, reference = evaluated_policy(cfg, base, rows)
    free_memory()
    form = shipped_form(cfg)
    # Without an adapter the policy is scored in float32: so is the merged model.
    model = plain_model(cfg, trial, form.dtype if cfg.model.use_peft else "float32")
    error, effect = mean_gap(completion_logps(model, rows), policy), mean_gap(policy, reference)
    share = 0.5 if is_quantized(cfg) and form.weights == "original" else 0.1
    if not error <= max(share * effect, NF4_NOISE if is_quantized(cfg) else NOISE):
        shutil.rmtree(trial)
        raise MergeError(
            f"the merged model differs from the evaluated one by {error:.4f} nats a token, and "
            f"training moved it by only {effect:.4f}; do not use it: it was deleted, an earlier "
            "merge is kept. `python -m scripts.export prove` shows which merge_into and "
            "merge_dtype come closer"
        )
    shutil.rmtree(target, ignore_errors=True)  # an earlier merge goes only once this one is proved
    trial.rename(target)
    return {"effect": effect, "error": error}


def merge_adapter(
    cfg: Config, base: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> dict[str, float]:
    """Merge the run's adapter, write the model, and prove it; see `prove_merge`."""
    trial = cfg.run_dir / UNPROVED
    print("merging and writing ...", flush=True)
    shutil.rmtree(trial, ignore_errors=True)
    model = load_form(cfg, base, shipped_form(cfg))
    model.save_pretrained(trial)
    tokenizer.save_pretrained(trial)
    del model
    free_memory()
    print("scoring the evaluated and the merged model ...", flush=True)
    return prove_merge(cfg, base, rows)


def prove(
    cfg: Config, base: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict], probe: Probe,
    questions: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Compare every form with the policy that was evaluated.

    `rows` (tokenised pairs) are scored token by token; to `questions` of the prompts of `probe`
    (None: all, 0: none) each form replies, as the policy did in the evaluation.

    Returns:
        A frame with a row a form: `difference` from the policy (mean of the absolute difference
        per token, nats), `of_training` (the same over what training moved, which stands in
        `frame.attrs["effect"]`), `same` (share of the replies that are the policy's own, word by
        word) and the measures of the replies. The first row is the policy itself.

    Raises:
        RecipeError: there are no kept replies of the policy to compare with.
    """
    kept = kept_replies(cfg, probe, questions)
    policy, reference = evaluated_policy(cfg, base, rows)
    effect = mean_gap(policy, reference)
    line = {"form": "the policy that was evaluated", "difference": 0.0, "of_training": 0.0}
    if texts := list(kept.values()):
        lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
        line |= reply_measures(probe, kept, texts, lengths)
    lines = [line]
    for form in FORMS:
        if form.weights == "dequantized" and not is_quantized(cfg):
            continue
        free_memory()
        model = load_form(cfg, base, form)
        if model.device.type == "cpu":  # which has no fast float16; the weights are rounded already
            model.float()
        gap = mean_gap(completion_logps(model, rows), policy)
        line = {"form": form.name, "difference": gap, "of_training": gap / effect}
        if kept:
            replies = generate_replies(
                model, tokenizer, [probe.prompts[i] for i in kept], label=form.name,
                options=[probe.options[i] for i in kept] if probe.options else None,
                max_new_tokens=cfg.recipe.max_new_tokens,
                batch_size=cfg.recipe.generation_batch_size,
            )  # fmt: skip
            lengths = (reply.length for reply in replies)
            line |= reply_measures(probe, kept, [reply.text for reply in replies], lengths)
        lines.append(line)
        del model
    frame = pd.DataFrame(lines)
    frame.attrs["effect"] = effect
    return frame


def main(args: argparse.Namespace) -> None:
    if args.action == "push":
        return push(args)
    if args.action == "gguf":
        require_tools()
    cfg = config_from_args(args)
    if cfg.dpo.world_size > 1:
        raise RecipeError("export is the work of one process: python -m scripts.export ...")
    require_adapter(cfg)
    if args.action in ("merge", "prove"):
        require_room(cfg)
    else:
        require_merged(cfg)
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    if args.action == "serve-files":
        folder, remarks = write_serving(cfg, tokenizer, args.name, args.system)
        print("\n".join([*remarks, f"written: {folder}; its README.md has the commands"]))
        return
    test = load_preferences(cfg, tokenizer)["test"]
    rows = test.select(range(min(args.rows, len(test)))).to_list()
    if args.action == "merge":
        report = merge_adapter(cfg, path, tokenizer, rows)
        print(f"merged: {cfg.run_dir / 'merged'} (per token, training moved {report['effect']:.3f} "
              f"nats, merging {report['error']:.4f})")  # fmt: skip
        return
    probe = main_probe(cfg, test)
    if args.action == "prove":
        frame = prove(cfg, path, tokenizer, rows, probe, args.questions)
        effect = frame.attrs["effect"]
        print(f"this config ships: {shipped_form(cfg).name}")
    else:
        policy, reference = evaluated_policy(cfg, path, rows)
        frame = make_gguf(cfg, tokenizer, rows, probe, args.types, policy, args.questions)
        effect = mean_gap(policy, reference)
    frame.to_json(cfg.run_dir / f"{args.action}.json", orient="records", indent=2)
    print(f"training moved a token of {len(rows)} held-out answers by {effect:.4f} nats on average")
    print(proof_table(frame).to_string())
