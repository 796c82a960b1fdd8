"""Merge the adapter into 16-bit weights, and prove that the merged model is the same.

    python -m scripts.export --config outputs/<run>/config.yaml

merges the saved adapter of a finished run; a run without one has its whole model written in 16
bits, with the same proof. `push` sends adapter or merged model to the hub (`scripts/publish.py`).
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("export")  # before the libraries load, so that --help is answered at once

import argparse
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from scripts.adapter import refuse_other_base, require_adapter
from scripts.config import Config, RecipeError, config_from_args
from scripts.data import load_preferences
from scripts.hub import fetch
from scripts.model import free_memory, load_tokenizer, resolve_model
from scripts.pairs.tokens import tokenize_pairs
from scripts.planning.exports import merge_needs, require_room
from scripts.planning.memory import model_sizes
from scripts.publish import push

NOISE = 0.01  # nats a token: a merge this close is as good as 16-bit arithmetic can tell


class MergeError(RecipeError):
    """The merged model does not say what the trained one says."""


def _load(cfg: Config, path: str | Path, dtype: str) -> PreTrainedModel:
    """A model in plain weights of `dtype`, on the GPU if there is one."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        revision=fetch(str(path), cfg.model.model_revision),
        dtype=dtype,
        use_safetensors=True,
        device_map={"": cfg.dpo.device},
    ).eval()


@torch.no_grad()
def completion_logps(model: PreTrainedModel, rows: list[dict]) -> list[torch.Tensor]:
    """Log-probability of every token of `chosen_ids` after `prompt_ids`, one tensor a row.

    One row at a time, and logits only where an answer's token is predicted, so that a vocabulary
    of 128256 costs little memory. Each tensor is float32 of shape (answer tokens,), in nats.
    """
    scores = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=model.device)
        answer = ids[0, len(row["prompt_ids"]) :]
        logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        scores.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].cpu())
    return scores


def merge_adapter(
    cfg: Config, base: str, trained: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict]
) -> tuple[Path, PreTrainedModel, dict[str, float]]:
    """Merge the adapter in `trained` into the 16-bit `base`, save, reload from disk, and compare.

    float16 rather than bfloat16: it keeps three more bits of each weight, and what training adds to
    a weight is small beside it. The weights of a Llama lie well within float16's range.

    Merging into the 4-bit weights would round the adapter away with them; the base is loaded
    again in 16 bits instead. `rows` (tokenised pairs) are scored by base, by the trained model,
    and by the merged model read back from disk.

    In a run without an adapter the trained model is the one in `trained`, and the merged one is
    that with its weights in 16 bits. All are then scored in float32: two ways of 16-bit arithmetic
    differ by more than the rounding of the weights, which is in question here.

    Returns:
        The folder `merged/`, the reloaded model, and the mean absolute differences per token, in
        nats: `effect` (trained against base: what training changed) and `error` (merged against
        trained: what merging changed, 16-bit rounding).

    Raises:
        MergeError: `error` is more than a tenth of `effect`, and more than 16-bit arithmetic
            itself scatters (`NOISE`), so that a run of a few steps can be merged too.
    """
    target, trial = cfg.run_dir / "merged", cfg.run_dir / "merged.unproved"
    dtype = cfg.recipe.merge_dtype
    scored_in = dtype if cfg.model.use_peft else "float32"
    model = _load(cfg, base, scored_in)
    plain = completion_logps(model, rows)
    if cfg.model.use_peft:
        refuse_other_base(trained, str(base))
        model = PeftModel.from_pretrained(model, trained).eval()
        tuned = completion_logps(model, rows)
        model = model.merge_and_unload(safe_merge=True)
    else:
        del model
        model = _load(cfg, trained, scored_in)
        tuned = completion_logps(model, rows)
        model = model.to(getattr(torch, dtype))
    shutil.rmtree(trial, ignore_errors=True)
    model.save_pretrained(trial)
    tokenizer.save_pretrained(trial)
    del model
    free_memory()
    reloaded = _load(cfg, trial, scored_in)
    again = completion_logps(reloaded, rows)
    report = {"effect": _mean_gap(tuned, plain), "error": _mean_gap(again, tuned)}
    if not report["error"] <= max(0.1 * report["effect"], NOISE):
        shutil.rmtree(trial)
        raise MergeError(
            f"log-probabilities of the merged and the trained model differ by "
            f"{report['error']:.4f} nats a token, training changed them by "
            f"{report['effect']:.4f}; do not use it: it is deleted, and an earlier one is kept"
        )
    shutil.rmtree(target, ignore_errors=True)  # an earlier merge goes only once this one is proved
    trial.rename(target)
    return target, reloaded.to(getattr(torch, dtype)), report


def _mean_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return (torch.cat(a) - torch.cat(b)).abs().mean().item()


def main(args: argparse.Namespace) -> None:
    if args.action == "push":
        return push(args)
    cfg = config_from_args(args)
    if cfg.dpo.world_size > 1:
        raise RecipeError("a merge is the work of one process: python -m scripts.export ...")
    trained = require_adapter(cfg)
    require_room("the merge", merge_needs(cfg, model_sizes(cfg)), cfg.run_dir)
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    test = load_preferences(cfg, tokenizer)["test"]
    rows = tokenize_pairs(test.select(range(min(8, len(test)))).to_list(), tokenizer)
    target, _, report = merge_adapter(cfg, path, trained, tokenizer, rows)
    print(f"merged: {target} (per token, training {report['effect']:.3f} nats, ", end="")
    print(f"merging {report['error']:.4f})")


if __name__ == "__main__":
    cli.command(main, ARGS)
