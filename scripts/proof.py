"""What any form of the tuned model is held against: the policy's scores, and its kept replies.

A form is a merge, a GGUF file or a server. It has to give held-out answers the log-probabilities
that the evaluated policy gave them, and held-out prompts the replies in `replies.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scripts.base import RecipeError
from scripts.config import Config
from scripts.hub import fetch
from scripts.pairs.provenance import read_jsonl
from scripts.probes import Probe, drawn
from scripts.tables import MEASURES

SHOWN = ("exact", "first", "facts")  # of the measures of a reply, what the tables show


def require_merged(cfg: Config) -> Path:
    """The run's merged model.

    Raises:
        RecipeError: it has not been merged yet.
    """
    folder = cfg.run_dir / "merged"
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"no merged model in {cfg.run_dir}; make it first: python -m scripts.export --config "
            f"{cfg.run_dir / 'config.yaml'}"
        )
    return folder


def plain_model(cfg: Config, path: str | Path, dtype: str) -> PreTrainedModel:
    """The model at `path` in plain weights of `dtype`, on the device that the config names."""
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

    It goes row by row and makes logits only for the answer, so a vocabulary of 128,256 costs little
    memory. Each tensor is float32 of shape (answer tokens,), in nats.
    """
    scores = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]], device=model.device)
        answer = ids[0, len(row["prompt_ids"]) :]
        logits = model(ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        scores.append(logits.log_softmax(-1).gather(1, answer[:, None])[:, 0].cpu())
    return scores


def mean_gap(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Mean absolute difference per token, in nats."""
    return (torch.cat(a) - torch.cat(b)).abs().mean().item()


def kept_replies(cfg: Config, probe: Probe, questions: int | None = None) -> dict[int, str]:
    """The evaluated policy's replies to `questions` of the prompts of `probe` (None: all, 0: none),
    from the run's `replies.jsonl`, by their place in the probe.

    Raises:
        RecipeError: the run was not evaluated, or with other prompts than the config's.
    """
    if questions == 0:
        return {}
    path, again = cfg.run_dir / "replies.jsonl", "run python -m scripts.evaluate --config ... first"
    if not path.is_file():
        raise RecipeError(f"there is no {path}, the evaluation's replies; {again}")
    rows = read_jsonl(path, "prompt", "tuned")
    if [row["prompt"] for row in rows] != [prompt[-1]["content"] for prompt in probe.prompts]:
        raise RecipeError(f"the prompts in {path} are not this config's; {again}")
    return {i: rows[i]["tuned"] for i in drawn(len(rows), questions, cfg.dpo.seed)}


def reply_measures(
    probe: Probe, kept: dict[int, str], texts: list[str], lengths: Iterable[int]
) -> dict[str, float]:
    """`same`, the share of `texts` that are the replies in `kept`, and means of their measures.

    `lengths` are in tokens. Measures that none of the prompts has are left out.
    """
    same = [one == other for one, other in zip(kept.values(), texts, strict=True)]
    scores = pd.DataFrame([probe.score(i, text) for i, text in zip(kept, texts, strict=True)])
    scores = scores.reindex(columns=[name for name in SHOWN if name in scores]).astype(float)
    scores["length"] = list(lengths)
    return {"same": sum(same) / len(same), **scores.mean().dropna()}


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
