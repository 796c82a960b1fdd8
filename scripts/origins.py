"""Which model and which data a run had, by commit or content: `origins.json` in the run folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from scripts.config import Config
from scripts.hub import dataset_commit
from scripts.pairs.download import is_url
from scripts.pairs.provenance import weights_state
from scripts.pairs.sources import local_path


def record_origin(cfg: Config, what: str, facts: dict[str, str | None]) -> None:
    """Note the `facts` on `what` (`model` or `dataset`) in the run folder, once there is a run.

    What a run was trained with stays, even if its evaluation is repeated with something else.
    """
    path = cfg.run_dir / "origins.json"
    trained = any((cfg.run_dir / name).is_dir() for name in ("adapter", "model"))
    begun = (cfg.run_dir / "config.yaml").is_file()
    if not cfg.is_main_process or not begun or (trained and what in read_origins(cfg.run_dir)):
        return
    known = read_origins(cfg.run_dir) | {what: facts}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(known, indent=2) + "\n")
    os.replace(partial, path)


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
    local = local_path(name)
    if is_url(name):
        return {"name": name, "commit": None, "content": None}
    if local is None:
        commit = dataset_commit(name, cfg.recipe.dataset_revision)
        return {"name": name, "commit": commit, "content": None}
    content = hashlib.sha256()
    for file in sorted(local.rglob("*")) if local.is_dir() else [local]:
        if file.is_file():
            content.update(file.name.encode())
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
    return {"name": name, "commit": None, "content": content.hexdigest()[:16]}
