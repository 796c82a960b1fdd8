"""Write a checkpoint so that it is whole or not there, and find the newest whole one.

It is written aside, in `.writing/` of the run folder; a manifest with the size and the digest of
each file is added last; all is flushed to the disk; then one rename puts it in its place.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from scripts.base import write_whole

MANIFEST = "whole.json"
ASIDE = ".writing"
NAME = re.compile(r"checkpoint-([0-9]+)")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, identity: dict, resumable: bool = True) -> None:
    """Add the manifest: every file's size and digest, and which run it is of; `resumable` unless
    optimiser and scheduler are left out (`save_only_model`)."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    kept = {"run": identity, "resumable": resumable, "files": files}
    write_whole(folder / MANIFEST, json.dumps(kept, indent=1))


def manifest(folder: Path) -> dict:
    """What `seal` wrote; an empty mapping if that cannot be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found["files"], dict) and isinstance(found["run"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, in few words; None if it is whole.

    A file that is missing counts: transformers would go on without the optimiser's, from zero.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not NAME.fullmatch(folder.name):
        return "it is not named checkpoint-<step>, as it was written"
    kept = manifest(folder)
    if not kept:
        return f"it has no readable {MANIFEST}, which is written last"
    if not kept.get("resumable"):
        return "it keeps the weights only (save_only_model)"
    for name, (size, digest) in kept["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        if _digest(path) != digest:
            return f"{name} has other bytes than were written"
    if (state := folder / "trainer_state.json").is_file():
        step = json.loads(state.read_text()).get("global_step")
        if step != step_of(folder):
            return f"it is of step {step}, whatever its name says"
    return None


def step_of(folder: Path | str) -> int:
    """The optimiser step that a checkpoint's name tells."""
    return int(NAME.fullmatch(Path(folder).name).group(1))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, newest first."""
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if any, and a remark on each newer one that is not whole."""
    remarks = []
    for path in checkpoints(run_dir):
        wrong = damage(path)
        if wrong is None:
            return path, remarks
        remarks.append(f"{path} is not whole: {wrong}; it is passed over")
    return None, remarks


def rotate_checkpoints(run_dir: Path, limit: int | None, step: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, once that of `step` is in its place; `best` is
    kept. A folder with a later step, damaged or not this run's, neither counts nor goes: with
    transformers' own rotation the checkpoint just written went in its place."""
    if not limit or limit < 0:
        return
    own = [path for path in checkpoints(run_dir) if step_of(path) <= step]
    keep = own[:limit]
    if best and Path(best) in own and Path(best) not in keep:
        keep = [*own[: max(1, limit - 1)], Path(best)]
    for path in own:
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)
