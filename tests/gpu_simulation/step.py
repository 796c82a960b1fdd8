"""A run's own model set-up, trainer, steps and optimiser on tensors without data: the child process
of `__main__.py`, which sets up the stand-in runtime."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.backends.cuda import ops as bnb_cuda
from datasets import Dataset, DatasetDict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.quantizers import AutoHfQuantizer
from triton.runtime.jit import JITFunction
from trl import get_quantization_config
from trl.kernels import chunked_logprob

import scripts.sharing.trainer
from scripts.benchmark import random_pairs
from scripts.config import Config, load_config
from scripts.plan_memory import architecture, model_sizes, peak, phases, worst_lengths
from scripts.quiet import quiet
from scripts.training import build_trainer
from tests import conftest
from tests.gpu_simulation.ledger import Ledger

# Two micro-batches a step and two steps: the last runs beside gradients and the optimiser's state.
SHORT = {
    "max_steps": 2, "gradient_accumulation_steps": 2, "report_to": "none", "logging_steps": 1000,
    "eval_strategy": "no", "save_strategy": "no", "dataloader_pin_memory": False,
    "output_dir": str(Path(tempfile.gettempdir()) / "gpu-simulation-run"),
}  # fmt: skip


@contextmanager
def stand_ins(ledger: Ledger):
    """Replace what needs data or a GPU's own code by what takes the same memory."""

    def on_gpu(self, *args, **kwargs):
        with torch.device("cuda"):  # a fake cannot be moved there in place
            return update_layer(self, *args, **kwargs)

    def paged(*shape, dtype=torch.float32, device=None):
        with ledger.belongs("paged"):
            return torch.empty(shape, dtype=dtype, device="cuda")

    def mask(cls, *args):
        with _disable_current_modes():  # it is made of an empty tensor, as no mode allows
            return new_mask(cls, *args)

    nothing = lambda *args, **kwargs: None  # noqa: E731
    update_layer, new_mask = LoraLayer.update_layer, CausalBias.__new__
    with ExitStack() as stack:
        replace = lambda *args: stack.enter_context(patch.object(*args))  # noqa: E731
        replace(LoraLayer, "update_layer", on_gpu)
        replace(CausalBias, "__new__", mask)
        replace(JITFunction, "run", nothing)  # Triton's launches write into what they are given
        replace(chunked_logprob, "_addmm_fp32", nothing)
        replace(bnb_cuda, "_dequantize_4bit_impl", nothing)
        replace(bnb_cuda, "_dequantize_blockwise_impl", nothing)
        replace(bnb_functional, "get_paged", paged)
        replace(bnb_functional, "fill", nothing)
        replace(bnb_functional, "prefetch_tensor", nothing)
        # A comparison of numbers, which a tensor without data has none of.
        replace(scripts.sharing.trainer, "disagreement", nothing)
        # All is where it belongs already.
        replace(nn.Module, "to", lambda self, *args, **kwargs: self)
        yield


def base_model(cfg, ledger: Ledger):
    """The architecture with its linear layers replaced by transformers' own quantizer, and weights
    as fakes. A `Params4bit` cannot wrap a fake; a plain parameter with its attributes can."""
    quantization = get_quantization_config(cfg.model)
    options = {"dtype": torch.bfloat16, "attn_implementation": cfg.model.attn_implementation}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture(cfg), **options)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": 0}, dtype=torch.bfloat16)
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.is_loaded_in_4bit = True
    with ledger:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                made = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda")
                if isinstance(module, bnb.nn.Linear4bit):
                    made = quantized(module, weight, made)
                else:
                    made = nn.Parameter(made, requires_grad=False)
                module._parameters[name] = made
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    model.config.use_cache = False
    return model.eval()


def quantized(module, weight, made: torch.Tensor) -> nn.Parameter:
    """`made` as `module` holds it in 4 bits."""
    packed, state = bnb_functional.quantize_4bit(
        made, blocksize=64, compress_statistics=weight.compress_statistics,
        quant_type=weight.quant_type, quant_storage=weight.quant_storage,
    )  # fmt: skip
    parameter = nn.Parameter(packed, requires_grad=False)
    for name in ("quant_type", "compress_statistics", "quant_storage"):
        setattr(parameter, name, getattr(weight, name))
    parameter.quant_state = module.quant_state = state
    parameter.bnb_quantized, parameter.blocksize = True, 64
    return parameter


class Phases(TrainerCallback):
    """Tells the ledger what the trainer is doing, and whose the gradients and moments are."""

    def __init__(self, ledger: Ledger, model, ref_model=None) -> None:
        self.ledger = ledger
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for one in (model, ref_model):
            if one is not None:
                one.register_forward_pre_hook(self._forward)
        # TRL's own way scores the reference between the policy's forward and its backward.
        model.register_forward_hook(lambda *_: ledger.phase("step"))

    def _forward(self, *_) -> None:
        for weight in self.trained:
            if weight.grad is not None:
                self.ledger.relabel(weight.grad, "gradients")
        self.ledger.part = "activations"
        self.ledger.phase("step" if torch.is_grad_enabled() else "reference")

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.ledger.part = "optimiser"
        self.ledger.phase("optimiser")

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.ledger.part = "activations"


def trainer_over_fakes(cfg: Config, model, lengths: tuple[int, int, int], second: Callable):
    """The project's trainer over random pairs of these lengths; `second` makes the reference of a
    run without an adapter."""
    tokenizer = conftest.llama3_tokenizer(conftest.LLAMA3_WORDS)
    tokenizer.pad_token = tokenizer.eos_token
    one = Dataset.from_list([conftest.explicit(*conftest.PAIRS[0])])
    with patch("scripts.training.load_model", second):
        made = build_trainer(cfg, model, tokenizer, DatasetDict({"train": one, "test": one}))
    if refusal := getattr(made, "refusal", None):
        raise SystemExit(f"not simulated: {refusal}; set prefix_sharing=false")
    made.train_dataset = random_pairs(1000, lengths, cfg.dpo.per_device_train_batch_size * 4)
    return made


def simulate(config: str, overrides: dict) -> dict:
    """Two optimiser steps of two micro-batches of a config, in GB by phase, and the plan's (which
    leaves out the CUDA context)."""
    quiet()
    cfg = load_config(config, SHORT | overrides)
    if cfg.dpo.precompute_ref_log_probs:
        raise SystemExit(
            "not simulated: precompute_ref_log_probs scores the reference before training; set it "
            "to false"
        )
    lengths = worst_lengths(cfg)
    ledger = Ledger()
    ledger.phase("load")

    def second(*_):  # the reference of a run without an adapter
        with ledger.belongs("reference model"):
            return base_model(cfg, ledger)

    with stand_ins(ledger):
        model = base_model(cfg, ledger).requires_grad_(not cfg.model.use_peft)
        with ledger, ledger.belongs("adapter"):
            trainer = trainer_over_fakes(cfg, model, lengths, second)
            trainer.add_callback(Phases(ledger, trainer.model, trainer.ref_model))
            ledger.phase("set-up")
            trainer.train()
    peaks = {name: ledger.peak(name) for name in ("reference", "step")}
    print(json.dumps(peaks, indent=1))  # by part, for whoever asks where a difference comes from
    simulated = {name: sum(parts.values()) for name, parts in peaks.items()}
    planned = phases(cfg, model_sizes(cfg), lengths, True, 0)
    return {"simulated": simulated, "planned": {name: peak(planned[name]) for name in peaks}}


if __name__ == "__main__":
    print(json.dumps(simulate(*json.loads(sys.argv[1]))))
