"""The NVIDIA driver of this machine, its GPUs, and the driver that a torch needs."""

from __future__ import annotations

import re
import shutil
import subprocess

# The oldest driver branch for each CUDA release line: NVIDIA's "CUDA Compatibility", table of minor
# version compatibility.
DRIVERS = {11: 450, 12: 525, 13: 580}


class DriverError(RuntimeError):
    """There is an NVIDIA driver, and it does not work."""


def ask_driver(*options: str, patience: float = 20) -> list[str]:
    """The lines that `nvidia-smi` prints; none where there is no such command or no GPU.

    Raises:
        DriverError: it fails, or does not answer within `patience` seconds.
    """
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience)
    except subprocess.TimeoutExpired:
        raise DriverError("nvidia-smi does not answer: restart the machine's driver") from None
    except OSError as error:
        raise DriverError(f"nvidia-smi cannot be started: {error.strerror}") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode == 6:  # a driver, and no GPU
        return []
    if done.returncode:
        raise DriverError(f"nvidia-smi fails: {lines[0] if lines else done.returncode}")
    return done.stdout.strip().splitlines()


def gpus_of_the_driver() -> list[str]:
    """The GPUs as `nvidia-smi -L` lists them, whatever CUDA_VISIBLE_DEVICES leaves in sight:
    `GPU 0: NVIDIA A100-SXM4-80GB`.

    Raises:
        DriverError: as `ask_driver`.
    """
    return [line.split(" (")[0] for line in ask_driver("-L") if line.startswith("GPU ")]


def driver_version() -> str | None:
    """The NVIDIA driver as `nvidia-smi` tells it, e.g. `570.86.15`; None where there is none.

    Raises:
        DriverError: as `ask_driver`.
    """
    lines = ask_driver("--query-gpu=driver_version", "--format=csv,noheader", patience=8)
    return lines[0].strip() if lines else None


def driver_branch(driver: str) -> int | None:
    """570 of `570.86.15`; None where the driver does not tell (`[N/A]`)."""
    number = re.match(r"\d+", driver)
    return int(number[0]) if number else None


def needed_driver(cuda: str) -> int | None:
    """The oldest driver branch that runs what was built for the CUDA version `cuda`, if known."""
    return DRIVERS.get(int(cuda.split(".")[0]))
