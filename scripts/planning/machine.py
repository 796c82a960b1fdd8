"""The NVIDIA driver of this machine, and the one that a torch needs."""

from __future__ import annotations

import subprocess

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
