"""Set-up says what is wrong with a GPU machine before it downloads anything; nvidia-smi and Python
are stand-ins on PATH, the script is the real one."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction, chunked_logprob

from scripts import selfcheck
from scripts.base import ROOT
from scripts.sharing.compiler import missing_for_triton, use_torch_head_without_compiler


def command(folder, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def set_up(tmp_path):
    """Runs setup.sh in an empty project with a driver's version and a Python that has torch for
    some CUDA; that Python makes no venv, so nothing is installed."""

    def run(
        driver: str | None, torch_cuda: str = "", smi: str | None = None, **env
    ) -> subprocess.CompletedProcess:
        project, tools = tmp_path / "project", tmp_path / "tools"
        for folder in (project / "scripts", tools):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", project / "scripts")
        answers = f'case "$*" in *torch*) echo {torch_cuda};; *--version*) echo Python 3.11;; '
        command(tools, "python3", f"{answers} *version_info*) exit 0;; *) exit 7;; esac")
        if driver is not None:
            command(tools, "nvidia-smi", smi or (f"echo {driver}" if driver else "exit 9"))
        path = f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", project / "scripts" / "setup.sh"], capture_output=True, text=True,
            env={"PATH": path, "PYTHON": str(tools / "python3"), **env},
        )  # fmt: skip
        assert not (project / ".venv").exists()
        return done

    return run


@pytest.mark.parametrize(
    ("driver", "cuda", "env", "refused"),
    [
        ("570.172.08", "", {}, "580"),
        ("580.65.06", "", {}, None),
        ("595.71.05", "", {}, None),
        ("570.172.08", "12.6", {"SYSTEM_TORCH": "1"}, None),
        ("515.43", "12.6", {"SYSTEM_TORCH": "1"}, "525"),
        ("570.172.08", "13.0", {"SYSTEM_TORCH": "1"}, "580"),
        ("570.172.08", "", {"SYSTEM_TORCH": "1"}, None),  # a CPU build: the self-check's to say
        ("", "", {}, None),  # nvidia-smi fails: no driver to speak of
        (None, "", {}, None),
    ],
)
def test_an_old_driver_stops_before_anything_is_made(set_up, driver, cuda, env, refused):
    done = set_up(driver, cuda, **env)
    assert done.returncode == 1  # either here, or because the stand-in makes no venv
    if refused:
        assert f"driver is {driver}" in done.stderr
        assert f"needs {refused} or newer" in done.stderr
        assert "SYSTEM_TORCH=1" in done.stderr
        assert "making a venv" not in done.stderr
    else:
        assert "making a venv failed" in done.stderr
        assert "driver is" not in done.stderr


@pytest.mark.parametrize(
    ("smi", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not'; exit 9", "(exit code 9): NVIDIA-SMI"),
        ("echo 'version mismatch' >&2; exit 18", "(exit code 18): version mismatch"),
        ("exit 12", "(exit code 12): it says nothing"),
        ("echo '[N/A]'", None),
        ("echo 'No devices were found'; exit 6", None),
    ],
)
def test_an_nvidia_smi_that_fails_is_told(set_up, smi, said):
    done = set_up("", "", smi=smi)
    assert "making a venv failed" in done.stderr  # it goes on
    assert ("WARNING: nvidia-smi fails" in done.stderr) == bool(said)
    assert (said or "") in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_torch_cannot_use_fails_the_self_check(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command(tmp_path, "nvidia-smi", "echo 'GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-1)'")
    with pytest.raises(RuntimeError, match="lists GPU 0: NVIDIA A100-SXM4-80GB, but torch"):
        selfcheck.selfcheck()
    command(tmp_path, "nvidia-smi", "echo 'Driver/library version mismatch'; exit 18")
    with pytest.raises(RuntimeError, match="nvidia-smi fails: Driver/library version mismatch"):
        selfcheck.selfcheck()
    command(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
    assert "NF4 works on the CPU" in selfcheck.selfcheck()


def test_the_self_checks_of_a_gpu_compare_with_torch():
    assert selfcheck.check_head(torch.device("cpu")) == ", Triton compiles"


def test_what_triton_needs_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "a C compiler" in missing_for_triton()
    command(tmp_path, "gcc", "")
    assert "a C compiler" not in missing_for_triton()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert missing_for_triton() == ["Python.h"]
    (tmp_path / "Python.h").touch()
    assert missing_for_triton() == []
    command(tmp_path, "gcc", "echo 'stdlib.h: No such file'; exit 1")
    assert "does not" in missing_for_triton()[0]
    monkeypatch.setenv("CC", str(tmp_path / "nowhere"))
    assert "nowhere does not" in missing_for_triton()[0]


def test_without_a_compiler_the_head_runs_in_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    gpu = torch.device("cuda")
    assert chunked_logprob._use_triton(gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert use_torch_head_without_compiler(torch.device("cpu")) is None
    assert chunked_logprob._use_triton(gpu)
    message = use_torch_head_without_compiler(gpu)
    assert "a C compiler" in message and "apt-get install" in message
    assert not chunked_logprob._use_triton(gpu)
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    targets = torch.tensor([1, 2, 3])
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 7)[0]
    exact = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(logps, exact, atol=1e-5)


@pytest.mark.parametrize(
    ("env", "devices"),
    [({}, "0"), ({"LOCAL_RANK": "1"}, "None"), ({"CUDA_VISIBLE_DEVICES": "3"}, "3")],
)
def test_one_process_takes_one_gpu(env, devices):
    code = "import os, scripts; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], **env},
    )  # fmt: skip
    assert done.stdout.strip() == devices


@pytest.mark.gpu
def test_on_a_gpu_the_self_check_launches_a_kernel():
    assert ", Triton compiles" in selfcheck.selfcheck()
