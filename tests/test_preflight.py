"""Each check of the preflight says ok, warn or FAIL for a reason, and soon."""

import subprocess
import sys

import pytest
import torch
from transformers import GPTJConfig

from scripts import hub as hub_client
from scripts import preflight as module
from scripts.base import ROOT
from scripts.config import load_config
from scripts.driver import driver_version, gpus_of_the_driver
from scripts.preflight import (
    FAIL,
    OK,
    WARN,
    PreflightError,
    gpu_lines,
    hub_dataset,
    local_data,
    memory_lines,
    model_lines,
    package_lines,
    place_lines,
    several_gpus,
    show,
    tracking_lines,
)

A100 = "configs/llama3-8b-a100.yaml"
OPEN = (200, {}, b'{"id": "m", "gated": false}')
GATED = (200, {}, b'{"id": "m", "gated": "manual"}')
REFUSED = (403, {"X-Error-Code": "GatedRepo"}, b"{}")
MISSING = (401, {"X-Error-Code": "RepoNotFound"}, b"{}")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def hub(model=OPEN, auth=(200, {}, b"{}")):
    return lambda path, body: auth if path.endswith("/auth-check") else model


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(hub_client, "BREATH", 0.01)


@pytest.fixture
def a100():
    return load_config(A100, may_lack_gpu=True)


def stands(check, cfg):
    return [(line.status, line.what) for line in check(cfg)]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` that prints `text` in front of the PATH."""

    def install(text: str, code: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


@without_gpu
@pytest.mark.parametrize(
    ("text", "code", "cuda", "finding", "fix"),
    [
        ("570.86\\n570.86\\n", 0, "13.0", "570.86 is too old for CUDA 13.0", "580 or newer"),
        ("570.86\\n", 0, "12.6", "torch sees none, with driver 570.86", "CUDA_VISIBLE_DEVICES"),
        ("570.86\\n", 0, None, "this torch is built for the CPU", "scripts/setup.sh"),
        ("NVIDIA-SMI has failed", 9, "13.0", "nvidia-smi fails: NVIDIA-SMI has failed", "restart"),
    ],
)
def test_without_a_gpu_the_reason_and_the_fix(
    nvidia_smi, monkeypatch, a100, text, code, cuda, finding, fix
):
    nvidia_smi(text, code)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    *_, line = gpu_lines(a100)
    assert (line.status, line.what) == (FAIL, "GPU")
    assert finding in line.finding and fix in line.fix


def test_the_gpus_of_the_driver_are_counted_by_their_lines(nvidia_smi, monkeypatch):
    nvidia_smi("GPU 0: NVIDIA L4 (UUID: 1)\\n  MIG 1g.5gb (UUID: 2)\\nGPU 1: NVIDIA L4 (UUID: 3)")
    assert gpus_of_the_driver() == ["GPU 0: NVIDIA L4", "GPU 1: NVIDIA L4"]
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpus_of_the_driver() == [] and driver_version() is None


def test_several_gpus_want_several_processes():
    (line,) = several_gpus(count=2, processes=1)
    assert line.status == FAIL
    assert "CUDA_VISIBLE_DEVICES=0" in line.fix and "accelerate launch" in line.fix
    assert list(several_gpus(2, 2)) == list(several_gpus(1, 1)) == []
    (line,) = several_gpus(count=1, processes=1, there=4)
    assert line.status == OK and "one of 4 is used" in line.finding


def test_without_a_compiler_a_gpu_run_is_slower(tmp_path, monkeypatch, a100, tiny_cfg):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    first, *_ = gpu_lines(a100)
    assert (first.status, first.what) == (WARN, "Triton")
    assert first.finding.startswith("a C compiler") and "gcc libc6-dev python3-dev" in first.fix
    assert stands(gpu_lines, tiny_cfg(use_cpu=True)) == [(OK, "device")]


def test_memory_and_disk_are_held_against_the_plan(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tiny_cfg().run_dir.parent))
    assert stands(memory_lines, tiny_cfg(use_cpu=True)) == [(OK, "memory"), (OK, "disk")]
    big = tiny_cfg(use_cpu=True, max_length=60_000, per_device_train_batch_size=512)
    first, *_ = memory_lines(big)
    assert (first.status, first.what) == (FAIL, "memory")
    assert "scripts.plan" in first.fix
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    assert stands(memory_lines, tiny_cfg(use_cpu=True))[1:] == [(FAIL, "disk")]


def test_checkpoints_are_part_of_the_disk_that_a_run_needs():
    """Rank 416: 1.09 B parameters of 4 bytes and two moments of 4 are 12.2 GB, three times."""
    *_, disk = memory_lines(load_config("configs/llama3-8b-a100-rank416.yaml", may_lack_gpu=True))
    assert "checkpoints 36.6" in disk.finding and "adapter 4.1" in disk.finding
    keeps_none = {"save_strategy": "no"}
    short = load_config("configs/llama3-8b-a100-short.yaml", keeps_none, may_lack_gpu=True)
    *_, disk = memory_lines(short)
    assert "checkpoints" not in disk.finding


def test_packages_are_held_against_the_pins(monkeypatch):
    assert [(line.status, line.what) for line in package_lines()] == [(OK, "packages")]
    real = module.version
    monkeypatch.setattr(module, "version", lambda n: "0.1" if n == "trl" else real(n))
    (line,) = package_lines()
    assert line.status == WARN and "trl 0.1 (wanted" in line.finding


@pytest.mark.parametrize(
    ("answer", "token", "status", "finding", "fix"),
    [
        (hub(GATED), "hf_good", OK, "is gated, and your token may read it", ""),
        (hub(GATED, REFUSED), None, FAIL, "there is no token", "set HF_TOKEN"),
        (hub((500, {}, b"oops")), None, FAIL, "the hub fails (500)", "try again later"),
        (hub((429, {"Retry-After": "900"}, b"")), None, FAIL, "come back in 900 s", "HF_TOKEN"),
    ],
)
def test_access_to_the_model_without_a_download(
    endpoint, a100, answer, token, status, finding, fix
):
    endpoint(answer, token)
    (line,) = model_lines(a100)
    assert line.status == status
    assert finding in line.finding and fix in line.fix


def test_a_model_that_pypi_has_needs_no_hub(endpoint):
    endpoint(hub((500, {}, b"oops")))
    (line,) = model_lines(load_config("configs/smollm2-135m-cpu.yaml"))
    assert line.status == OK


def test_folders_and_attention_are_looked_at(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    assert list(place_lines(cfg)) == []
    GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, rotary_dim=4).save_pretrained(
        tmp_path
    )
    cfg.model.model_name_or_path = str(tmp_path)
    folders, attention = place_lines(cfg)
    assert (folders.status, attention.status) == (FAIL, FAIL)
    assert (
        "no .safetensors" in folders.finding and attention.fix == "set attn_implementation: eager"
    )


def test_access_to_the_dataset(endpoint, tiny_cfg, a100):
    endpoint(lambda path, body: (200, {}, b'{"id": "Intel/orca_dpo_pairs"}'))
    assert stands(hub_dataset, a100) == [(OK, "dataset")]
    endpoint(lambda path, body: MISSING)
    assert stands(hub_dataset, a100) == [(FAIL, "dataset")]
    cfg = tiny_cfg()
    cfg.script.dataset_train_split, cfg.given["dataset_train_split"] = "trian", "trian"
    ((line,), _) = local_data(cfg)
    assert (line.status, line.what) == (FAIL, "dataset")


def test_without_a_key_wandb_is_a_remark(monkeypatch, tiny_cfg, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stands(tracking_lines, tiny_cfg(report_to="wandb")) == [(WARN, "W&B")]
    assert stands(tracking_lines, tiny_cfg(report_to="none")) == [(OK, "W&B")]
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert stands(tracking_lines, tiny_cfg(report_to="wandb")) == [(OK, "W&B")]


def test_failures_are_named_at_the_end(capsys):
    lines = [module.Check(OK, "a", "fine"), module.Check(FAIL, "b", "not fine", "do this")]
    with pytest.raises(PreflightError, match="this run would fail: b"):
        show(lines)
    out = capsys.readouterr().out
    assert "ok    a" in out and "FAIL  b" in out and "-> do this" in out
    show(lines[:1])


@without_gpu
def test_the_command_says_what_would_fail():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.preflight", "--config", A100],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "FAIL  GPU" in done.stdout
    assert done.stderr.startswith("error: this run would fail: GPU")
