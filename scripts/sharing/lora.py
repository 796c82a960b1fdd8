"""The adapter's update, added inside its own matrix product."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F


def fuse_adapter(model: torch.nn.Module) -> int:
    """Let plain LoRA layers add their update in the product itself; returns how many there are.

    PEFT copies the layer's output, then scales the update, then adds it: three passes over
    (T, out) numbers that `addmm` does in none. Anything but one plain, unmerged adapter in the
    layer's own dtype goes PEFT's way.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and hasattr(m, "lora_A")]
    for layer in layers:
        if isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = MethodType(_fused_forward(layer.forward), layer)
    return len(layers)


def unfuse_adapter(model: torch.nn.Module) -> None:
    """Give every layer its own forward back."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.__dict__.pop("forward", None)


def _fused_forward(before: Callable) -> Callable:
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
