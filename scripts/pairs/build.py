"""Make preference pairs from a model's own answers: sample several to a prompt, then judge them.

    python -m scripts.data build --prompts prompts.jsonl --judge rule --out outputs/pairs

A prompt is a JSON line with `prompt` (text or messages) and perhaps `id`, `split` (`train` or
`test`) and `facts` (for the rule). Sampling appends to `.build/samples.jsonl` in the output folder
batch by batch, judging to `.build/judged.jsonl` prompt by prompt; a command that was stopped goes
on where it was, and ends with the same files as one that was not.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from scripts.config import Config, RecipeError, config_from_args
from scripts.generation import generate_replies
from scripts.model import load_tokenizer, resolve_model
from scripts.pairs.formats import BadRow, Messages, as_messages
from scripts.pairs.judges import Endpoint, Preference, RewardModel, Rule
from scripts.pairs.sources import read_file

# How a prompt is put to the model. The pair keeps only the plain prompt: what the request to be
# brief brought out, the tuned model is to do unasked.
STYLES: dict[str, dict[str, str]] = {
    "plain": {},
    "brief": {"suffix": " Answer in one or two short sentences."},
    "accurate": {"system": "Answer in one or two short, accurate sentences."},
}
Sampler = Callable[[list[Messages], int], list[tuple[str, int, bool]]]
Judge = Rule | RewardModel | Endpoint


def styled(messages: Messages, style: str) -> Messages:
    """The conversation `messages`, put to the model in one of the `STYLES`."""
    how = STYLES[style]
    *earlier, last = messages
    if "system" in how and not any(m["role"] == "system" for m in messages):
        earlier = [{"role": "system", "content": how["system"]}, *earlier]
    return [*earlier, last | {"content": last["content"] + how.get("suffix", "")}]


def transformers_sampler(cfg: Config, path: str, **sampling) -> Sampler:
    """Answers by `generate`, in 16 bits; the numbers are those of `sampling`."""
    model = AutoModelForCausalLM.from_pretrained(
        path, revision=cfg.model.model_revision, dtype=cfg.model.dtype,
        device_map={"": cfg.dpo.device},
    )  # fmt: skip
    tokenizer = load_tokenizer(path, cfg.model.model_revision)

    def sample(prompts: list[Messages], seed: int) -> list[tuple[str, int, bool]]:
        torch.manual_seed(seed)
        replies = generate_replies(
            model, tokenizer, prompts, batch_size=len(prompts), label=None, **sampling
        )
        return [(reply.text, reply.length, reply.finished) for reply in replies]

    return sample


def vllm_sampler(cfg: Config, path: str, *, max_new_tokens: int, **sampling) -> Sampler:
    """Answers by vLLM, for a GPU. https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html"""
    from vllm import LLM, SamplingParams

    llm = LLM(model=path, revision=cfg.model.model_revision, dtype=str(cfg.model.dtype))

    def sample(prompts: list[Messages], seed: int) -> list[tuple[str, int, bool]]:
        how = [
            SamplingParams(max_tokens=max_new_tokens, seed=seed * 100_003 + i, **sampling)
            for i in range(len(prompts))
        ]
        outputs = [o.outputs[0] for o in llm.chat(prompts, how, use_tqdm=False)]
        return [
            (o.text.strip(), len(o.token_ids) - (o.finish_reason == "stop"),
             o.finish_reason == "stop")
            for o in outputs
        ]  # fmt: skip

    return sample


def sample_answers(
    sample: Sampler, prompts: list[dict], path: Path, *,
    styles: dict[str, int], batch_size: int, seed: int,
) -> list[dict]:  # fmt: skip
    """Sample answers to `prompts` into the JSON-lines file `path`, and return all its rows.

    Each batch has its own seed, so a run that was stopped and resumed writes the same file as one
    that was not; what a kill left of a batch is sampled again. A row holds `id`, `style`, `text`,
    `tokens` (end of turn not counted) and `finished` (whether the model ended its turn in time).
    """
    jobs = [(s, p) for s, n in styles.items() for p in prompts for _ in range(n)]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    rows = read_jsonl(path)
    done = len(batches) if len(rows) == len(jobs) else len(rows) // batch_size
    rows = rows[: done * batch_size]
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line(row) for row in rows)
        for index, batch in enumerate(batches[done:], start=done):
            answers = sample([styled(p["messages"], style) for style, p in batch], seed + index)
            for (style, p), (text, tokens, finished) in zip(batch, answers, strict=True):
                row = {"id": p["id"], "style": style, "text": text}
                rows.append(row | {"tokens": tokens, "finished": finished})
                file.write(line(rows[-1]))
            file.flush()
            print(f"sampled {len(rows)}/{len(jobs)} answers", flush=True)
    return rows


def judge_answers(judge: Judge, prompts: list[dict], answers: list[dict], path: Path) -> list[dict]:
    """The pairs that `judge` finds, prompt by prompt; those already in `path` are not asked again.

    A line of `path` holds the `id` of a prompt and its `pairs`, none if the judge saw a tie.
    """
    by_prompt = defaultdict(list)
    for number, answer in enumerate(answers):
        by_prompt[answer["id"]].append(answer | {"sample": number})
    judged = read_jsonl(path)
    rest = prompts[len(judged) :]
    pool = ThreadPoolExecutor(judge.workers)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(line(row) for row in judged)
        file.flush()
        try:
            verdicts = pool.map(lambda prompt: judge(prompt, by_prompt[prompt["id"]]), rest)
            for prompt, verdict in zip(rest, verdicts, strict=True):
                judged.append({"id": prompt["id"], "pairs": [as_row(prompt, p) for p in verdict]})
                file.write(line(judged[-1]))
                file.flush()
                if len(judged) % 50 == 0 or len(judged) == len(prompts):
                    print(f"judged {len(judged)}/{len(prompts)} prompts", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)  # a judge that failed is not asked about the rest
    return [pair for row in judged for pair in row["pairs"]]


def as_row(prompt: dict, preference: Preference) -> dict:
    """One pair as a row: the prompt's own fields, the messages, and how each answer came about."""
    row = {k: v for k, v in prompt.items() if k not in ("messages", "prompt", "split")}
    row |= {"kind": preference.kind, "prompt": prompt["messages"]}
    answers = {"chosen": preference.chosen, "rejected": preference.rejected}
    for side, answer in answers.items():
        row[side] = [{"role": "assistant", "content": answer["text"]}]
    for side, answer in answers.items():
        for key in ("sample", "style", "tokens", "finished"):
            row[f"{side}_{key}"] = answer[key]
    return row | preference.verdict


def line(row: dict) -> str:
    """`row` as a JSON line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; of one that is not there, none. A last line that a kill cut
    short is left out."""
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8") as file:  # splitlines() would also split at U+2028 in a text
        for text in file:
            if text.endswith("\n"):
                rows.append(json.loads(text))
    return rows


def read_prompts(path: Path) -> list[dict]:
    """The prompts in `path`, each with an `id` and its `messages`.

    Raises:
        RecipeError: there is no such file, or a line is no prompt; it names the line.
    """
    if not path.is_file():
        raise RecipeError(f"no prompts at {path}: give --prompts a JSON-lines, JSON or CSV file")
    prompts, seen = [], set()
    for number, (where, row, problem) in enumerate(read_file(path)):
        try:
            if row is None:
                raise BadRow("unreadable", problem)
            messages = as_messages(row.get("prompt"), "user", "prompt")
            if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
                raise BadRow("roles", "the prompt does not end with the user's message")
            name = row.get("id", f"prompt-{number:05d}")
            if name in seen:
                raise BadRow("duplicate", f"the id {name!r} stands there twice")
        except BadRow as error:
            raise RecipeError(f"{where}: {error}") from None
        seen.add(name)
        prompts.append(row | {"id": name, "messages": messages})
    return prompts


def parse_styles(text: str) -> dict[str, int]:
    """`"plain=4,brief=2"` as `{"plain": 4, "brief": 2}`."""
    styles = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in STYLES or not count.isdigit():
            raise RecipeError(f"--samples takes style=count of {', '.join(STYLES)}, got {part!r}")
        styles[name] = int(count)
    return styles


def keep_settings(folder: Path, settings: dict) -> None:
    """Write the settings that the files in `folder` come from.

    Raises:
        RecipeError: the folder was begun with other settings, so its answers cannot be gone on with
    """
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [k for k in settings if before.get(k) != settings[k]]
        if changed:
            changes = ", ".join(f"{k} was {before.get(k)!r}, is {settings[k]!r}" for k in changed)
            raise RecipeError(
                f"{folder.parent} was begun with other settings ({changes}); take another --out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


def make_judge(args: argparse.Namespace, cfg: Config) -> Judge:
    """The judge that the options name."""
    if args.judge == "rule":
        return Rule()
    if not args.judge_model or (args.judge == "endpoint" and not args.judge_url):
        raise RecipeError(f"--judge {args.judge} needs --judge-model (and endpoint --judge-url)")
    if args.judge == "reward":
        return RewardModel(args.judge_model, cfg.dpo.device, args.least_gap)
    return Endpoint(args.judge_url, args.judge_model, pairs=args.pairs_per_prompt)


def pick_backend(name: str) -> str:
    """`name`, or for `auto` vLLM where it can be used."""
    from importlib.util import find_spec

    if name != "auto":
        if name == "vllm" and find_spec("vllm") is None:
            raise RecipeError("--backend vllm: vLLM is not installed (pip install vllm)")
        return name
    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"


def build(args: argparse.Namespace) -> None:
    """The command `python -m scripts.data build`, with its options in `args`."""
    cfg = config_from_args(args)
    prompts, styles, work = (
        read_prompts(args.prompts),
        parse_styles(args.samples),
        args.out / ".build",
    )
    judge = make_judge(args, cfg)  # first: a judge that is not there costs no sampling
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    sampling |= {"max_new_tokens": args.max_new_tokens}
    backend = pick_backend(args.backend)
    settings = {"model": cfg.model.model_name_or_path, "source": where, "backend": backend}
    settings |= {"samples": styles, "seed": args.seed, "batch_size": args.batch_size, **sampling}
    settings |= {"judge": judge.name, "prompts": [p["id"] for p in prompts]}
    keep_settings(work, settings)
    samples = work / "samples.jsonl"
    if len(read_jsonl(samples)) == len(prompts) * sum(styles.values()):
        sample = None  # all there: no need for the model
    else:
        make = vllm_sampler if backend == "vllm" else transformers_sampler
        sample = make(cfg, path, **sampling)
    answers = sample_answers(
        sample, prompts, samples, styles=styles, batch_size=args.batch_size, seed=args.seed
    )
    pairs = judge_answers(judge, prompts, answers, work / "judged.jsonl")
    about = {k: settings[k] for k in ("model", "judge", "seed", "temperature", "top_p")}
    splits = {p["id"]: p.get("split", "train") for p in prompts}
    for split in sorted(set(splits.values()), reverse=True):
        rows = [pair | about for pair in pairs if splits[pair["id"]] == split]
        (args.out / f"{split}.jsonl").write_text("".join(map(line, rows)), encoding="utf-8")
        print(f"{split}: {len(rows)} pairs from {list(splits.values()).count(split)} prompts")
    print(f"check them: python -m scripts.data check --set dataset_name={args.out}")
