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
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from scripts.base import InputError, RecipeError, in_notebook
from scripts.config import Config, config_from_args
from scripts.hub import fetch
from scripts.model import load_tokenizer, resolve_model
from scripts.pairs.checker import Checker
from scripts.pairs.files import Row, read_file
from scripts.pairs.generation import generate_replies
from scripts.pairs.judges import Endpoint, Preference, RewardModel, Rule
from scripts.pairs.messages import BadRow, Messages, as_messages
from scripts.pairs.passages import ask, questions_of
from scripts.pairs.provenance import (
    append_to,
    digest,
    keep_settings,
    line,
    read_jsonl,
    weights_state,
    write_whole,
)
from scripts.pairs.text import are_facts
from scripts.pairs.tokens import ANSWER, end_tokens, tokenize_prompts
from scripts.pairs.workers import several_at_a_time

# Turns that show how to answer from a text, and how to say that it does not tell.
_LIBRARY = (
    "The library of Fenwell is open from 9 to 5 on weekdays. A new card costs 4 dollars. Books may "
    "be kept for three weeks."
)
_TREES = (
    "Marta planted the pear tree in 1931. Her brother Jonas added the plum tree six years later. "
    "The plum tree flowers in March."
)
SHOWN = [
    {"role": role, "content": content}
    for text, question, answer in (
        (_LIBRARY, "How much does a new card cost?", "A new card costs 4 dollars."),
        (_TREES, "How tall is the pear tree?", "The text does not say."),
        (_TREES, "Who planted the plum tree?", "Jonas planted the plum tree."),
        (_LIBRARY, "Who runs the library?", "The text does not say."),
    )
    for role, content in (("user", f"{text}\n\n{question}"), ("assistant", answer))
]
# How a prompt is put to the model. The pair keeps only the plain prompt: what the request to be
# brief brought out, the tuned model is to do unasked.
STYLES: dict[str, dict[str, str]] = {
    "plain": {},
    "brief": {"suffix": " Answer in one or two short sentences."},
    "accurate": {"system": "Answer in one or two short, accurate sentences."},
    # For questions on a passage.
    "text": {"suffix": " Answer in one short sentence, using only the text above."},
    "unless": {
        "suffix": " Answer in one short sentence. If the text does not say, answer: "
        "The text does not say."
    },
    "shown": {"earlier": SHOWN},
}
SPLITS = ("train", "test")
Judge = Rule | Checker | RewardModel | Endpoint
# From conversations and a seed to an answer each: text, tokens (end of turn not counted), and
# whether the model ended its turn in time.
Sample = Callable[[list[Messages], int], list[tuple[str, int, bool]]]


@dataclass
class Sampler:
    """A model that answers prompts; it is loaded when it is first asked.

    `settings` are all that its answers depend on, prompts and seed aside.
    """

    settings: dict
    load: Callable[[], Sample]

    @cached_property
    def _sample(self) -> Sample:
        return self.load()

    def __call__(self, prompts: list[Messages], seed: int) -> list[tuple[str, int, bool]]:
        return self._sample(prompts, seed)


def takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a place for a system message: Gemma's refuses it, and others
    leave it out without a word."""
    talk = [{"role": "system", "content": ANSWER}, {"role": "user", "content": "Hello"}]
    try:
        return ANSWER in tokenizer.apply_chat_template(talk, tokenize=False)
    except TemplateError:
        return False


def styled(messages: Messages, style: str, system: bool = True) -> Messages:
    """The conversation `messages`, put to the model in one of the `STYLES`.

    Without a place for a `system` message, its text goes before the first message.
    """
    how = STYLES[style]
    messages = [
        *messages[:-1],
        messages[-1] | {"content": messages[-1]["content"] + how.get("suffix", "")},
    ]
    if "earlier" in how:
        first = next(i for i, m in enumerate(messages) if m["role"] != "system")
        messages = [*messages[:first], *how["earlier"], *messages[first:]]
    if "system" not in how or any(m["role"] == "system" for m in messages):
        return messages
    if system:
        return [{"role": "system", "content": how["system"]}, *messages]
    first, *others = messages
    return [first | {"content": f"{how['system']}\n\n{first['content']}"}, *others]


def refuse_untemplated(prompts: list[dict], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `RecipeError` for the first prompt that the chat template refuses."""
    for prompt in prompts:
        try:
            tokenize_prompts([prompt["messages"]], tokenizer)
        except TemplateError as error:
            raise RecipeError(
                f"the chat template of {tokenizer.name_or_path} refuses prompt {prompt['id']!r}: "
                f"{error}; write it as this model's template asks"
            ) from None


def _settings(cfg: Config, path: str, backend: str, sampling: dict) -> dict:
    """The settings of a sampler of the model at `path`."""
    revision = cfg.model.model_revision
    settings = {"model": cfg.model.model_name_or_path, "revision": revision}
    settings |= {"weights": weights_state(path, revision), "dtype": str(cfg.model.dtype)}
    return settings | {"backend": backend} | sampling


def transformers_sampler(cfg: Config, path: str, **sampling) -> Sampler:
    """Answers by `generate`, in 16 bits; `sampling` has `max_new_tokens`, `temperature` and
    `top_p`."""

    def load() -> Sample:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=fetch(path, cfg.model.model_revision), dtype=cfg.model.dtype,
            use_safetensors=True, device_map={"": cfg.dpo.device},
        )  # fmt: skip
        tokenizer = load_tokenizer(path, cfg.model.model_revision)

        def sample(prompts: list[Messages], seed: int) -> list[tuple[str, int, bool]]:
            torch.manual_seed(seed)
            replies = generate_replies(
                model, tokenizer, prompts, batch_size=len(prompts),
                label="batch" if in_notebook() else None, **sampling,
            )  # fmt: skip
            return [(reply.text, reply.length, reply.finished) for reply in replies]

        return sample

    return Sampler(_settings(cfg, path, "transformers", sampling), load)


def vllm_sampler(cfg: Config, path: str, *, max_new_tokens: int, **sampling) -> Sampler:
    """Answers by vLLM, for a GPU. https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html"""
    settings = _settings(cfg, path, "vllm", {"max_new_tokens": max_new_tokens} | sampling)

    def load() -> Sample:
        from vllm import LLM, SamplingParams

        llm = LLM(model=path, revision=cfg.model.model_revision, dtype=str(cfg.model.dtype))
        # Besides these, vLLM stops at those of the model's generation_config by itself.
        ends = sorted(end_tokens(load_tokenizer(path, cfg.model.model_revision)))

        def sample(prompts: list[Messages], seed: int) -> list[tuple[str, int, bool]]:
            params = [
                SamplingParams(
                    max_tokens=max_new_tokens, seed=seed * 100_003 + i, stop_token_ids=ends,
                    **sampling,
                )
                for i in range(len(prompts))
            ]  # fmt: skip
            outputs = [o.outputs[0] for o in llm.chat(prompts, params, use_tqdm=False)]
            return [
                (o.text.strip(), len(o.token_ids) - (o.finish_reason == "stop"),
                 o.finish_reason == "stop")
                for o in outputs
            ]  # fmt: skip

        return sample

    return Sampler(settings, load)


def sample_answers(
    sampler: Sampler, prompts: list[dict], path: Path, *,
    styles: dict[str, int], batch_size: int, seed: int, system: bool = True,
) -> list[dict]:  # fmt: skip
    """All answers to `prompts`; those that are not in the JSON-lines file `path` are sampled.

    A line of `path` is a batch, and each batch has its own seed, so a run that was stopped and
    resumed writes the same file as one that was not. An answer is taken from `path` if sampler,
    seed, style and the prompt's text are those it was sampled with; after an edited prompt, only
    its own answers are missing. Lines that nothing asks for any more are left alone. `system` says
    whether the chat template takes a system message.

    Returns rows with `id`, `style`, `text`, `tokens` (end of turn not counted), `finished` (whether
    the model ended its turn in time) and `key`.
    """
    came_from = digest([sampler.settings, batch_size, seed])
    jobs: dict[str, dict] = {}
    for style, count in styles.items():
        for prompt in prompts:
            messages = styled(prompt["messages"], style, system)
            for number in range(count):
                key = digest([came_from, prompt["id"], style, number, messages])
                jobs[key] = {"id": prompt["id"], "style": style, "messages": messages}
    batches = read_jsonl(path, "answers")
    answers = {row["key"]: row for batch in batches for row in batch["answers"]}
    missing = [key for key in jobs if key not in answers]
    with append_to(path) as file:
        for number, at in enumerate(range(0, len(missing), batch_size), start=len(batches)):
            keys = missing[at : at + batch_size]
            texts = sampler([jobs[key]["messages"] for key in keys], seed + number)
            for key, (text, tokens, finished) in zip(keys, texts, strict=True):
                row = {"id": jobs[key]["id"], "style": jobs[key]["style"], "text": text}
                answers[key] = row | {"tokens": tokens, "finished": finished, "key": key}
            file.write(line({"answers": [answers[key] for key in keys]}))
            file.flush()
            left = len(missing) - at - len(keys)
            print(f"sampled {len(jobs) - left}/{len(jobs)} answers", flush=True)
    return [answers[key] for key in jobs]


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

    def ask(job: tuple[str, dict]) -> list[Preference]:
        return judge(job[1], by_prompt[job[1]["id"]])

    before = len(prompts) - len(rest)
    with append_to(path) as file:
        for done, ((key, prompt), preferences) in enumerate(
            several_at_a_time(ask, rest, judge.workers), start=1
        ):
            verdicts[key] = [as_row(prompt, preference) for preference in preferences]
            file.write(line({"key": key, "id": prompt["id"], "pairs": verdicts[key]}))
            file.flush()
            if done % 50 == 0 or done == len(rest):
                print(f"judged {before + done}/{len(prompts)} prompts", flush=True)
    if rest:
        _in_order(path, keys)
    return [pair for key in keys for pair in verdicts[key]]


def _in_order(path: Path, keys: list[str]) -> None:
    """Put the verdicts in `path`, which came in as they were given, in the order of `keys`; those
    on other prompts or of other judges stay before them."""
    place = {key: number for number, key in enumerate(keys)}
    write_whole(path, sorted(read_jsonl(path), key=lambda row: place.get(row["key"], -1)))


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
    prompts, seen = [], set()
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
            if not are_facts(row.get("facts") or []):
                raise BadRow("type", 'facts is not a list of lists of text, as [["Rayleigh"]]')
            if name in seen:
                raise BadRow("duplicate", f"the id {name!r} stands there twice")
            if row.get("split", "train") not in SPLITS:
                raise BadRow("type", f"split is {row['split']!r}, not train or test")
        except BadRow as error:
            raise RecipeError(f"{where}: {error}") from None
        seen.add(name)
        prompts.append(row | {"id": name, "messages": messages})
    if not prompts:
        raise RecipeError(f'{path} has no prompts: write one a line, as {{"prompt": "Why?"}}')
    return prompts


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


def parse_styles(text: str) -> dict[str, int]:
    """`"plain=4,brief=2"` as `{"plain": 4, "brief": 2}`."""
    styles = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in STYLES or not count.isdecimal() or len(count) > 6 or int(count) < 1:
            raise InputError(f"--samples takes style=count of {', '.join(STYLES)}, got {part!r}")
        styles[name] = int(count)
    if sum(styles.values()) < 2:
        raise InputError(f"--samples {text}: a pair takes two answers, so ask for two at least")
    return styles


def make_judge(args: argparse.Namespace, cfg: Config) -> Judge:
    """The judge that the options name."""
    if args.judge == "rule":
        return Rule()
    if args.judge == "checker":
        return Checker()
    if not args.judge_model or (args.judge == "endpoint" and not args.judge_url):
        raise InputError(f"--judge {args.judge} needs --judge-model (and endpoint --judge-url)")
    if args.judge == "endpoint" and not args.judge_url.startswith(("http://", "https://")):
        raise InputError(f"--judge-url must begin with http:// or https://, got {args.judge_url!r}")
    if args.judge == "reward":
        return RewardModel(args.judge_model, cfg.dpo.device, args.least_gap)
    endpoint = Endpoint(args.judge_url, args.judge_model, pairs=args.pairs_per_prompt)
    endpoint.probe()
    return endpoint


def pick_backend(name: str) -> str:
    """`name`, or for `auto` vLLM where it can be used."""
    from importlib.util import find_spec

    if name != "auto":
        if name == "vllm" and find_spec("vllm") is None:
            raise RecipeError("--backend vllm: vLLM is not installed (pip install vllm)")
        return name
    return "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"


def facts_remark(prompts: list[dict]) -> str | None:
    """What the rule cannot judge for want of facts, or None."""
    without = sum(not p.get("facts") for p in prompts)
    if not without:
        return None
    which = "the prompts have" if without == len(prompts) else f"{without} of the prompts have"
    return (
        f"{which} no `facts`: there the rule judges form only (finished, brief, one paragraph, no "
        "repeats), not whether an answer is right. Add facts, or take --judge reward or endpoint."
    )


def build(args: argparse.Namespace) -> None:
    """The command `python -m scripts.data build`, with its options in `args`.

    Raises:
        KeyboardInterrupt: it was stopped; the message says what is kept.
    """
    try:
        _build(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped: what was sampled and judged is kept in {args.out / '.build'}, and the same "
            "command goes on from there"
        ) from None


def _build(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    prompts, styles = read_prompts(args.prompts), parse_styles(args.samples)
    prompts = [p for p in prompts if args.level in (None, p.get("level"))]
    if not prompts:
        raise InputError(f"--level {args.level}: no prompt of {args.prompts} has that level")
    if args.judge == "checker" and not all("accept" in p for p in prompts):
        raise InputError("--judge checker needs passages with questions, as data/passages.jsonl")
    work = args.out / ".build"
    judge = make_judge(args, cfg)  # first: a judge that is not there costs no sampling
    if args.judge == "rule" and (remark := facts_remark(prompts)):
        print(remark)
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    refuse_untemplated(prompts, tokenizer)
    make = vllm_sampler if pick_backend(args.backend) == "vllm" else transformers_sampler
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    sampler = make(cfg, path, max_new_tokens=args.max_new_tokens, **sampling)
    draws = {"batch_size": args.batch_size, "seed": args.seed}
    keep_settings(work, sampler.settings | draws)
    answers = sample_answers(
        sampler, prompts, work / "samples.jsonl",
        styles=styles, system=takes_system(tokenizer), **draws,
    )  # fmt: skip
    pairs = judge_answers(judge, prompts, answers, work / "judged.jsonl")
    about = {"model": cfg.model.model_name_or_path, "judge": judge.name, "seed": args.seed}
    splits = {p["id"]: p.get("split", "train") for p in prompts}
    for split in SPLITS:
        file, count = args.out / f"{split}.jsonl", list(splits.values()).count(split)
        if not count:
            file.unlink(missing_ok=True)  # of an earlier call, whose prompts were others
            continue
        rows = [pair | about | sampling for pair in pairs if splits[pair["id"]] == split]
        write_whole(file, rows)
        print(f"{split}: {len(rows)} pairs from {count} prompts")
    print(f"check them: python -m scripts.data check --set dataset_name={args.out}")
