"""Whether what was installed works together: the last step of `scripts/setup.sh`.

    python -m scripts.selfcheck

Imports every library that the recipe uses and quantizes one matrix to NF4 and back; where there is
a GPU, also multiplies by that matrix and launches the head's Triton kernel on it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

from scripts.driver import gpus_of_the_driver

LIBRARIES = (
    "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "wandb",
    "papermill", "jupyterlab",
)  # fmt: skip


def selfcheck() -> str:
    """One line that says what works.

    Raises:
        RuntimeError: a library cannot be imported, the driver or a GPU of it cannot be used, or
            NF4 does not come back as it went in.
    """
    for name in LIBRARIES:
        try:
            import_module(name)
        except Exception as error:  # a broken install fails in any way there is
            raise RuntimeError(f"{name} cannot be imported: {error}") from error
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if not torch.cuda.is_available() and (gpus := gpus_of_the_driver()):
        raise RuntimeError(
            f"nvidia-smi lists {gpus[0]}, but torch {version('torch')} (CUDA: "
            f"{torch.version.cuda or 'none, a CPU build'}) cannot use it: the driver is too old "
            "for that CUDA, or the container was started without the GPU"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    restored = dequantize_4bit(packed, state)
    error = (restored - weight).abs().mean().item()
    if not 0 < error < 0.15:  # 16 levels for a normal distribution: about 0.07 off on average
        raise RuntimeError(f"NF4 comes back {error:.2f} off on {device}")
    place, remark = "the CPU", ""
    if device == "cuda":
        place = torch.cuda.get_device_name()
        check_nf4_product(packed, state, restored)
        remark = check_head(torch.device(device))
    return f"setup: torch {version('torch')}, trl {version('trl')}, NF4 works on {place}{remark}"


def check_nf4_product(packed, state, restored) -> None:
    """Multiply by the 4-bit matrix, as every layer of the model does, and compare."""
    import torch
    from bitsandbytes import matmul_4bit

    x = torch.randn(8, 64, device=packed.device)
    gap = (matmul_4bit(x, packed.t(), quant_state=state) - x @ restored.t()).abs().max().item()
    if not gap < 0.1:
        raise RuntimeError(f"a product with an NF4 matrix is {gap:.2f} off on the GPU")


def check_head(device) -> str:
    """Launch TRL's head, on a GPU a Triton kernel, and compare with torch; a remark if it can't.

    Raises:
        RuntimeError: it runs and gives other numbers.
    """
    import torch
    from trl.kernels import ChunkedLogProbFunction

    from scripts.sharing.compiler import use_torch_head_without_compiler

    remark = use_torch_head_without_compiler(device)
    hidden, weight = torch.randn(4, 64, device=device), torch.randn(500, 64, device=device)
    targets = torch.arange(4, device=device)
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8192)[0]
    exact = (hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    if not (gap := (logps - exact).abs().max().item()) < 0.1:
        raise RuntimeError(f"TRL's head is {gap:.2f} nats off on {device}")
    return f"\nsetup: WARNING: {remark}" if remark else ", Triton compiles"


def main() -> None:
    try:
        print(selfcheck())
    except RuntimeError as error:
        sys.exit(f"setup: self-check failed: {error}")


if __name__ == "__main__":
    main()
