"""Make the preference pairs in `data/`: sample answers from the model itself, then rank them.

Two steps, each a function you can call alone:

1. `sample_answers` asks the base model every prompt several times, once plainly and once with a
   request to be brief, so that both rambling and short answers are the model's own (on-policy).
2. `rank` applies the rule of `data/README.md` to the answers of one prompt and returns its pairs.

    python -m scripts.build_pairs --config configs/smollm2-135m-cpu.yaml

Sampling takes about half an hour on two cores. It appends to `samples.jsonl` batch by batch and
picks up where it stopped; ranking is instant.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from scripts.config import ROOT, RecipeError, argument_parser, command, config_from_args
from scripts.models import load_tokenizer, resolve_model
from scripts.textstats import fact_recall, repeated_ngram_share

# How a prompt is put to the model. The pair keeps only the plain prompt: what the request to be
# brief brought out, the tuned model is to do unasked.
STYLES: dict[str, dict[str, str]] = {
    "plain": {},
    "brief": {"suffix": " Answer in one or two short sentences."},
    "accurate": {"system": "Answer in one or two short, accurate sentences."},
}
SAMPLES = {"plain": 4, "brief": 2, "accurate": 2}


def as_messages(prompt: str, style: str) -> list[dict[str, str]]:
    """The chat messages that ask `prompt` in one of the `STYLES`."""
    how = STYLES[style]
    system = [{"role": "system", "content": how["system"]}] if "system" in how else []
    return [*system, {"role": "user", "content": prompt + how.get("suffix", "")}]


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict],
    path: Path,
    *,
    max_new_tokens: int = 192,
    batch_size: int = 64,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
) -> list[dict]:
    """Sample answers to `prompts` into the JSON-lines file `path`, and return all its rows.

    Each batch has its own seed, so a run that was stopped and resumed writes the same file as one
    that was not. A row holds `id`, `style`, `text`, `tokens` (end of turn not counted) and
    `finished` (whether the model ended its turn within `max_new_tokens`).
    """
    jobs = [(s, p) for s, n in SAMPLES.items() for p in prompts for _ in range(n)]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    rows = read_jsonl(path) if path.exists() else []
    done = len(rows) // batch_size if len(rows) < len(jobs) else len(batches)
    rows = rows[: done * batch_size]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for index, batch in enumerate(batches[done:], start=done):
            torch.manual_seed(seed + index)
            texts = [
                tokenizer.apply_chat_template(
                    as_messages(p["prompt"], style), tokenize=False, add_generation_prompt=True
                )
                for style, p in batch
            ]
            inputs = tokenizer(
                texts,
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            ).to(model.device)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_p=top_p,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]
            for (style, p), ids in zip(batch, output.tolist(), strict=True):
                finished = tokenizer.eos_token_id in ids
                length = ids.index(tokenizer.eos_token_id) if finished else len(ids)
                text = tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
                row = {"id": p["id"], "style": style, "text": text}
                row |= {"tokens": length, "finished": finished}
                rows.append(row)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            print(f"sampled {len(rows)}/{len(jobs)} answers", flush=True)
    return rows


def rank(prompt: dict, answers: list[dict]) -> list[dict]:
    """The preference pairs of one prompt: at most one of each kind, or none.

    An answer is good if it is finished within 80 tokens, ends with a full stop or the like, is one
    paragraph, repeats (next to) nothing, and mentions as many key facts as any of the answers
    does, at least one. Chosen is the longest good one: the limit sees to brevity, and within it the
    shortest of eight is often the emptiest, whatever words it mentions.

    - `concise`: rejected is the longest answer to the plain question, at least 1.5 times as long.
    - `content`: rejected is a finished answer of much the same length (0.67 to 1.5 times) that
      mentions fewer of the facts. It keeps "short" from being all there is to learn.
    """
    for answer in answers:
        answer["recall"] = fact_recall(answer["text"], prompt["facts"])
        answer["repeats"] = repeated_ngram_share(answer["text"].lower().split())
    best = max(a["recall"] for a in answers)
    good = [
        a
        for a in answers
        if a["finished"] and a["tokens"] <= 80 and a["recall"] == best > 0
        if a["repeats"] < 0.05 and a["text"][-1:] in ".!?" and "\n\n" not in a["text"]
    ]
    if not good:
        return []
    chosen = max(good, key=lambda a: a["tokens"])
    size = chosen["tokens"]
    wordy = [a for a in answers if a["style"] == "plain" and a["tokens"] >= 1.5 * size]
    empty = [
        a
        for a in answers
        if a["finished"] and a["recall"] < best and size / 1.5 <= a["tokens"] <= 1.5 * size
    ]
    pairs = []
    if wordy:
        pairs.append(_pair(prompt, "concise", chosen, max(wordy, key=lambda a: a["tokens"])))
    if empty:
        nearest = min(empty, key=lambda a: (a["recall"], abs(a["tokens"] - size)))
        pairs.append(_pair(prompt, "content", chosen, nearest))
    return pairs


def _pair(prompt: dict, kind: str, chosen: dict, rejected: dict) -> dict:
    def message(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    about = {
        f"{side}_{key}": answer[key]
        for side, answer in (("chosen", chosen), ("rejected", rejected))
        for key in ("style", "tokens", "finished", "recall")
    }
    return {
        "id": prompt["id"],
        "topic": prompt["topic"],
        "kind": kind,
        "prompt": message("user", prompt["prompt"]),
        "chosen": message("assistant", chosen["text"]),
        "rejected": message("assistant", rejected["text"]),
        "facts": prompt["facts"],
    } | about


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file."""
    with path.open(encoding="utf-8") as file:  # splitlines() would also split at U+2028 in a text
        return [json.loads(line) for line in file]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--prompts", type=Path, default=ROOT / "data" / "prompts.jsonl")
    parser.add_argument("--samples", type=Path, default=ROOT / "outputs" / "samples.jsonl")
    parser.add_argument("--target", type=Path, default=ROOT / "data", help="folder of the pairs")
    args = parser.parse_args()
    cfg = config_from_args(args)
    if not args.prompts.is_file():
        raise RecipeError(f"no prompts at {args.prompts}")
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=cfg.model.dtype, device_map={"": cfg.dpo.device}
    )
    prompts = {p["id"]: p for p in read_jsonl(args.prompts)}
    answers = sample_answers(model, load_tokenizer(path), list(prompts.values()), args.samples)
    answers.sort(key=lambda a: a["id"])
    pairs = [
        pair
        for name, group in groupby(answers, key=lambda a: a["id"])
        for pair in rank(prompts[name], list(group))
    ]
    for split in ("train", "test"):
        rows = [pair for pair in pairs if prompts[pair["id"]]["split"] == split]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (args.target / f"{split}.jsonl").write_text(text)
        kinds = {kind: sum(r["kind"] == kind for r in rows) for kind in ("concise", "content")}
        print(f"{split}: {len(rows)} pairs {kinds}")


if __name__ == "__main__":
    command(main)
