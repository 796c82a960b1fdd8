"""The forms of a tuned model in transformers, and their proof.

What was trained and evaluated is an adapter on 4-bit weights. What leaves is something else: the
adapter on 16-bit weights, or weights with the adapter merged in. The 4-bit weights can be the ones
merged into: their 16 levels, written out in 16 bits, are the weights that the adapter was trained
on, where the original ones are weights that it never met.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from scripts.adapter import refuse_other_base
from scripts.base import RecipeError
from scripts.config import Config
from scripts.hub import fetch
from scripts.model import free_memory, load_model
from scripts.pairs.generation import generate_replies
from scripts.probes import Probe, drawn
from scripts.tables import MEASURES

SHOWN = ("exact", "first", "facts")  # of the measures of a reply, what the tables show


@dataclass(frozen=True)
class Form:
    """The adapter on, or merged into, `original` or `dequantized` weights of `dtype`."""

    weights: str
    dtype: str
    merged: bool = True

    @property
    def name(self) -> str:
        """As a row of the table is called."""
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


def plain_model(cfg: Config, path: str | Path, dtype: str) -> PreTrainedModel:
    """A model in plain weights of `dtype`, on the GPU if there is one."""
    return AutoModelForCausalLM.from_pretrained(
        path,
        revision=fetch(str(path), cfg.model.model_revision),
        dtype=dtype,
        use_safetensors=True,
        device_map={"": cfg.dpo.device},
    ).eval()


def build(cfg: Config, base: str, trained: Path, form: Form) -> PreTrainedModel:
    """The adapter in `trained` on `base`, in this form.

    `dequantized` quantizes the base as training did, and writes its levels out
    (https://huggingface.co/docs/transformers/main/en/quantization/bitsandbytes, "Dequantizing").
    The whole model of a run without an adapter has its own weights, in `form.dtype`.

    Raises:
        AdapterError: the adapter was trained on another model.
    """
    if not cfg.model.use_peft:
        return plain_model(cfg, trained, form.dtype)
    refuse_other_base(trained, base)
    if form.weights == "dequantized":
        dtype = getattr(torch, form.dtype)
        model = load_model(cfg, base).dequantize(dtype).to(dtype)  # norms and embeddings too
        model.config.use_cache = True  # which training had switched off
    else:
        model = plain_model(cfg, base, form.dtype)
    model = PeftModel.from_pretrained(model, trained).eval()
    return model.merge_and_unload(safe_merge=True) if form.merged else model


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


@dataclass
class Scores:
    """Log-probabilities of held-out answers, a tensor a row, as `completion_logps` gives them."""

    policy: list[torch.Tensor]  # the model that was evaluated
    reference: list[torch.Tensor]  # the same before training

    @property
    def effect(self) -> float:
        """How far training moved a token's log-probability: mean of the absolute change, nats."""
        return mean_gap(self.policy, self.reference)


def evaluated_policy(cfg: Config, base: str, trained: Path, rows: list[dict]) -> Scores:
    """Score `rows` by what was trained and evaluated: the adapter on weights as training had them.

    The whole model of a run without an adapter, and its base, are scored in float32: two ways of
    16-bit arithmetic differ by more than the rounding of the weights, which is in question there.
    """
    if not cfg.model.use_peft:
        pair = (completion_logps(plain_model(cfg, p, "float32"), rows) for p in (trained, base))
        return Scores(*pair)
    refuse_other_base(trained, base)
    model = PeftModel.from_pretrained(load_model(cfg, base), trained).eval()
    policy = completion_logps(model, rows)
    with model.disable_adapter():
        return Scores(policy, completion_logps(model, rows))


def mean_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Mean absolute difference per token, in nats."""
    return (torch.cat(a) - torch.cat(b)).abs().mean().item()


def kept_replies(cfg: Config, probe: Probe) -> list[str]:
    """The evaluated policy's replies to the prompts of `probe`, from the run's `replies.jsonl`.

    Raises:
        RecipeError: the run has not been evaluated, or with other prompts than the config's.
    """
    path, again = cfg.run_dir / "replies.jsonl", "python -m scripts.evaluate --config ... writes it"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        prompts, replies = [r["prompt"] for r in rows], [r["tuned"] for r in rows]
    except FileNotFoundError:
        raise RecipeError(f"there is no {path}, the replies of the evaluation; {again}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"{path} holds no replies ({error}); {again}") from None
    if prompts != [prompt[-1]["content"] for prompt in probe.prompts]:
        raise RecipeError(f"{path} is of other prompts than this config's; {again} anew")
    return replies


def measured(probe: Probe, at: list[int], texts: list[str], lengths: Iterable[int]) -> dict:
    """Means of what is measured of `texts`, the replies to the prompts `at` of `probe`.

    `lengths` are in tokens. Measures that none of the prompts has are left out.
    """
    scores = pd.DataFrame([probe.score(i, t) for i, t in zip(at, texts, strict=True)])
    means = scores.astype(float).mean().dropna() if len(scores.columns) else {}
    return {name: means[name] for name in SHOWN if name in means} | {
        "length": pd.Series(list(lengths), dtype=float).mean()
    }


def prove(
    cfg: Config, base: str, trained: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict],
    probe: Probe, questions: int | None = None, forms: list[Form] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Hold every form against the policy that was evaluated.

    `rows` (tokenised pairs) are scored token by token; to `questions` of the prompts of `probe`
    (None: all, 0: none) each form replies, as the policy did in the evaluation. On a CPU the
    weights, rounded to the form's 16 bits, are computed with in float32.

    Returns:
        A frame with a row a form: `difference` from the policy (mean of the absolute difference
        per token, nats), `of_training` (the same over what training moved, which stands in
        `frame.attrs["effect"]`), `same` (share of the replies that are the policy's own, word by
        word) and the measures of the replies. The first row is the policy itself.

    Raises:
        RecipeError: there are no kept replies of the policy to compare with.
    """
    scores = evaluated_policy(cfg, base, trained, rows)
    at = drawn(len(probe.prompts), questions, cfg.dpo.seed)
    kept = kept_replies(cfg, probe) if at else []
    policy = {"form": "the policy that was evaluated", "difference": 0.0, "of_training": 0.0}
    if at:
        texts = [kept[i] for i in at]
        lengths = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
        policy |= {"same": 1.0} | measured(probe, at, texts, lengths)
    lines = [policy]
    for form in forms or [f for f in FORMS if f.weights == "original" or is_quantized(cfg)]:
        model = build(cfg, base, trained, form)
        if model.device.type == "cpu":  # which has no fast float16, and whose sums are float32
            model.float()
        gap = mean_gap(completion_logps(model, rows), scores.policy)
        line = {"form": form.name, "difference": gap, "of_training": gap / scores.effect}
        if at:
            replies = generate_replies(
                model, tokenizer, [probe.prompts[i] for i in at], label=form.name,
                options=[probe.options[i] for i in at] if probe.options else None,
                max_new_tokens=cfg.recipe.max_new_tokens,
                batch_size=cfg.recipe.generation_batch_size,
            )  # fmt: skip
            texts = [reply.text for reply in replies]
            line["same"] = sum(kept[i] == t for i, t in zip(at, texts, strict=True)) / len(at)
            line |= measured(probe, at, texts, (reply.length for reply in replies))
        lines.append(line)
        del model
        free_memory()
    frame = pd.DataFrame(lines)
    frame.attrs["effect"] = scores.effect
    return frame


def proof_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of `prove` or `make_gguf` for reading: rounded, with names in words."""
    names = {
        "difference": "nats/token from the policy", "of_training": "of what training moved",
        "from_merged": "nats/token from merged", "from_policy": "from the policy",
        "same": "same replies", **{name: MEASURES[name] for name in (*SHOWN, "length")},
    }  # fmt: skip
    table = frame.set_index(frame.columns[0]).rename_axis(None)
    digits = {"difference": 4, "from_merged": 4, "from_policy": 4, "length": 1, "MB": 1}
    table = table.round({name: digits.get(name, 3) for name in table})
    return table.rename(columns=names)
