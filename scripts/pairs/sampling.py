"""Ask a model the same prompts in several ways, and keep every answer on the way.

A prompt is put to the model in the `STYLES` asked for, and each answer is a line of a file, so that
sampling that was stopped goes on where it was and ends with the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scripts.base import InputError, RecipeError, in_notebook
from scripts.pairs.generation import generate_replies
from scripts.pairs.messages import Messages
from scripts.pairs.provenance import append_to, digest, line, read_jsonl, weights_state
from scripts.pairs.tokens import ANSWER, end_tokens, tokenize_prompts

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

Answer = tuple[str, int, bool]  # text, tokens without the end of turn, whether the turn was ended


@dataclass
class Sampler:
    """A model that answers prompts with `generate`, in 16 bits; it is loaded when first asked.

    `path` and `revision` are what `from_pretrained` takes, `name` is what the pairs tell.
    """

    name: str
    path: str
    revision: str
    dtype: str | torch.dtype
    device: torch.device
    max_new_tokens: int
    temperature: float
    top_p: float

    @property
    def settings(self) -> dict:
        """All that the answers depend on, prompts and seed aside."""
        return {
            "model": self.name,
            "revision": self.revision,
            "weights": weights_state(self.path, self.revision),
            "dtype": str(self.dtype),
            "backend": type(self).__name__,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(self.path, revision=self.revision)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def model(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.path, revision=self.revision, dtype=self.dtype, use_safetensors=True,
            device_map={"": self.device},
        )  # fmt: skip

    def __call__(self, prompts: list[Messages], seed: int) -> list[Answer]:
        torch.manual_seed(seed)
        replies = generate_replies(
            self.model, self.tokenizer, prompts, batch_size=len(prompts),
            label="batch" if in_notebook() else None, max_new_tokens=self.max_new_tokens,
            temperature=self.temperature, top_p=self.top_p,
        )  # fmt: skip
        return [(reply.text, reply.length, reply.finished) for reply in replies]


class VllmSampler(Sampler):
    """The same by vLLM, on a GPU.
    https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html"""

    @cached_property
    def model(self):
        from vllm import LLM

        return LLM(model=self.path, revision=self.revision, dtype=str(self.dtype).split(".")[-1])

    def __call__(self, prompts: list[Messages], seed: int) -> list[Answer]:
        from vllm import SamplingParams

        # Besides these, vLLM stops at those of the model's generation_config by itself.
        ends = sorted(end_tokens(self.tokenizer))
        params = [
            SamplingParams(
                max_tokens=self.max_new_tokens, seed=seed * 100_003 + i, stop_token_ids=ends,
                temperature=self.temperature, top_p=self.top_p,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        answers = []
        for output in self.model.chat(prompts, params, use_tqdm=False):
            said = output.outputs[0]
            ended = said.finish_reason == "stop"
            answers.append((said.text.strip(), len(said.token_ids) - ended, ended))
        return answers


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


def sampler_class(backend: str) -> type[Sampler]:
    """The sampler that `--backend` names; `auto` is vLLM where it is installed and has a GPU."""
    installed = find_spec("vllm") is not None
    if backend == "vllm" and not installed:
        raise RecipeError("--backend vllm: vLLM is not installed (pip install vllm)")
    auto = backend == "auto" and installed and torch.cuda.is_available()
    return VllmSampler if backend == "vllm" or auto else Sampler


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
