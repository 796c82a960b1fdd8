"""The run folder: one run at a time in it, what it says of it, and what becomes of old ones."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from scripts.base import ROOT, RecipeError, local_path, write_whole
from scripts.checkpoints import (
    HELD_BY_PARENT,
    checkpoints,
    differences,
    explained,
    marker,
    newest_whole,
    refuse_another,
    run_settings,
)
from scripts.config import Config
from scripts.hub import dataset_commit
from scripts.pairs.provenance import weights_state

FINISHED = ("adapter", "model", "evaluation.json")  # one of them: training was through
ALONG = (
    "merged", "gguf", "serve", "hub", "replies.jsonl", "metrics.jsonl", "memory.csv", "figures",
    "config.yaml", "environment.json", "origins.json", "failed_batch.json", "dropped_rows.jsonl",
    "data_check",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
# The headless command holds the first, the kernel that it starts the second. Killing the command
# alone thus leaves the folder locked until its kernel, too, is gone.
OUTER, INNER = ".run.lock", ".kernel.lock"
_held: dict[Path, FileLock] = {}  # until this process ends; a notebook's kernel keeps them


def hold(run_dir: Path) -> None:
    """Keep every other run out of `run_dir` until this process ends; again is the same as once.

    Raises:
        RecipeError: another process runs there, or the folder takes no lock.
    """
    folder = run_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    inside = os.environ.get(HELD_BY_PARENT) == str(folder)
    mine = folder / (INNER if inside else OUTER)
    if mine in _held:
        return
    lock = FileLock(mine, timeout=0)
    try:
        lock.acquire()
        if not inside:  # a kernel that outlives its command
            with FileLock(folder / INNER, timeout=0):
                pass
    except Timeout:
        lock.release()
        raise RecipeError(
            f"{run_dir} is in use by another process; wait for it, end it (a notebook's kernel "
            "keeps the folder until it is shut down), or give another --output-dir"
        ) from None
    except (OSError, NotImplementedError) as error:  # not every network's file system has locks
        raise RecipeError(
            f"{mine} cannot be locked ({error}); remove it, or give an --output-dir on another disk"
        ) from None
    _held[mine] = lock


def describe_machine() -> dict[str, str]:
    """Library versions, device and commit: what a reader needs to make sense of the numbers."""
    facts = {name: version(name) for name in PACKAGES}
    facts["python"] = platform.python_version()
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    else:
        facts["device"] = f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        told = ""
    facts["commit"] = told or "not a git checkout"
    return facts


# ---- what an earlier run left ----


def set_aside_results(run_dir: Path, more: tuple[str, ...] = ()) -> Path | None:
    """Move what an earlier run left in the folder, checkpoints included, to `earlier/`, or to
    `earlier-2/` and so on; nothing is deleted. Else a run that is killed would leave the old
    adapter beside the new config, to be evaluated as its own.

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
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    if not path.exists():
        return path
    number = next(n for n in count(2) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")


def settle(cfg: Config, *, resume: bool = False, overwrite: bool = False) -> None:
    """Before a command runs: take the run folder, and decide what to do with what lies in it.

    A run that was stopped is resumed: `resume_from_checkpoint` becomes its newest whole checkpoint.
    A finished one is only completed (evaluation, merge), with `resume`. `overwrite` sets it aside.

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
            "--resume, which does what is left (evaluation, merge)"
        )
    if cfg.dpo.resume_from_checkpoint:
        return
    if last := _newest(cfg.run_dir):
        # Asked for by name, it may have moved with its model and data: the trainer compares these.
        refuse_another(last, {"config": _settings(cfg, last)}, may_have_moved=resume)
        _resume_from(last, cfg)
        print(f"going on from {last}")
    elif finished:
        raise RecipeError(
            f"--resume: training has finished in {cfg.run_dir} and left no whole checkpoint; "
            f"scripts.evaluate and scripts.export do the rest, --config {cfg.run_dir}/config.yaml"
        )
    elif resume:
        raise RecipeError(
            f"--resume: no whole checkpoint in {cfg.run_dir}; leave --resume out, and set "
            "save_strategy: steps and save_steps to keep some"
        )


def start_run(cfg: Config) -> dict[str, str]:
    """Take the run folder, and write the resolved config and the machine's description into it.

    In a notebook, which has no options: an interrupted run of the same config goes on, and whatever
    else an earlier run left is set aside; a line says which.
    """
    facts = describe_machine()
    if not cfg.is_main_process:
        return facts
    if cfg.slow:
        print(f"This CPU computes bfloat16 slowly: the run uses float32 ({', '.join(cfg.slow)})")
    with explained(cfg.run_dir, "making the run folder"):
        hold(cfg.run_dir)
        if not cfg.dpo.resume_from_checkpoint and not cfg.started:  # a cell may run again
            _resume_or_set_aside(cfg)
        cfg.started = True
        cfg.save(cfg.run_dir / "config.yaml")
        write_whole(cfg.run_dir / "environment.json", json.dumps(facts, indent=2))
    return facts


def _resume_or_set_aside(cfg: Config) -> None:
    last = None
    if not any((cfg.run_dir / name).exists() for name in FINISHED):
        last = _newest(cfg.run_dir)
    if last and not differences(marker(last)["run"], {"config": _settings(cfg, last)}):
        _resume_from(last, cfg)
        print(f"The run that was stopped here goes on from {last}")
    elif aside := set_aside_results(cfg.run_dir):
        print(f"What the earlier run left is in {aside}")


def _settings(cfg: Config, checkpoint: Path) -> dict:
    """The settings of `cfg`; a `max_length` that is open is the one of `checkpoint`, whose run
    chose it from the same data, or turns out later to be another's."""
    values = run_settings(cfg)
    if cfg.length_is_open:
        theirs = marker(checkpoint)["run"].get("config", {})
        values["max_length"] = theirs.get("max_length", values["max_length"])
    return values


def _resume_from(checkpoint: Path, cfg: Config) -> None:
    if cfg.length_is_open:
        cfg.settle_max_length(_settings(cfg, checkpoint)["max_length"])
    cfg.dpo.resume_from_checkpoint = str(checkpoint)


def _newest(run_dir: Path) -> Path | None:
    last, remarks = newest_whole(run_dir)
    for remark in remarks:
        print(remark)
    return last


# ---- which model and which data a run had ----


def record_origin(cfg: Config, what: str, facts: dict[str, str | None]) -> None:
    """Note the `facts` on `what` (`model` or `dataset`) in `origins.json`, once there is a run.

    A commit of the hub also goes into the run's config, so that `--config <run>/config.yaml` takes
    that very commit again. What a run was trained with stays, even if its evaluation is repeated
    with something else.
    """
    known = read_origins(cfg.run_dir)
    trained = any((cfg.run_dir / name).is_dir() for name in ("adapter", "model"))
    begun = (cfg.run_dir / "config.yaml").is_file()
    if not cfg.is_main_process or not begun or (trained and what in known):
        return
    write_whole(cfg.run_dir / "origins.json", json.dumps(known | {what: facts}, indent=2) + "\n")
    if facts["commit"]:
        cfg.pin(f"{what}_revision", facts["commit"])


def read_origins(run_dir: Path) -> dict[str, dict]:
    """What `record_origin` noted of a run; nothing where it noted nothing, or that is damaged."""
    try:
        found = dict(json.loads((run_dir / "origins.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    return {what: facts for what, facts in found.items() if isinstance(facts, dict)}


def model_origin(name: str, path: str, commit: str) -> dict[str, str | None]:
    """The model `name`, loaded from `path`: its commit on the hub, or the digest of the folder."""
    if Path(path).is_dir():
        return {"name": name, "commit": None, "content": weights_state(path)}
    return {"name": name, "commit": commit, "content": None}


def dataset_origin(cfg: Config) -> dict[str, str | None]:
    """The dataset that `cfg` names: its commit on the hub, or a digest of the file or folder."""
    name = cfg.script.dataset_name
    if name.lower().startswith(("http://", "https://")):
        return {"name": name, "commit": None, "content": None}
    if (local := local_path(name)) is None:
        commit = dataset_commit(name, cfg.recipe.dataset_revision)
        return {"name": name, "commit": commit, "content": None}
    content = hashlib.sha256()
    for file in sorted(local.rglob("*")) if local.is_dir() else [local]:
        if file.is_file():
            content.update(file.name.encode())
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
    return {"name": name, "commit": None, "content": content.hexdigest()[:16]}
