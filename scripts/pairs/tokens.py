"""The tokens of a pair, as TRL's trainer makes them: one place for checks, views and the export."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

SIDES = ("prompt", "chosen", "rejected")


def tokenize_pairs(
    pairs: list[dict], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, list[int]]]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of conversational pairs.

    As in TRL's `DPOTrainer`, an answer begins where the prompt alone and the whole conversation
    part: some templates write a prompt otherwise when an answer follows (an empty `<think>` block).
    """
    prompts, wholes = [], {"chosen": [], "rejected": []}
    for pair in pairs:
        options = template_options(pair)
        prompts.append(_ids(tokenizer, pair["prompt"], add_generation_prompt=True, **options))
        for side, rows in wholes.items():
            rows.append(_ids(tokenizer, pair["prompt"] + pair[side], **options))
    rows = []
    for prompt, chosen, rejected in zip(prompts, *wholes.values(), strict=True):
        size = min(common_prefix_length(prompt, whole) for whole in (chosen, rejected))
        row = {"prompt_ids": prompt[:size], "chosen_ids": chosen[size:]}
        rows.append(row | {"rejected_ids": rejected[size:]})
    return rows


def template_options(pair: dict) -> dict:
    """What a row says about its template: its `tools` and `chat_template_kwargs`, as TRL reads."""
    tools = pair.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(pair.get("chat_template_kwargs") or {})}


def _ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def templated(pair: dict, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The exact text that is trained on: `prompt`, and what each answer adds to it."""
    row = tokenize_pairs([pair], tokenizer)[0]
    return {side: tokenizer.decode(row[f"{side}_ids"]) for side in SIDES}
