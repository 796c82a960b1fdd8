"""Let the model answer prompts, greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from scripts.pairs.tokens import end_tokens, tokenize_prompts
from scripts.progress import Progress


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


class Unrepeated(NoRepeatNGramLogitsProcessor):
    """No run of `size` tokens twice in a reply. transformers' own rule counts the prompt too, and
    so forbids quoting the text that a question is about."""

    def __init__(self, size: int, prompt_length: int) -> None:
        super().__init__(size)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids[:, self.prompt_length :], scores)


class Counted(StoppingCriteria):
    """Stops nothing: tells, after each token, how many have been generated in each row."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._tokens = tell, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self._tokens += 1
        self._tell(self._tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict]],
    *,
    max_new_tokens: int,
    batch_size: int,
    options: list[dict] | None = None,
    label: str | None = "replies",
    unrepeated: int = 0,
    **decoding: float,
) -> list[Reply]:
    """Reply to each prompt (a list of messages), in the prompts' order.

    Decoding is greedy, so that two models' replies differ because of the models and not by chance;
    with a `temperature` in `decoding`, replies are sampled. Whatever else `decoding` holds goes to
    transformers' `GenerationConfig`. A reply ends at any token that ends a turn (`end_tokens`).
    Prompts are batched by length and padded on the left.

    Args:
        options: the `template_options` of the rows that the prompts come from.
        label: heads the progress bar, or lines; None shows no progress.
        unrepeated: no run of this many tokens occurs twice in a reply; 0 allows any.
    """
    stops = sorted(end_tokens(tokenizer, model.generation_config))
    sampled = decoding.get("temperature", 0) > 0
    if sampled:
        decoding = {"top_k": 0} | decoding
    else:  # greedy decoding takes neither
        decoding = {k: v for k, v in decoding.items() if k not in ("temperature", "top_p")}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=sampled, num_beams=1, use_cache=True,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **decoding,
    )  # fmt: skip
    rows = tokenize_prompts(prompts, tokenizer, options)
    texts = tokenizer.batch_decode(rows)
    order = sorted(range(len(rows)), key=lambda i: len(texts[i]))
    replies: dict[int, Reply] = {}
    head, training, bar = model.get_output_embeddings(), model.training, Progress(len(rows))

    def tell(under_way: float = 0.0) -> None:
        if label:
            text = f"{label}: {len(replies)}/{len(rows)} replies, {bar.seconds:.0f} s"
            bar.show(min(len(replies) + under_way, len(rows)), text, line=not under_way)

    model.eval()
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [rows[i] for i in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        asked = inputs["input_ids"].shape[1]
        rules = [Unrepeated(unrepeated, asked)] if unrepeated else []
        a_token = len(batch) / max_new_tokens
        count = Counted(lambda tokens, a_token=a_token: tell(tokens * a_token))
        # The head's input in one block of memory: on a CPU a slice (the last token of each prompt)
        # times frozen weights copies the weights once a prompt, 2 GB for 40 replies by default.
        with head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),)):
            output = model.generate(
                **inputs, generation_config=config, logits_processor=LogitsProcessorList(rules),
                stopping_criteria=StoppingCriteriaList([count]),
            )  # fmt: skip
        for i, ids in zip(batch, output[:, asked:].tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            replies[i] = Reply(text, ids, end is not None, rows[i])
        tell()
    model.train(training)
    return [replies[i] for i in range(len(rows))]
