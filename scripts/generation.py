"""Let the model answer prompts, greedy or sampled."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Reply:
    """One generated reply; `ids` ends with the end-of-turn token if the model `finished`.

    `prompt_ids` are the tokens that it was generated from, without padding.
    """

    text: str
    ids: list[int]
    finished: bool
    prompt_ids: list[int]

    @property
    def length(self) -> int:
        """Tokens of the answer, the end of turn not counted."""
        return len(self.ids) - self.finished


@torch.no_grad()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    *,
    max_new_tokens: int,
    batch_size: int,
    label: str | None = "replies",
    **sampling: float,
) -> list[Reply]:
    """Reply to each prompt (a list of messages), in the prompts' order.

    Greedy, so that a difference is the model's and not the dice's; unless `sampling` has a
    `temperature` and `top_p`. Prompts are batched by length and padded on the left. `label` heads
    the lines that tell how far it is (None: no lines).
    """
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=bool(sampling), use_cache=True,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
        **({"top_k": 0} | sampling if sampling else {}),
    )  # fmt: skip
    texts = [
        tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    replies: dict[int, Reply] = {}
    training, start = model.training, time.monotonic()
    model.eval()
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        inputs = tokenizer(
            [texts[i] for i in batch], return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,  # the template has written them already
        ).to(model.device)  # fmt: skip
        output = model.generate(**inputs, generation_config=how)
        padded = inputs["input_ids"].shape[1]
        for row, (i, ids) in enumerate(zip(batch, output[:, padded:].tolist(), strict=True)):
            prompt_ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
            end = next((n for n, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            replies[i] = Reply(text, ids, end is not None, prompt_ids)
        seconds = time.monotonic() - start
        if label:
            print(f"{label}: {len(replies)}/{len(texts)} replies, {seconds:.0f} s", flush=True)
    model.train(training)
    return [replies[i] for i in range(len(texts))]
