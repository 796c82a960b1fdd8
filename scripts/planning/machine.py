"""What a GPU run needs of a machine besides memory: a driver, and what Triton compiles with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

# The oldest driver branch for each CUDA release line: NVIDIA's "CUDA Compatibility", table of minor
# version compatibility.
DRIVERS = {11: 450, 12: 525, 13: 580}


def driver_version() -> str | None:
    """The NVIDIA driver as `nvidia-smi` tells it, e.g. `570.86.15`; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=8, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split()
    return lines[0] if lines else None


def needed_driver(cuda: str) -> int | None:
    """The oldest driver branch that runs what was built for the CUDA version `cuda`, if known."""
    return DRIVERS.get(int(cuda.split(".")[0]))


def missing_build_tools() -> list[str]:
    """What Triton lacks to compile the launcher of a kernel: a C compiler, Python's headers."""
    compilers = (os.environ.get("CC"), "gcc", "clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = []
    if not any(shutil.which(name) for name in compilers if name):
        missing.append("no C compiler")
    if not header.is_file():
        missing.append(f"no {header}")
    return missing
