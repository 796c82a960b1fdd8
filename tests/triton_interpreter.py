"""TRL's Triton head, which a GPU runs, against its torch one, in Triton's interpreter on a CPU.

    TRITON_INTERPRET=1 python -m tests.triton_interpreter

The variable is read when Triton is imported, so this is a process of its own
(tests/test_triton_head.py). It prints, for each case, the largest difference of values and the
relative one of gradients, as JSON.
"""

import json
from dataclasses import dataclass
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import chunked_logprob
from trl.trainer import utils

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass
class Case:
    """One call of the head; a block of the kernels is 1,024 words."""

    tokens: int = 5
    width: int = 16
    words: int = 3000  # no multiple of a block, nor of a chunk
    chunk: int = 1024
    dtype: str = "float32"
    softcap: float | None = None
    bias: bool = False
    temperature: float = 1.0


CASES = {
    "several chunks": Case(),
    "one chunk": Case(words=2500, chunk=32768),
    "a whole block": Case(words=1024),
    "one word over": Case(words=1025),
    "one token": Case(tokens=1),
    "bias, temperature": Case(bias=True, temperature=0.7),
    "capped logits": Case(softcap=5.0),
    "in 16 bits": Case(dtype="bfloat16"),
    "Llama 3's vocabulary": Case(tokens=2, width=8, words=128_256, chunk=32_768),
}


def score(case: Case, triton: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The head's outputs, and the gradients of hidden states, weight and bias."""
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=random).to(dtype).requires_grad_()

    hidden, weight = normal(case.tokens, case.width), normal(case.words, case.width)
    bias = normal(case.words) if case.bias else None
    targets = torch.randint(0, case.words, (case.tokens,), generator=random)
    targets[0], targets[-1] = 0, case.words - 1
    with patch.object(chunked_logprob, "_use_triton", lambda device: triton):
        found = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, case.temperature, case.chunk, case.softcap, 1.0, OUTPUTS
        )
        slope = torch.linspace(-1, 1, case.tokens) if case.tokens > 1 else torch.ones(1)
        (found[0] @ slope + (found[1] * slope**2).sum()).backward()
    grads = [x.grad for x in (hidden, weight, bias) if x is not None]
    return [x.detach() for x in found], grads


def fused_model(triton: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A tiny Llama through TRL's whole fused forward: on a GPU it scores answer tokens only."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1500, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(0, 1500, (2, 9))
    labels = ids.masked_fill(torch.arange(9) < torch.tensor([[3], [6]]), -100)
    with (
        patch.object(chunked_logprob, "_use_triton", lambda device: triton),
        patch.object(utils, "_use_triton", lambda device: triton),
    ):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        out.loss.backward()
    values = (out.loss, out.log_probs, out.entropy, out.mean_logits, out.is_top1)
    return [x.detach() for x in values], [p.grad for p in model.parameters()]


def differences(run) -> dict[str, float]:
    """Triton's way against torch's: values absolutely, gradients relative to their norm."""
    (values, grads), (own_values, own_grads) = run(False), run(True)
    apart = [(a.float() - b.float()).abs().max() for a, b in zip(values, own_values, strict=True)]
    turned = [(a - b).norm() / a.norm() for a, b in zip(grads, own_grads, strict=True)]
    nonzero = min(grad.norm() for grad in own_grads)
    return {"values": float(max(apart)), "gradients": float(max(turned)), "least": float(nonzero)}


def main() -> None:
    forward = chunked_logprob._forward_kernel
    with patch.object(forward, "run", wraps=forward.run) as counted:
        found = {k: differences(lambda t, c=c: score(c, t)) for k, c in CASES.items()}
        found["TRL's fused forward"] = differences(fused_model)
        launches = counted.call_count
    print(json.dumps({"launches": launches, "cases": found}))


if __name__ == "__main__":
    main()
