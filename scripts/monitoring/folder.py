"""What the run folder says about the run: its config, the machine and the versions."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from scripts.cli import ROOT
from scripts.config import Config

RESULTS = ("adapter", "model", "evaluation.json", "replies.jsonl")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def describe_machine() -> dict[str, str]:
    """Library versions, device and commit: what a reader needs to make sense of the numbers."""
    facts = {name: version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts["device"] = f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    facts["commit"] = commit.stdout.strip() or "not a git checkout"
    return facts


def set_aside_results(run_dir: Path) -> None:
    """Move what an earlier run left in the folder to `earlier/`, one run deep.

    Else a run that is killed would leave the old adapter beside the new config, to be evaluated as
    its own.
    """
    found = [run_dir / name for name in RESULTS if (run_dir / name).exists()]
    if found:
        shutil.rmtree(run_dir / "earlier", ignore_errors=True)
        (run_dir / "earlier").mkdir()
        for path in [*found, run_dir / "config.yaml"]:
            if path.exists():
                path.rename(run_dir / "earlier" / path.name)


def start_run(cfg: Config) -> dict[str, str]:
    """Make the run folder with the resolved config and the machine's description in it."""
    facts = describe_machine()
    if not cfg.is_main_process:
        return facts
    if not cfg.dpo.resume_from_checkpoint:
        set_aside_results(cfg.run_dir)
    cfg.save(cfg.run_dir / "config.yaml")
    (cfg.run_dir / "environment.json").write_text(json.dumps(facts, indent=2))
    return facts
