"""The head that a GPU runs, TRL's two Triton kernels, equals its torch form: in Triton's
interpreter. No other Triton kernel is on the path: bitsandbytes has them for other devices only,
and transformers, PEFT and Accelerate launch none for a Llama."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from scripts.base import ROOT


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)"
)
def test_the_triton_head_equals_the_torch_one():
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_interpreter"], cwd=ROOT, capture_output=True,
        text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["launches"] > 20  # so it was Triton's way
    assert len(found["cases"]) == 10
    for name, far in found["cases"].items():
        sixteen = name == "in 16 bits"  # torch's way rounds each chunk of the gradient's sum
        assert far["values"] < (5e-4 if sixteen else 3e-5), (name, far)
        assert far["gradients"] < (1e-2 if sixteen else 1e-5), (name, far)
        assert far["least"] > 0, name
