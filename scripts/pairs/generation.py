"""Let the model answer prompts, greedy or sampled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from scripts.pairs.tokens import end_tokens, tokenize_prompts
from scripts.progress import Progress

EVERY = 16  # tokens after which replies that have ended leave the batch


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
    """No run of `size` tokens twice in a reply; transformers' own counts the prompt's runs too,
    and so forbids to quote a text that is asked about."""

    def __init__(self, size: int, prompt_length: int) -> None:
        super().__init__(size)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return super().__call__(input_ids[:, self.prompt_length :], scores)


@contextmanager
def whole_rows_for_the_head(model: PreTrainedModel) -> Iterator[None]:
    """Let the head read its input as one block of memory.

    For the last token of each prompt it is a slice, and a product of a slice with frozen weights
    writes the weights out once a prompt on a CPU: 2 GB for 40 replies of the default model.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


class Counted(StoppingCriteria):
    """Stops nothing: says after each token how many replies' work is done, `a_token` for each."""

    def __init__(self, a_token: float, tell: Callable[[float], None]) -> None:
        self._a_token, self._tell, self._tokens = a_token, tell, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self._tokens += 1
        self._tell(self._tokens * self._a_token)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


# Settings of a model that count from where `generate` was called, or that ask for another cache.
FROM_THE_CALL = (
    "forced_eos_token_id", "min_new_tokens", "begin_suppress_tokens", "max_time",
    "exponential_decay_length_penalty", "guidance_scale", "cache_implementation",
)  # fmt: skip


def _can_shrink(cache: object) -> bool:
    """Whether rows can be taken out of what a model remembers of its batch."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, DynamicCache) and all(type(layer) in kinds for layer in cache.layers)


def _in_parts(model: PreTrainedModel) -> bool:
    """Whether `model` may generate a few tokens at a time, with fewer rows each time."""
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    # These two stretch all positions by the longest row of the batch.
    stretched = any(f"'{kind}'" in str(rope) for kind in ("longrope", "dynamic"))
    own = any(getattr(model.generation_config, name, None) for name in FROM_THE_CALL)
    return not own and not stretched and _can_shrink(DynamicCache(config=text))


def _generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], config: GenerationConfig, **more: list
) -> list[list[int]]:
    """The tokens after each row of `inputs`, greedy: those that have ended leave the batch every
    few tokens, so that one long reply does not have the others computed along with it.

    A model of which that would make another reply, or that cannot do it (recurrent layers),
    generates in one go.
    """
    ids, mask, cache = inputs["input_ids"], inputs["attention_mask"], None
    asked, most = ids.shape[1], config.max_new_tokens
    stops = torch.tensor(config.eos_token_id, device=ids.device)
    rows, replies = torch.arange(len(ids)), [[] for _ in ids]
    config, parts = copy.copy(config), _in_parts(model)
    config.return_dict_in_generate = True
    while len(rows):
        if parts:
            config.max_new_tokens = min(EVERY, most - ids.shape[1] + asked)
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config,
            **more, **({} if cache is None else {"past_key_values": cache}),
        )  # fmt: skip
        memory = output.past_key_values
        if parts and not (_can_shrink(memory) and memory.get_seq_length()):
            parts, config.max_new_tokens = False, most  # the config did not tell: once more, whole
            continue
        for row, reply in zip(rows.tolist(), output.sequences[:, asked:].tolist(), strict=True):
            replies[row] = reply
        if output.sequences.shape[1] - asked >= most or not parts:
            break
        cache = memory
        ended = torch.isin(output.sequences[:, asked:], stops).any(1)
        left = (~ended).nonzero()[:, 0].cpu()
        cache.batch_select_indices(left)
        new = output.sequences.shape[1] - ids.shape[1]
        ids, mask = output.sequences[left], pad(mask, (0, new), value=1)[left]
        rows = rows[left]
    return replies


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

    Greedy decoding, so that two models' replies differ because of the models and not by chance;
    with a `temperature` and `top_p` in `decoding`, replies are drawn instead; what else is there
    goes to transformers' `GenerationConfig`. A reply ends at any
    of the tokens that end a turn (`end_tokens`). Prompts are batched by length and padded on the
    left. `options` are the `template_options` of the rows that the prompts come from. `label`
    heads the bar, or the lines, that show the progress (None: none). With `unrepeated`, no run of
    so many tokens stands twice in a reply.
    """
    stops = sorted(end_tokens(tokenizer, model.generation_config))
    drawn = decoding.get("temperature", 0) > 0  # at 0 the likeliest token is all there is
    if drawn:
        decoding = {"top_k": 0} | decoding
    else:  # without these two, which only drawing knows
        decoding = {k: v for k, v in decoding.items() if k not in ("temperature", "top_p")}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=drawn, num_beams=1, use_cache=True,
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, **decoding,
    )  # fmt: skip
    rows = tokenize_prompts(prompts, tokenizer, options)
    texts = tokenizer.batch_decode(rows)
    order = sorted(range(len(rows)), key=lambda i: len(texts[i]))
    replies: dict[int, Reply] = {}
    training, bar = model.training, Progress(len(rows))

    def tell(part: float = 0.0) -> None:
        """`part` of the batch that is under way is through."""
        if label:
            text = f"{label}: {len(replies)}/{len(rows)} replies, {bar.seconds:.0f} s"
            bar.show(min(len(replies) + part, len(rows)), text, line=not part)

    model.eval()
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [rows[i] for i in batch]}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        asked = inputs["input_ids"].shape[1]
        rules = LogitsProcessorList([Unrepeated(unrepeated, asked)] if unrepeated else [])
        count = StoppingCriteriaList([Counted(len(batch) / max_new_tokens, tell)])
        more = {"logits_processor": rules, "stopping_criteria": count}
        with whole_rows_for_the_head(model):
            if drawn:  # all rows to the end: who has ended does not change what the others draw
                output = model.generate(**inputs, generation_config=config, **more)[
                    :, asked:
                ].tolist()
            else:
                output = _generate(model, inputs, config, **more)
        for i, ids in zip(batch, output, strict=True):
            end = next((n for n, token in enumerate(ids) if token in stops), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            replies[i] = Reply(text, ids, end is not None, rows[i])
        tell()
    model.train(training)
    return [replies[i] for i in range(len(rows))]
