"""Whether Triton can compile here, and the head in plain torch where it cannot.

On a GPU, TRL's head is a Triton kernel, and Triton builds a small C library when a kernel is first
launched: it needs a C compiler and Python's headers, which many containers leave out.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from trl.kernels import chunked_logprob

FIX = "apt-get install -y gcc libc6-dev python3-dev"


def missing_for_triton() -> list[str]:
    """What Triton would miss when it compiles: a C compiler (CC, gcc or clang), Python.h."""
    missing = []
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing.append("a C compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python.h")
    return missing


def use_torch_head_without_compiler(device: torch.device) -> str | None:
    """Have TRL score answers in plain torch on a GPU where Triton cannot compile.

    Returns:
        A sentence that says so, or None where nothing had to change.
    """
    missing = missing_for_triton()
    if device.type != "cuda" or not missing:
        return None
    chunked_logprob._TRITON_AVAILABLE = False  # what its `_use_triton` asks at every call
    return (
        f"Triton cannot compile here ({' and '.join(missing)} missing): the head runs in plain "
        f"torch, slower and in more memory. To change that: {FIX}"
    )
