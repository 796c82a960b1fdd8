"""Whether what was installed works together: the last step of `scripts/setup.sh`.

    python -m scripts.selfcheck

Imports every library that the recipe uses and quantizes one matrix to NF4 and back.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

LIBRARIES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "wandb",
    "papermill", "jupyterlab",
)  # fmt: skip


def selfcheck() -> str:
    """One line that says what works.

    Raises:
        RuntimeError: a library cannot be imported, or NF4 does not come back as it went in.
    """
    for name in LIBRARIES:
        try:
            import_module(name)
        except Exception as error:  # a broken install fails in any way there is
            raise RuntimeError(f"{name} cannot be imported: {error}") from error
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    error = (dequantize_4bit(packed, state) - weight).abs().mean().item()
    if not 0 < error < 0.15:  # 16 levels for a normal distribution: about 0.07 off on average
        raise RuntimeError(f"NF4 comes back {error:.2f} off on {device}")
    where = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    return f"setup: torch {version('torch')}, trl {version('trl')}, NF4 works on {where}"


def main() -> None:
    try:
        print(selfcheck())
    except RuntimeError as error:
        sys.exit(f"setup: self-check failed: {error}")


if __name__ == "__main__":
    main()
