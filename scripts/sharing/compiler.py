"""Whether Triton can compile here, and the head in plain torch where it cannot.

On a GPU, TRL's head is a Triton kernel, and Triton builds a small C library when a kernel is first
launched: it needs a C compiler and Python's headers, which many containers leave out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import torch
from trl.kernels import chunked_logprob

FIX = "apt-get install -y gcc libc6-dev python3-dev"


def missing_for_triton() -> list[str]:
    """What Triton misses when it compiles: a C compiler (CC, gcc, clang) that works, Python.h."""
    missing, include = [], sysconfig.get_path("include")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        missing.append("a C compiler")
    if not (Path(include) / "Python.h").is_file():
        missing.append("Python.h")
    if not missing and not _compiles(compiler, include):
        missing.append(f"a C compiler that works ({compiler} does not)")
    return missing


def _compiles(compiler: str, include: str) -> bool:
    """Whether `compiler` builds a library of the kind that Triton builds: it may lack libc's own
    headers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(
            "#include <stdlib.h>\n#include <Python.h>\nint probe(void) { return 0; }\n"
        )
        command = [compiler, source, "-shared", "-fPIC", f"-I{include}", "-o", f"{source}.so"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def use_torch_head_without_compiler(device: torch.device) -> str | None:
    """Have TRL score answers in plain torch on a GPU where Triton cannot compile.

    Returns:
        A sentence that says so, or None where nothing had to change.
    """
    if device.type != "cuda" or not (missing := missing_for_triton()):
        return None
    chunked_logprob._TRITON_AVAILABLE = False  # what its `_use_triton` asks at every call
    return (
        f"Triton cannot compile here ({' and '.join(missing)} missing): the head runs in plain "
        f"torch, slower and in more memory. To change that: {FIX}"
    )
