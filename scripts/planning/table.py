"""The editable table of GPUs, prices and datasets."""

from __future__ import annotations

from functools import lru_cache

import yaml

from scripts.base import ROOT

FILE = ROOT / "configs" / "hardware" / "gpus.yaml"


@lru_cache(maxsize=1)
def table() -> dict:
    """`configs/hardware/gpus.yaml`, whose comments say what stands in it."""
    return yaml.safe_load(FILE.read_text())
