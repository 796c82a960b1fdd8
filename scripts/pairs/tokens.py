"""The tokens of a pair as TRL's trainer makes them, of a prompt alone, and those that end a turn.

Checks, views, evaluation, export, sampling and the reward judge take their tokens from here, so
that none of them can differ from what is trained on.
"""

from __future__ import annotations

import json
from itertools import groupby

from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from scripts.pairs.checks import SIDES

IDS = [f"{side}_ids" for side in SIDES]  # the columns of tokens, named as in TRL
ANSWER = "Here is an answer"  # stands for any answer, to see what a template writes after it


def tokenize_pairs(
    pairs: list[dict], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of conversational pairs, as in `DPOTrainer`.

    TRL tokenises the prompt alone and each whole conversation, and has the answers begin where
    these part. That is not always the end of the prompt: some templates write more after a prompt
    that waits for its answer than after one that has it (an empty `<think>` block).

    Raises:
        jinja2.TemplateError: the chat template refuses one of the conversations.
    """
    options = [template_options(pair) for pair in pairs]
    prompts = tokenize_prompts([pair["prompt"] for pair in pairs], tokenizer, options)
    wholes = [
        tokenize_conversations([pair["prompt"] + pair[side] for pair in pairs], tokenizer, options)
        for side in ("chosen", "rejected")
    ]
    rows = []
    for prompt, chosen, rejected in zip(prompts, *wholes, strict=True):
        size = min(common_prefix_length(prompt, whole) for whole in (chosen, rejected))
        row = {"prompt_ids": prompt[:size], "chosen_ids": chosen[size:]}
        rows.append(row | {"rejected_ids": rejected[size:]})
    return rows


def tokenize_prompts(
    prompts: list[list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    options: list[dict] | None = None,
) -> list[list[int]]:
    """The tokens of prompts (lists of messages), up to where the model's answer begins.

    `options` are the `template_options` of each prompt's row; without them, none has any.
    """
    return tokenize_conversations(prompts, tokenizer, options, add_generation_prompt=True)


def template_options(row: dict) -> dict:
    """What a row tells the chat template: its `tools` and `chat_template_kwargs`, as TRL reads."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def tokenize_conversations(
    conversations: list[list[dict]],
    tokenizer: PreTrainedTokenizerBase,
    options: list[dict] | None = None,
    **common,
) -> list[list[int]]:
    """The tokens of conversations (lists of messages), each with its `template_options`. Neighbours
    with the same options go to the tokenizer at once, which is several times as fast."""
    rows = []
    numbered = enumerate(options or [{}] * len(conversations))
    for shared, group in groupby(numbered, key=lambda pair: pair[1]):
        some = [conversations[index] for index, _ in group]
        encoded = tokenizer.apply_chat_template(some, return_dict=True, **common, **shared)
        rows += encoded["input_ids"]
    return rows


def templated(pair: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The exact text that is trained on: `prompt`, and what each answer adds to it."""
    row = tokenize_pairs([pair], tokenizer)[0]
    return {side: tokenizer.decode(row[f"{side}_ids"]) for side in SIDES}


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> set[int]:
    """The ids of all tokens that end a turn: generation stops at any of them, and an answer that is
    trained on must end with one.

    These are the tokenizer's `eos_token`, what the model's `generation_config` stops at, and what
    the chat template writes after an answer. None of the three is enough: Gemma's `eos_token` is
    the end of a document, while its template ends a turn with another token; and a
    `generation_config` may be missing.
    """
    stops = generation_config.eos_token_id if generation_config else None
    ends = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    return (ends | _template_ends(tokenizer)) - {None}


def _template_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special token that the chat template writes after an answer, or nothing.

    If several stand there in a row (Cohere ends first the response and then the turn), the last of
    that row counts; what comes after a gap no longer belongs to the turn (Phi-3 closes the document
    on the next line).
    """
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    text = tokenizer.apply_chat_template(talk, tokenize=False)
    _, answer, after = text.rpartition(ANSWER)
    if not answer:
        return set()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    for is_special, run in groupby(ids, key=special.__contains__):
        if is_special:
            return {list(run)[-1]}
    return set()
