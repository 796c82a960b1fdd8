"""DPO that runs each prompt once: TRL's trainer with another forward.

TRL scores a batch of pairs as twice as many rows, `[prompt | chosen]` and `[prompt | rejected]`,
padded to the longest. Here the same batch goes through the model as one row without padding,

    [prompt | chosen | last prompt token, rejected | the next pair ...]

in which `rejected` attends to the prompt and to itself, at the positions it has in a row of its own
(prefix sharing, https://arxiv.org/abs/2410.20305; the last prompt token stands there twice, so that
each token has one successor to predict). The head sees answer tokens only. What comes out has the
shape that TRL's own forward gives, so losses, metrics, callbacks, saving and resuming are TRL's.
"""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MethodType

import datasets
import numpy as np
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from scripts.config import RecipeError

NAME = "prefix_shared"  # under which transformers knows the attention below
CHUNK = 2**24  # logits that exist at once: 32 MB in 16 bits
CACHED = 2**20  # of them in float32 at once: 4 MB
BLOCK = 256  # queries whose attention is computed at once on a CPU


class PrefixSharingError(RecipeError):
    """This model or setting cannot share prefixes; `prefix_sharing: false` takes TRL's own way."""


@dataclass
class Row:
    """A batch of pairs as one row of T tokens, and the way back to TRL's (2 B, L - 1) layout."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T): rejected restarts where its prompt ends
    targets: torch.Tensor  # (N,): the answer tokens to score
    sources: torch.Tensor  # (N,): where in the row each is predicted from
    places: torch.Tensor  # (N,): its place in the flattened (2 B, L - 1) output
    pairs: list[tuple[int, int, int]]  # (tokens of prompt + chosen, shared, tokens of rejected)


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Row:
    """The (2 B, L) batch of TRL's collator, chosen rows first, as one row.

    Two rows share what comes before their answers if that is the same; with `keep_end` truncation
    it may not be, and then they share nothing. The last token of an answer predicts nothing, so it
    is left out.
    """
    device, width = input_ids.device, input_ids.shape[1] - 1
    ids, labels = input_ids.cpu().numpy(), labels.cpu().numpy()
    sizes = attention_mask.sum(dim=1).tolist()
    half = len(sizes) // 2
    tokens, positions, targets, sources, places, pairs = [], [], [], [], [], []
    start = 0
    for i in range(half):
        begins = [int((labels[row] == -100)[: sizes[row]].argmin()) for row in (i, i + half)]
        shared = begins[0] - 1 if begins[0] == begins[1] else 0
        if shared < 0 or (ids[i, : shared + 1] != ids[i + half, : shared + 1]).any():
            shared = 0
        lengths = []
        for row, skip in ((i, 0), (i + half, shared)):
            end = max(sizes[row] - 1, skip)
            scored = np.flatnonzero(labels[row, skip + 1 : end + 1] != -100)
            tokens.append(ids[row, skip:end])
            positions.append(np.arange(skip, end))
            targets.append(labels[row, skip + 1 : end + 1][scored])
            sources.append(start + scored)
            places.append(row * width + skip + scored)
            lengths.append(end - skip)
            start += end - skip
        pairs.append((lengths[0], shared, lengths[1]))
    arrays = (tokens, positions, targets, sources, places)
    tensors = [torch.from_numpy(np.concatenate(a).astype(np.int64)).to(device) for a in arrays]
    return Row(tensors[0][None], tensors[1][None], *tensors[2:], pairs)


def _causal(query, key, value, scale: float) -> torch.Tensor:
    """Causal attention of (1, heads, n, d) queries to (1, heads, m, d) keys, the last n their own.

    On a CPU plain products of 16-bit matrices, 256 queries at a time, take a third of the time of
    torch's fused kernel forward and back; what they keep is the probabilities, in 16 bits.
    """
    queries, keys = query.shape[2], key.shape[2]
    if query.device.type != "cpu":
        if queries == keys:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = seen.tril(diagonal=keys - queries)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    outputs = []
    for start in range(0, queries, BLOCK):
        block = query[0, :, start : start + BLOCK]
        end = keys - queries + start + block.shape[1]
        hidden = torch.full((block.shape[1], end), -torch.inf, dtype=query.dtype)
        hidden.triu_(diagonal=end - block.shape[1] + 1)
        scores = torch.baddbmm(hidden, block, key[0, :, :end].transpose(1, 2), alpha=scale)
        outputs.append(torch.bmm(scores.softmax(dim=-1), value[0, :, :end]))
    return torch.cat(outputs, dim=1)[None]


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
    pairs: list[tuple[int, int, int]],
) -> torch.Tensor:  # fmt: skip
    """Attention within each pair: exactly the products that are needed, and no mask of T x T.

    `query`, `key` and `value` are (1, heads, T, d); so is the result.
    """
    outputs, start = [], 0
    for first, shared, second in pairs:
        middle, end = start + first, start + first + second
        parts = [t[:, :, start:middle] for t in (query, key, value)]
        outputs.append(_causal(*parts, scale))
        if second:
            keys, values = (
                torch.cat([t[:, :, start : start + shared], t[:, :, middle:end]], dim=2)
                for t in (key, value)
            )
            outputs.append(_causal(query[:, :, middle:end], keys, values, scale))
        start = end
    return torch.cat(outputs, dim=2)


def prefix_shared_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, pairs=None, **kwargs
):  # fmt: skip
    """transformers' attention interface: `attend` where `pairs` come along, else plain SDPA or,
    under a block mask, FlexAttention."""
    if pairs is None:
        flex = attention_mask is not None and not isinstance(attention_mask, torch.Tensor)
        attention = flex_attention_forward if flex else sdpa_attention_forward
        return attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    output = attend(query, repeat_kv(key, groups), repeat_kv(value, groups), scaling, pairs)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, prefix_shared_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def may_attend(row: Row):
    """The mask of a whole row as a function of (batch, head, query, key), for FlexAttention."""
    owner, branch, shared = [], [], []
    for index, (first, keep, second) in enumerate(row.pairs):
        owner += [index] * (first + second)
        branch += [0] * first + [1] * second
        shared += [keep] * (first + second)
    owner, branch, shared = (
        torch.tensor(values, device=row.input_ids.device) for values in (owner, branch, shared)
    )
    position = row.position_ids[0]

    def mask(batch, head, query, key):
        past = (owner[query] == owner[key]) & (position[key] <= position[query])
        prompt = (branch[key] == 0) & (position[key] < shared[key])
        return past & ((branch[query] == branch[key]) | prompt)

    return mask


def dense_mask(row: Row) -> torch.Tensor:
    """`may_attend` written out, (1, 1, T, T): simple, and its cost grows with the square of T."""
    index = torch.arange(row.input_ids.shape[1], device=row.input_ids.device)
    return may_attend(row)(0, 0, index[:, None], index[None, :])[None, None]


class AnswerLogps(torch.autograd.Function):
    """Log-probabilities of `targets` under a frozen head, a few tokens' logits at a time.

    d log p(t) / d h = (1 - p(t)) W[t] - sum over v != t of p(v) W[v] does not depend on what comes
    after, so it is taken while the logits are at hand: two products with the head where recomputing
    them needs three. The target is kept out of the sum, whose other terms are far smaller.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, metrics):
        """Of (N, d) hidden states: log-probability, entropy, log sum p^2 and mean logit, each (N,)
        in float32, and whether the target is the likeliest; without `metrics` only the first."""
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        weight, size = weight.to(dtype), max(16, CHUNK // len(weight))
        few = max(1, CACHED // len(weight))
        results = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(4)]
        top1 = torch.empty_like(targets, dtype=torch.bool)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), size):
                tile = F.linear(hidden[start : start + size].to(dtype), weight, bias)
                for at in range(0, len(tile), few):  # so few that they stay in the cache
                    part = slice(start + at, start + at + len(tile[at : at + few]))
                    found = (*(result[part] for result in results), top1[part])
                    others = _score(tile[at : at + few], targets[part, None], found, metrics)
                    if slope is not None:
                        tile[at : at + few] = others()
                if slope is not None:
                    part = slice(start, start + size)
                    own = -torch.expm1(results[0][part, None]) * weight[targets[part]]
                    slope[part] = own - tile @ weight
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*results[1:], top1)
        return (*results, top1) if metrics else (results[0], *[None] * 4)

    @staticmethod
    def backward(ctx, gradient, *_):
        (slope,) = ctx.saved_tensors
        return (gradient[:, None] * slope).to(slope.dtype), None, None, None, None


def _score(logits, target, found, metrics: bool):
    """Write what is found of some tokens' `logits`, (n, V); return how to get the probabilities of
    all tokens but the target, whose is set to 0."""
    logps, entropy, squares, mean, top1 = found
    logits = logits.float()
    best = logits.argmax(dim=-1, keepdim=True)
    if metrics:
        top1.copy_((best == target)[:, 0])
        mean.copy_(logits.mean(dim=-1))
    logits -= logits.gather(-1, best)
    weights = logits.exp()
    total = weights.sum(dim=-1, keepdim=True)
    logps.copy_((logits.gather(-1, target) - total.log())[:, 0])
    if metrics:
        expected = torch.linalg.vecdot(weights, logits) / total[:, 0]
        entropy.copy_(total[:, 0].log() - expected)
        squares.copy_((torch.linalg.vecdot(weights, weights) / total[:, 0] ** 2).log())

    return lambda: weights.div_(total).scatter_(-1, target, 0)


# Set while the reference is scored: its entropy and the like are logged nowhere.
_BARE: ContextVar[bool] = ContextVar("bare", default=False)


def share_prefixes(model: PreTrainedModel, attention: str = "segments") -> None:
    """Give `model`, which has TRL's fused head, the forward that packs pairs into one row.

    `attention` is `segments` (`attend`), `mask` (SDPA with `dense_mask`) or `flex`. Any other use
    of the model, such as `generate`, goes the way it went before.

    Raises:
        PrefixSharingError: the model's attention or head is not one that this can stand in for.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise PrefixSharingError(f"prefix_sharing: sliding windows ({window}) are not supported")
    if getattr(config, "attn_logit_softcapping", None):
        raise PrefixSharingError("prefix_sharing: capped attention scores are not supported")
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        raise PrefixSharingError(
            f"prefix_sharing needs attn_implementation: sdpa, not {config._attn_implementation}"
        )
    model.set_attn_implementation(NAME)
    before = model.forward
    scaled = any(
        getattr(config, name, None) not in (None, 1.0)
        for name in ("final_logit_softcapping", "logit_scale", "lm_head_multiplier",
                     "output_multiplier", "logits_scaling")
    )  # fmt: skip

    @wraps(before)
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or "shift_labels" in kwargs or len(labels) % 2:
            return before(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        row = pack(kwargs["input_ids"], kwargs["attention_mask"], labels)
        packed = {"input_ids": row.input_ids, "position_ids": row.position_ids, "use_cache": False}
        packed |= _attention_arguments(row, attention)
        head = self.get_output_embeddings()
        if scaled or head.weight.requires_grad or head.weight.device.type != "cpu":
            # TRL's head: its Triton kernel scores labelled positions only, and it trains a head.
            shifted = torch.full_like(row.input_ids, -100)
            shifted[0, row.sources] = row.targets
            out = before(**packed, shift_labels=shifted, fused_lm_head=True)
            fields = (
                out.log_probs,
                out.entropy,
                out.log_sum_sq_probs,
                out.mean_logits,
                out.is_top1,
            )
            found = [None if x is None else x[0, row.sources] for x in fields]
        else:
            hidden = self.base_model(**packed).last_hidden_state[0, row.sources]
            metrics = not _BARE.get()
            found = AnswerLogps.apply(hidden, head.weight, head.bias, row.targets, metrics)
        mask = labels[:, 1:] != -100
        spread = [
            None if x is None else x.new_zeros(mask.numel()).index_put((row.places,), x)
            for x in found
        ]
        fields = [None if x is None else x.view(mask.shape) for x in spread]
        return FusedCausalLMOutput(
            loss=-fields[0].sum() / mask.sum().clamp(min=1),
            log_probs=fields[0], entropy=fields[1], log_sum_sq_probs=fields[2],
            mean_logits=fields[3], is_top1=fields[4], label_mask=mask,
        )  # fmt: skip

    model.forward = MethodType(forward, model)


def _attention_arguments(row: Row, attention: str) -> dict:
    if attention == "segments":
        # A mask of four dimensions is taken as it is; `attend` has no use for it.
        unused = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=row.input_ids.device)
        return {"attention_mask": unused, "pairs": row.pairs}
    if attention == "mask":
        return {"attention_mask": dense_mask(row)}
    from torch.nn.attention.flex_attention import create_block_mask

    size = row.input_ids.shape[1]
    block = create_block_mask(may_attend(row), None, None, size, size, row.input_ids.device)
    return {"attention_mask": block}


def fuse_adapter(model: torch.nn.Module) -> int:
    """Let plain LoRA layers add their update in the product itself; how many there are.

    PEFT copies the layer's output, then scales the update, then adds it: three passes over
    (T, out) numbers that `addmm` does in none. Anything but one plain, unmerged adapter in the
    layer's own dtype goes PEFT's way.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A")]
    for layer in layers:
        if isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = MethodType(_lora_forward(layer.forward), layer)
    return len(layers)


def _lora_forward(before):
    def forward(self, x, *args, **kwargs):
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or self.disable_adapters or self.merged or name not in self.lora_A:
            return before(x, *args, **kwargs)
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        idle = isinstance(dropout, torch.nn.Identity) or dropout.p == 0
        same = torch.is_autocast_enabled(x.device.type) or x.dtype == up.weight.dtype
        if name in self.lora_variant or not (idle and same) or up.bias is not None:
            return before(x)
        result, small = self.base_layer(x), F.linear(x, down.weight).flatten(0, -2)
        update = torch.addmm(result.flatten(0, -2), small, up.weight.t(), alpha=self.scaling[name])
        return update.view(result.shape)

    return forward


class PrefixSharedDPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer`, each prompt run once and nothing padded.

    With `precompute_ref_log_probs` the reference's log-probabilities are kept on disk under a key
    of its weights and of the tokens, and later runs read them. See
    https://huggingface.co/docs/trl/dpo_trainer for everything else.

    Raises:
        PrefixSharingError: a vision or mixture-of-experts model, prompt tuning, or an attention
            that is not plain; the message names it.
    """

    def __init__(self, *args, prefix_attention: str = "segments", **kwargs) -> None:
        self.prefix_attention, self._shared = prefix_attention, False
        super().__init__(*args, **kwargs)
        if self._is_vlm or self.aux_loss_enabled:
            kind = "vision" if self._is_vlm else "mixture-of-experts"
            raise PrefixSharingError(f"prefix_sharing: {kind} models are not supported")
        self._share()

    def _share(self) -> None:
        if self._shared:
            return
        self._shared = True
        model = self.accelerator.unwrap_model(self.model)
        for one in (model, self.ref_model and self.accelerator.unwrap_model(self.ref_model)):
            if one is None:
                continue
            peft = getattr(one, "peft_config", None)
            if peft and any(c.is_prompt_learning for c in peft.values()):
                raise PrefixSharingError("prefix_sharing: prompt tuning is not supported; use LoRA")
            share_prefixes(one.get_base_model() if peft else one, self.prefix_attention)
            fuse_adapter(one)

    def compute_ref_log_probs(self, model, inputs):
        """TRL's, log-probabilities only."""
        token = _BARE.set(True)
        try:
            return super().compute_ref_log_probs(model, inputs)
        finally:
            _BARE.reset(token)

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's, with the reference scored beforehand by the method above."""
        if self.precompute_ref_logps:
            return super()._compute_loss(model, inputs, return_outputs)
        scored = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        self.precompute_ref_logps = True
        try:
            known = dict(zip(REFERENCE, scored, strict=True))
            return super()._compute_loss(model, {**inputs, **known}, return_outputs)
        finally:
            self.precompute_ref_logps = False

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's pass over the reference, longest pairs first; or what an earlier run has kept."""
        self._share()  # TRL calls this while it is still being built
        if isinstance(dataset, IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        file = reference_cache() / f"{self._reference_key(dataset)}.npz"
        if not file.exists():
            sizes = [sum(map(len, ids)) for ids in zip(*_token_columns(dataset), strict=True)]
            order = np.argsort(sizes)[::-1]  # what does not fit in memory fails at once
            scored = super()._precompute_ref_logps(dataset.select(order), name, batch_size)
            if self.accelerator.is_main_process:
                found = {k: np.empty(len(order), np.float32) for k in REFERENCE}
                for column, values in found.items():
                    values[order] = scored[column]
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.with_suffix(".part").open("wb") as part:
                    np.savez(part, **found)
                file.with_suffix(".part").rename(file)
            self.accelerator.wait_for_everyone()
        kept = np.load(file)
        columns = Dataset.from_dict({column: kept[column] for column in REFERENCE})
        return concatenate_datasets([dataset, columns], axis=1)

    def _reference_key(self, dataset: Dataset) -> str:
        """A digest of all that the reference's log-probabilities come from."""
        args = self.args
        digest = hashlib.sha256()
        settings = (args.max_length, args.truncation_mode, args.ld_alpha, args.bf16, args.fp16)
        digest.update(repr(settings).encode())
        for column in _token_columns(dataset):
            for ids in column:
                digest.update(np.asarray(ids, dtype=np.int32).tobytes() + b"|")
        model = self.accelerator.unwrap_model(self.ref_model or self.model)
        adapters = getattr(model, "peft_config", {})
        own = ".ref." if "ref" in adapters else None
        for key, tensor in model.state_dict().items():
            if "lora_" in key and not (own and own in key):
                continue  # switched off in the reference
            digest.update(f"{key} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()[:32]


REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def _token_columns(dataset: Dataset) -> list:
    return [dataset[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]


def reference_cache() -> Path:
    """The folder in which reference log-probabilities are kept, beside the cache of `datasets`."""
    return Path(datasets.config.HF_CACHE_HOME) / "dpo_reference_logps"
