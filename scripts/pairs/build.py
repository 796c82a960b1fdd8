"""Make preference pairs from a model's own answers: sample several to a prompt, then judge them.

    python -m scripts.data build --prompts prompts.jsonl --judge rule --out outputs/pairs

A prompt is a JSON line with `prompt` (text or messages) and perhaps `id`, `split` (`train` or
`test`) and `facts` (for the rule). Sampling appends to `.build/samples.jsonl` in the output folder
batch by batch, judging to `.build/judged.jsonl` prompt by prompt; a command that was stopped goes
on where it was, and ends with the same files as one that was not. Edited prompts are sampled and
judged anew, edited facts or another judge need only new verdicts, and other sampling (another
model, temperature ...) needs another folder.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from scripts.base import InputError, RecipeError
from scripts.pairs.checker import Checker
from scripts.pairs.files import Row, read_file
from scripts.pairs.judges import Endpoint, Preference, RewardModel, Rule
from scripts.pairs.messages import BadRow, as_messages
from scripts.pairs.passages import ask, questions_of
from scripts.pairs.provenance import append_to, digest, keep_settings, line, read_jsonl, write_rows
from scripts.pairs.sampling import (
    Sampler,
    parse_styles,
    refuse_untemplated,
    sample_answers,
    takes_system,
)
from scripts.pairs.text import are_facts

SPLITS = ("train", "test")
Judge = Rule | Checker | RewardModel | Endpoint


def judge_answers(judge: Judge, prompts: list[dict], answers: list[dict], path: Path) -> list[dict]:
    """The pairs that `judge` makes of `answers`, in the order of `prompts`.

    A line of `path` is the verdict on one prompt: its `id`, its `pairs` (none if the judge saw a
    tie) and a `key`; it is written as soon as it is given. A verdict is taken from there if judge,
    prompt (its facts and other fields too) and answers are those it was given on; otherwise the
    judge is asked.
    """
    by_prompt = defaultdict(list)
    for answer in answers:
        row = {k: v for k, v in answer.items() if k != "key"}
        by_prompt[answer["id"]].append(row | {"sample": len(by_prompt[answer["id"]])})
    keys = [
        digest([judge.settings, {k: v for k, v in p.items() if k != "split"}, by_prompt[p["id"]]])
        for p in prompts
    ]
    verdicts = {row["key"]: row["pairs"] for row in read_jsonl(path, "key", "pairs")}
    rest = [(key, p) for key, p in zip(keys, prompts, strict=True) if key not in verdicts]

    def verdict(job: tuple[str, dict]) -> tuple[str, dict, list[Preference]]:
        return *job, judge(job[1], by_prompt[job[1]["id"]])

    before = len(prompts) - len(rest)
    # Its threads are daemons: one that waits for a server does not keep a stopped command.
    with append_to(path) as file, ThreadPool(judge.workers) as pool:
        asked = pool.imap_unordered(verdict, rest)
        for done, (key, prompt, preferences) in enumerate(asked, start=1):
            verdicts[key] = [as_row(prompt, preference) for preference in preferences]
            file.write(line({"key": key, "id": prompt["id"], "pairs": verdicts[key]}))
            file.flush()
            if done % 50 == 0 or done == len(rest):
                print(f"judged {before + done}/{len(prompts)} prompts", flush=True)
    if rest:  # in the order of the prompts, after those on other prompts or of other judges
        place = {key: number for number, key in enumerate(keys)}
        write_rows(path, sorted(read_jsonl(path), key=lambda row: place.get(row["key"], -1)))
    return [pair for key in keys for pair in verdicts[key]]


def as_row(prompt: dict, preference: Preference) -> dict:
    """One pair as a row: the prompt's own fields, the messages, and how each answer came about."""
    left_out = ("messages", "prompt", "split", "passage")  # the passage is in the prompt
    row = {k: v for k, v in prompt.items() if k not in left_out}
    row |= {"kind": preference.kind, "prompt": prompt["messages"]}
    answers = {"chosen": preference.chosen, "rejected": preference.rejected}
    for side, answer in answers.items():
        row[side] = [{"role": "assistant", "content": answer["text"]}]
    for side, answer in answers.items():
        for key in ("sample", "style", "tokens", "finished"):
            row[f"{side}_{key}"] = answer[key]
    return row | preference.verdict


def read_prompts(path: Path) -> list[dict]:
    """The prompts in `path`, each with an `id` and its `messages`.

    Raises:
        RecipeError: there is no such file, or a line is no prompt; it names the line.
    """
    if not path.is_file():
        raise RecipeError(f"no prompts at {path}: give --prompts a JSON-lines, JSON or CSV file")
    prompts = {}
    for number, (where, row, problem) in enumerate(_questions_apart(read_file(path))):
        try:
            if row is None:
                raise BadRow("unreadable", problem)
            messages = as_messages(row.get("prompt"), "user", "prompt")
            if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"]:
                raise BadRow("roles", "the prompt does not end with the user's message")
            name = f"prompt-{number:05d}" if row.get("id") is None else row["id"]
            if not isinstance(name, str | int):
                raise BadRow("type", f"the id is not text but {type(name).__name__}")
            if name in prompts:
                raise BadRow("duplicate", f"the id {name!r} is used twice")
            if not are_facts(row.get("facts") or []):
                raise BadRow("type", 'facts is not a list of lists of text, as [["Rayleigh"]]')
            if row.get("split", "train") not in SPLITS:
                raise BadRow("type", f"split is {row['split']!r}, not train or test")
        except BadRow as error:
            raise RecipeError(f"{where}: {error}") from None
        prompts[name] = row | {"id": name, "messages": messages}
    if not prompts:
        raise RecipeError(f'{path} has no prompts: write one a line, as {{"prompt": "Why?"}}')
    return list(prompts.values())


def _questions_apart(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a file, in which a passage gives a prompt for each of its questions."""
    for where, row, problem in rows:
        if not row or "questions" not in row:
            yield where, row, problem
            continue
        try:
            for question in questions_of(row):
                yield where, question | {"prompt": ask(question)}, ""
        except (KeyError, TypeError) as error:
            yield where, None, f"no passage with questions: {type(error).__name__} {error}"


def make_judge(args: argparse.Namespace, device: torch.device) -> Judge:
    """The judge that the options name; a reward model goes on `device`, an endpoint is reached.

    Raises:
        RecipeError: an option is missing or wrong, or the judge is not there.
    """
    if args.judge == "rule":
        return Rule()
    if args.judge == "checker":
        return Checker()
    if not args.judge_model or (args.judge == "endpoint" and not args.judge_url):
        raise InputError(f"--judge {args.judge} needs --judge-model (and endpoint --judge-url)")
    if args.judge == "reward":
        return RewardModel(args.judge_model, device, args.least_gap)
    if not args.judge_url.startswith(("http://", "https://")):
        raise InputError(f"--judge-url must begin with http:// or https://, got {args.judge_url!r}")
    endpoint = Endpoint(args.judge_url, args.judge_model, pairs=args.pairs_per_prompt)
    endpoint.probe()
    return endpoint


def prepare(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[dict], dict[str, int], Judge]:
    """Prompts, styles and judge that the options of `data build` ask for. A judge that is not there
    costs no sampling.

    Raises:
        RecipeError: an option, a prompt or the judge is wrong.
    """
    prompts, styles = read_prompts(args.prompts), parse_styles(args.samples)
    prompts = [p for p in prompts if args.level in (None, p.get("level"))]
    if not prompts:
        raise InputError(f"--level {args.level}: no prompt of {args.prompts} has that level")
    if args.judge == "checker" and not all("accept" in p for p in prompts):
        raise InputError("--judge checker takes passages with questions (data/passages.jsonl)")
    judge = make_judge(args, device)
    without = sum(not p.get("facts") for p in prompts)
    if args.judge == "rule" and without:
        print(
            f"{without} of {len(prompts)} prompts have no `facts`: there the rule judges form "
            "only, not whether an answer is right. Add facts, or take --judge reward or endpoint."
        )
    return prompts, styles, judge


def build_pairs(
    args: argparse.Namespace, prompts: list[dict], styles: dict[str, int], judge: Judge,
    sampler: Sampler,
) -> None:  # fmt: skip
    """Sample, judge, and write `train.jsonl` and `test.jsonl` to `--out`.

    Raises:
        KeyboardInterrupt: it was stopped; the message says what is kept.
    """
    work = args.out / ".build"
    try:
        refuse_untemplated(prompts, sampler.tokenizer)
        draws = {"batch_size": args.batch_size, "seed": args.seed}
        keep_settings(work, sampler.settings | draws)
        answers = sample_answers(
            sampler, prompts, work / "samples.jsonl",
            styles=styles, system=takes_system(sampler.tokenizer), **draws,
        )  # fmt: skip
        pairs = judge_answers(judge, prompts, answers, work / "judged.jsonl")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped: what was sampled and judged is kept in {work}, and the same command goes on "
            "from there"
        ) from None
    about = {"model": sampler.name, "judge": judge.name, "seed": args.seed}
    about |= {"temperature": sampler.temperature, "top_p": sampler.top_p}
    splits = {p["id"]: p.get("split", "train") for p in prompts}
    counts = Counter(splits.values())
    for split in SPLITS:
        file = args.out / f"{split}.jsonl"
        if not counts[split]:
            file.unlink(missing_ok=True)  # of an earlier call, whose prompts were others
            continue
        rows = [pair | about for pair in pairs if splits[pair["id"]] == split]
        write_rows(file, rows)
        print(f"{split}: {len(rows)} pairs from {counts[split]} prompts")
    print(f"check them: python -m scripts.data check --set dataset_name={args.out}")
