"""Set-up says what is wrong with a GPU machine before it downloads anything; nvidia-smi and Python
are stand-ins on PATH, the script is the real one."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction, chunked_logprob

from scripts.base import ROOT
from scripts.sharing.compiler import missing_for_triton, use_torch_head_without_compiler


def command(folder, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def set_up(tmp_path):
    """Runs setup.sh in an empty project with an `nvidia-smi` and a Python that has torch for some
    CUDA; that Python makes no venv, so nothing is installed."""

    def run(smi: str | None, torch_cuda: str, **env) -> subprocess.CompletedProcess:
        project, tools = tmp_path / "project", tmp_path / "tools"
        for folder in (project / "scripts", tools):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "scripts" / "setup.sh", project / "scripts")
        answers = f'case "$*" in *torch*) echo {torch_cuda};; *--version*) echo Python 3.11;; '
        command(tools, "python3", f"{answers} *version_info*) exit 0;; *) exit 7;; esac")
        if smi is not None:
            command(tools, "nvidia-smi", smi)
        path = f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", project / "scripts" / "setup.sh"], capture_output=True, text=True,
            env={"PATH": path, "PYTHON": str(tools / "python3"), **env},
        )  # fmt: skip
        assert not (project / ".venv").exists()
        return done

    return run


@pytest.mark.parametrize(
    ("smi", "cuda", "env", "said"),
    [
        ("echo 570.172.08", "", {}, "needs 580 or newer"),
        ("echo 515.43", "12.6", {"SYSTEM_TORCH": "1"}, "needs 525 or newer"),
        ("echo 595.71.05", "", {}, ""),
        ("echo 570.172.08", "", {"SYSTEM_TORCH": "1"}, ""),  # a CPU build: the last check's to say
        ("echo 'NVIDIA-SMI has failed'; exit 9", "", {}, "(exit code 9): NVIDIA-SMI has failed"),
        ("echo 'No devices were found'; exit 6", "", {}, ""),
        (None, "", {}, ""),
    ],
)
def test_an_old_driver_stops_before_anything_is_made(set_up, smi, cuda, env, said):
    done = set_up(smi, cuda, **env)
    assert done.returncode == 1 and said in done.stderr
    # It stops there, or goes on to the venv, which the stand-in does not make.
    assert ("making a venv failed" in done.stderr) == ("or newer" not in said)
    assert bool(said) == ("driver is" in done.stderr or "WARNING: nvidia-smi" in done.stderr)


def checked(**env) -> subprocess.CompletedProcess:
    """The last step of set-up, on the environment that is here."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("there is no .venv here")
    return subprocess.run(
        ["bash", ROOT / "scripts" / "setup.sh", "--check"], capture_output=True, text=True,
        env=os.environ | env,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
@pytest.mark.parametrize(
    ("smi", "said"),
    [
        ("echo 'GPU 0: NVIDIA A100-SXM4-80GB'", "'GPU 0: NVIDIA A100-SXM4-80GB', but torch"),
        ("echo 'No devices were found'; exit 6", None),
    ],
)
def test_the_check_at_the_end_says_when_a_gpu_cannot_be_used(tmp_path, smi, said):
    command(tmp_path, "nvidia-smi", smi)
    done = checked(PATH=f"{tmp_path}:{os.environ['PATH']}")
    if said:
        assert done.returncode == 1 and said in done.stderr
        assert done.stderr.startswith("setup: check failed") and done.stderr.count("\n") == 1
    else:
        assert done.returncode == 0, done.stderr
        assert "NF4 works on the CPU" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu_the_check_launches_a_kernel():
    done = checked()
    assert done.returncode == 0, done.stderr
    assert "NF4 works on" in done.stdout and "WARNING" not in done.stdout


def test_the_torch_of_a_venv_is_used_and_its_triton_kept(tmp_path):
    """SYSTEM_TORCH=1 with an interpreter that is itself of a venv."""
    theirs, project = tmp_path / "theirs", tmp_path / "project"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", theirs], check=True)
    packages = next(theirs.glob("lib/python*/site-packages"))
    for name in ("torch", "triton"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("class cuda:\n    is_available = bool\n")
    (project / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", project / "scripts")
    (project / "requirements.txt").write_text("torch==1\n")
    (project / "requirements-dev.txt").write_text("triton==1\n-r requirements-chat.txt\n")
    (project / "requirements-chat.txt").write_text("pip\n")
    (project / "requirements.lock").write_text("torch==1\ntriton==1\n")
    done = subprocess.run(
        ["bash", project / "scripts" / "setup.sh", "--dev"], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": str(theirs / "bin" / "python"),
             "SYSTEM_TORCH": "1", "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert "transformers cannot be imported" in done.stdout, done.stderr  # pip had nothing to do
    code = "import torch, triton; print(torch.__file__, triton.__file__)"
    found = subprocess.run(
        [project / ".venv" / "bin" / "python", "-c", code], capture_output=True, text=True
    )
    assert found.stdout.count(str(packages)) == 2, found.stderr


def test_a_file_that_does_not_match_its_hash_is_not_installed(tmp_path):
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    (project / "scripts").mkdir(parents=True)
    wheels.mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", project / "scripts")
    wheel = wheels / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {
            "tiny.py": "",
            "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
            "tiny-1.0.dist-info/RECORD": "",
        }.items():
            archive.writestr(name, text)
    (project / "requirements.txt").write_text("tiny==1.0\n")
    (project / "requirements.lock").write_text("tiny==1.0\n")

    def set_up(digest: str, **env) -> str:
        hashes = f"tiny==1.0 \\\n    --hash=sha256:{digest}\n"
        (project / "requirements.hashes.txt").write_text(hashes)
        done = subprocess.run(
            ["bash", project / "scripts" / "setup.sh"], capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PIP_NO_INDEX": "1",
                 "PIP_FIND_LINKS": str(wheels), **env},
        )  # fmt: skip
        assert done.returncode == 1  # at the latest, because this project has no torch
        return done.stdout + done.stderr

    wrong, right = "0" * 64, hashlib.sha256(wheel.read_bytes()).hexdigest()
    said = set_up(wrong)
    assert "DO NOT MATCH THE HASHES" in said and "check failed" not in said
    assert not list(project.glob(".venv/lib/*/site-packages/tiny*"))
    assert "torch cannot be imported" in set_up(wrong, HASHES="0")
    assert "torch cannot be imported" in set_up(right)


def test_every_pin_of_the_hashes_is_the_locks():
    lock = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            lock.setdefault(line.split("==")[0], set()).add(line.split(" ; ")[0])
    text = (ROOT / "requirements.hashes.txt").read_text()
    pins = re.findall(r"^(\S+==\S+)", text, re.MULTILINE)
    assert pins and all(pin in lock[pin.split("==")[0]] for pin in pins)
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", text)[2:])
    direct = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = {line.split(" ")[0].lower() for line in direct if not line.startswith(("#", "torch"))}
    assert wanted <= set(pins)  # after a change of a pin: tests/lock_hashes.py


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


def test_a_token_in_a_tracked_file_is_found_and_not_printed(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "secrets", tmp_path / ".ci")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)

    def look() -> subprocess.CompletedProcess:
        subprocess.run([*git, "add", "."], check=True)
        return subprocess.run(["bash", tmp_path / ".ci/secrets"], capture_output=True, text=True)

    (tmp_path / "fine.txt").write_text("HF_TOKEN=hf_short, hf_transfer_of_a_model_with_long_name\n")
    assert look().returncode == 0
    for token in ("hf_" + "aB3" * 12, "ghp_" + "x9Y" * 12, "-----BEGIN " + "PRIVATE KEY-----"):
        (tmp_path / "token.txt").write_text(f"a\ntoken = {token}\n")
        done = look()
        assert done.returncode == 1 and "token.txt:2:" in done.stderr
        assert token not in done.stderr
