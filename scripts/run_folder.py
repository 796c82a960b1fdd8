"""What the run folder says about the run: its config, the machine and the versions."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch

from scripts.base import ROOT, RecipeError, write_whole
from scripts.checkpoints.identity import differences, refuse_another, settings
from scripts.checkpoints.lock import hold
from scripts.checkpoints.store import checkpoints, manifest, newest_whole
from scripts.checkpoints.trouble import told
from scripts.config import Config

FINISHED = ("adapter", "model", "evaluation.json")  # one of them: training was through
ALONG = (
    "merged", "replies.jsonl", "metrics.jsonl", "memory.csv", "figures", "config.yaml",
    "environment.json", "origins.json", "failed_batch.json", "dropped_rows.jsonl", "data_check",
)  # fmt: skip
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


def set_aside_results(run_dir: Path, more: tuple[str, ...] = ()) -> Path | None:
    """Move what an earlier run left in the folder, checkpoints included, to `earlier/`, or to
    `earlier-2/` and so on; nothing is deleted.

    Else a run that is killed would leave the old adapter beside the new config, to be evaluated as
    its own.

    Returns:
        Where it is now; None if there was nothing.
    """
    found = [run_dir / name for name in FINISHED if (run_dir / name).exists()]
    found += checkpoints(run_dir)
    if not found:
        return None
    target = free_name(run_dir / "earlier")
    target.mkdir()
    for path in [*found, *(run_dir / name for name in (*ALONG, *more))]:
        if path.exists():
            path.rename(target / path.name)
    return target


def free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that nothing stands at."""
    if not path.exists():
        return path
    number = next(n for n in count(2) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")


def settle(cfg: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """Before a command runs: take the run folder, and decide what to do with what lies in it.

    A run that was stopped is gone on with: `resume_from_checkpoint` becomes its newest whole
    checkpoint. A finished one is only gone on with (nothing is trained anew) with `resume`. With
    `overwrite` either is set aside.

    Raises:
        RecipeError: another process uses the folder; it holds a finished run, or another run's
            checkpoints, and neither option says what to do; or there is nothing to resume.
    """
    hold(cfg.run_dir)
    if overwrite:
        if aside := set_aside_results(cfg.run_dir, ("notebook.ipynb",)):
            print(f"What the earlier run left is in {aside}")
        return
    finished = [name for name in FINISHED if (cfg.run_dir / name).exists()]
    if finished and not (resume or cfg.dpo.resume_from_checkpoint):
        raise RecipeError(
            f"{cfg.run_dir} holds a finished run ({', '.join(finished)}): take another folder, "
            f"--output-dir {free_name(cfg.run_dir)}; or --overwrite, which sets it aside; or "
            "--resume, which trains nothing anew and does what is left (evaluation, merge)"
        )
    if cfg.dpo.resume_from_checkpoint:
        return
    last = _newest(cfg.run_dir)
    if last:
        # Asked for by name, it may have moved with its model and data: the trainer compares these.
        refuse_another(last, {"config": _settings(cfg, last)}, may_have_moved=resume)
        _go_on_from(last, cfg)
        print(f"going on from {last}")
    elif finished:
        raise RecipeError(
            f"--resume: training is through in {cfg.run_dir} and left no whole checkpoint; what is "
            f"left do scripts.evaluate and scripts.export, --config {cfg.run_dir}/config.yaml"
        )
    elif resume:
        raise RecipeError(
            f"--resume: no whole checkpoint in {cfg.run_dir}; leave --resume out, and to keep some "
            "set save_strategy: steps and save_steps"
        )


def _settings(cfg: Config, checkpoint: Path) -> dict:
    """`identity.settings` of `cfg`; a `max_length` that is open is the one of `checkpoint`, whose
    run chose it from the same data, or is found out later to be another's."""
    values = settings(cfg)
    if cfg.length_is_open:
        theirs = manifest(checkpoint)["run"].get("config", {})
        values["max_length"] = theirs.get("max_length", values["max_length"])
    return values


def _go_on_from(checkpoint: Path, cfg: Config) -> None:
    if cfg.length_is_open:
        cfg.settle_max_length(_settings(cfg, checkpoint)["max_length"])
    cfg.dpo.resume_from_checkpoint = str(checkpoint)


def _newest(run_dir: Path) -> Path | None:
    last, remarks = newest_whole(run_dir)
    for remark in remarks:
        print(remark)
    return last


def start_run(cfg: Config) -> dict[str, str]:
    """Take the run folder, and write the resolved config and the machine's description into it.

    In a notebook, which has no options: an interrupted run of the same config is gone on with, and
    whatever else an earlier run left is set aside; a line says which.
    """
    facts = describe_machine()
    if not cfg.is_main_process:
        return facts
    with told(cfg.run_dir, "making the run folder"):
        hold(cfg.run_dir)
        if not cfg.dpo.resume_from_checkpoint:
            _go_on_or_set_aside(cfg)
        cfg.save(cfg.run_dir / "config.yaml")
        write_whole(cfg.run_dir / "environment.json", json.dumps(facts, indent=2))
    return facts


def _go_on_or_set_aside(cfg: Config) -> None:
    last = None
    if not any((cfg.run_dir / name).exists() for name in FINISHED):
        last = _newest(cfg.run_dir)
    if last and not differences(manifest(last)["run"], {"config": _settings(cfg, last)}):
        _go_on_from(last, cfg)
        print(f"The run that was stopped here goes on from {last}")
    elif aside := set_aside_results(cfg.run_dir):
        print(f"What the earlier run left is in {aside}")
