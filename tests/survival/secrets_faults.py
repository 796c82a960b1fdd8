"""Secrets: a run with canary tokens in the environment leaves none in a file or in its output.

The tokens stand where a user has them. A server on loopback plays the hub and W&B, which know no
token, so that the run goes on offline with the W&B key at hand.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import yaml

from scripts.base import ROOT
from tests.loopback import Quiet, serving
from tests.survival import tiny

AREA = "secrets"
CANARIES = {
    "HF_TOKEN": "hf_CANARYhfCANARYhfCANARYhfCANARY01",
    "WANDB_API_KEY": "CANARYwandb" + "a1b2c3d4e" * 3 + "77",
    "OPENAI_API_KEY": "sk-CANARYopenaiCANARYopenai01",
    "JUPYTER_TOKEN": "CANARYjupyterCANARY01",
}


@contextmanager
def refusing() -> Iterator[str]:
    """The address of a server that knows no key, whatever is asked of it."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

    with serving(Handler) as address:
        yield address


def environment(folder: Path, url: str) -> dict[str, str]:
    """That of this process, with the canaries, all caches and homes in `folder`, and hub and W&B at
    `url`."""
    home = folder / "home"
    home.mkdir()
    places = {"HOME": home, "HF_HOME": home / "hf", "XDG_CACHE_HOME": home / "cache",
              "WANDB_DIR": home / "wandb", "WANDB_CACHE_DIR": home / "wandb-cache",
              "WANDB_CONFIG_DIR": home / "wandb-config", "TMPDIR": home,
              "IPYTHONDIR": home / "ipython", "JUPYTER_RUNTIME_DIR": home / "jupyter"}  # fmt: skip
    more = {"WANDB_BASE_URL": url, "HF_ENDPOINT": url, "HF_HUB_VERBOSITY": "debug"}
    return os.environ | {k: str(v) for k, v in places.items()} | more | CANARIES


def leaks(folder: Path, output: str) -> list[str]:
    """Where a canary, or its first sixteen characters, can be read."""
    found = []
    for name, canary in CANARIES.items():
        begin = canary[:16].encode()
        for path in folder.rglob("*"):
            if path.is_file() and begin in path.read_bytes():
                found.append(f"{name} in {path.relative_to(folder)}")
        found += [f"{name} in the output"] * (begin.decode() in output)
    return found


def _run(module: str, code: int, said: str, **values) -> None:
    """A run ends as it should, says what it should, and shows no canary anywhere."""
    folder = tiny.scratch("secrets")
    settings = tiny.SETTINGS | {
        "model_name_or_path": str(tiny.model()), "dataset_name": str(tiny.pairs()),
        "output_dir": str(folder / "run"), "use_cpu": True, "use_peft": True, "max_steps": 2,
        "lora_target_modules": ["q_proj", "v_proj"], "report_to": "wandb", "max_new_tokens": 4,
        "save_strategy": "no",
    }  # fmt: skip
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings | values))
    with refusing() as url:
        done = subprocess.run(
            [sys.executable, "-m", module, "--config", str(config)], cwd=ROOT, text=True,
            env=environment(folder, url), capture_output=True, timeout=560,
        )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}: {output[-600:]}"
    assert said in output, output[-600:]
    found = leaks(folder, output)
    assert not found, "; ".join(found)


def _a_leak_is_found() -> None:
    """The search itself finds a canary in a file and in the output."""
    folder, canary = tiny.scratch("leak"), CANARIES["HF_TOKEN"]
    (folder / "deep").mkdir()
    (folder / "deep" / "log.bin").write_bytes(b"\0\1" + canary.encode() + b"\2")
    found = leaks(folder, f"token={canary}")
    assert len(found) == 2, found


def faults() -> Iterable[tuple[str, Callable[[], None]]]:
    """Each run by its name; the callable raises `AssertionError` where a secret is shown."""
    yield "the search finds a leak", _a_leak_is_found
    yield "training", partial(_run, "scripts.training", 0, "saved:")
    other = {"model_name_or_path": "some/model"}
    yield "training, no such model", partial(_run, "scripts.training", 1, "error:", **other)
    yield "notebook", partial(_run, "scripts.run", 0, "Done in")
