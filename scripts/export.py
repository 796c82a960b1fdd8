"""Merge the adapter into 16-bit weights, and prove that the merged model is the one evaluated.

    python -m scripts.export --config outputs/<run>/config.yaml

merges the saved adapter of a finished run; a run without one has its whole model written in 16
bits, with the same proof. `prove` holds every form that can leave against the evaluated policy, in
one table; `gguf` writes the merged model for llama.cpp and Ollama, and `serve-files` what Ollama,
vLLM and NIM need to serve it; `push` sends adapter or merged model to the hub
(`scripts/publish.py`).
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("export")  # before the libraries load, so that --help is answered at once

import argparse
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scripts.adapter import require_adapter
from scripts.base import RecipeError
from scripts.config import Config, config_from_args
from scripts.data import load_preferences
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.pairs.tokens import tokenize_pairs
from scripts.plan_memory import require_room
from scripts.probes import main_probe
from scripts.progress import Progress
from scripts.publish import push
from scripts.shipping.forms import (
    Scores,
    build,
    completion_logps,
    evaluated_policy,
    is_quantized,
    mean_gap,
    plain_model,
    proof_table,
    prove,
    shipped_form,
)
from scripts.shipping.gguf import make_gguf, require_tools
from scripts.shipping.serving import write_serving

# Nats a token: a merge this close is as good as arithmetic can tell. Two ways of 16-bit arithmetic
# scatter by less than 0.01; a policy on NF4 weights, in bfloat16, lies 0.03 from the very same
# weights in float16 (default run, CPU, where bitsandbytes also rounds the scales to bfloat16), and
# 0.05 on a single answer.
NOISE, NF4_NOISE = 0.01, 0.1


class MergeError(RecipeError):
    """The merged model does not say what the evaluated one says."""


def merge_adapter(
    cfg: Config, base: str, trained: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict],
    policy: Scores | None = None,
) -> tuple[Path, PreTrainedModel, dict[str, float]]:  # fmt: skip
    """Merge the adapter in `trained` into `base`, save, reload from disk, and compare.

    Merged are 16-bit weights: 4-bit ones would round the adapter away with them. `merge_into` says
    which: the 4-bit weights written out in 16 bits, on which the adapter was trained, or the
    original ones. float16 rather than bfloat16: it keeps three more bits of each weight, and what
    training adds to a weight is small beside it. The weights of a Llama lie well within its range.

    `rows` (tokenised pairs) are scored by the policy that was evaluated, by its reference, and by
    the merged model read back from disk; `policy` are the scores of the first two, where they are
    known already.

    In a run without an adapter the trained model is the one in `trained`, and the merged one is
    that with its weights in 16 bits.

    Returns:
        The folder `merged/`, the reloaded model, and the mean absolute differences per token, in
        nats: `effect` (policy against reference: what training changed) and `error` (merged against
        policy: what leaving NF4 and merging changed).

    Raises:
        MergeError: `error` is more than a tenth of `effect`, and more than arithmetic itself
            scatters (`NOISE`), so that a run of a few steps can be merged too. Where the config
            asks for the original weights in place of 4-bit ones, the bound is half of `effect`:
            nearer to the tuned policy than to the untrained one.
    """
    target, trial = cfg.run_dir / "merged", cfg.run_dir / "merged.unproved"
    form = shipped_form(cfg)
    bar = Progress(4, patience=3)

    def tell(done: int, text: str) -> None:
        bar.show(done, f"merging: {text}, {bar.seconds:.0f} s")

    tell(0, "the policy is scored")
    policy = policy or evaluated_policy(cfg, base, trained, rows)
    free_memory()
    tell(1, "the adapter is merged")
    model = build(cfg, base, trained, form)
    tell(2, "the merged model is written")
    shutil.rmtree(trial, ignore_errors=True)
    model.save_pretrained(trial)
    tokenizer.save_pretrained(trial)
    del model
    free_memory()
    # Without an adapter arithmetic must not pass for rounding: there the policy's is float32 too.
    tell(3, "the merged model is read back and scored")
    reloaded = plain_model(cfg, trial, form.dtype if cfg.model.use_peft else "float32")
    error = mean_gap(completion_logps(reloaded, rows), policy.policy)
    tell(4, "through")
    report = {"effect": policy.effect, "error": error}
    moved_away = is_quantized(cfg) and form.weights == "original"
    noise = NF4_NOISE if is_quantized(cfg) else NOISE
    if not error <= max((0.5 if moved_away else 0.1) * policy.effect, noise):
        shutil.rmtree(trial)
        raise MergeError(
            f"log-probabilities of the merged model and of the evaluated one differ by {error:.4f} "
            f"nats a token, training changed them by {policy.effect:.4f}; do not use it: it is "
            "deleted, and an earlier one is kept. `python -m scripts.export prove` tells which "
            "merge_into and merge_dtype come nearer"
        )
    shutil.rmtree(target, ignore_errors=True)  # an earlier merge goes only once this one is proved
    trial.rename(target)
    return target, reloaded.to(getattr(torch, form.dtype)), report


def main(args: argparse.Namespace) -> None:
    if args.action == "push":
        return push(args)
    if args.action == "gguf":
        require_tools()
    cfg = config_from_args(args)
    if cfg.dpo.world_size > 1:
        raise RecipeError("a merge is the work of one process: python -m scripts.export ...")
    trained = require_adapter(cfg)
    if args.action in ("merge", "prove"):
        require_room(cfg)
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    if args.action == "serve-files":
        folder, remarks = write_serving(cfg, tokenizer, args.name, args.system)
        print("\n".join([*remarks, f"written: {folder}; its README.md has the commands"]))
        return
    test = load_preferences(cfg, tokenizer)["test"]
    rows = tokenize_pairs(test.select(range(min(args.rows, len(test)))).to_list(), tokenizer)
    if args.action == "merge":
        target, _, report = merge_adapter(cfg, path, trained, tokenizer, rows)
        print(f"merged: {target} (per token, training {report['effect']:.3f} nats, ", end="")
        print(f"leaving training's weights and merging {report['error']:.4f})")
        return
    probe = main_probe(cfg, test)
    if args.action == "prove":
        frame = prove(cfg, path, trained, tokenizer, rows, probe, args.questions)
        effect = frame.attrs["effect"]
        print(f"this config ships: {shipped_form(cfg).name}")
    else:
        policy = evaluated_policy(cfg, path, trained, rows)
        frame, effect = (
            make_gguf(cfg, tokenizer, rows, probe, args.types, policy, args.questions),
            policy.effect,
        )
    frame.to_json(cfg.run_dir / f"{args.action}.json", orient="records", indent=2)
    print(f"training moved a token of {len(rows)} held-out answers by {effect:.4f} nats on average")
    print(proof_table(frame).to_string())


if __name__ == "__main__":
    cli.command(main, ARGS)
