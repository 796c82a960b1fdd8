"""Weights & Biases: online with a key, offline without one, and never a reason to lose a run."""

from __future__ import annotations

import os
from netrc import NetrcParseError, netrc
from urllib.parse import urlparse

import wandb

from scripts.config import Config

INIT_TIMEOUT = 60  # seconds W&B has to answer before the run goes on offline


def has_wandb_key() -> bool:
    """Whether W&B has a key to use: `WANDB_API_KEY`, or an earlier `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc().authenticators(host or "") is not None
    except (FileNotFoundError, NetrcParseError):
        return False


def start_wandb(cfg: Config) -> str:
    """Open the W&B run that the trainer logs to, and return one sentence that says where it is.

    Without `wandb` in `report_to` nothing is opened. Without a key, or when W&B refuses the key or
    does not answer, the run is kept offline in the run folder, from where `wandb sync` sends it.
    """
    if "wandb" not in cfg.dpo.report_to:
        return "W&B is off (report_to does not name it)."
    if not cfg.is_main_process:
        return "W&B: the first process's."
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    wanted = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    why = "no key: set WANDB_API_KEY to watch it live"
    if wanted == "online":
        try:
            return f"W&B: {_init(cfg, 'online').url}"
        except Exception as error:  # refused key, no answer, bad gateway: the training matters more
            why = f"W&B could not be reached or refused: {str(error).splitlines()[0]}"
            wandb.teardown()
    if wanted == "disabled":
        return "W&B is off (WANDB_MODE=disabled)."
    _init(cfg, "offline")
    return f"W&B offline ({why}); later: wandb sync {cfg.run_dir}/wandb/offline-run-*"


def _init(cfg: Config, mode: str) -> wandb.Run:
    return wandb.init(
        project=cfg.recipe.wandb_project,
        name=cfg.dpo.run_name or cfg.run_dir.name,
        dir=cfg.run_dir,
        mode=mode,
        config=cfg.given,
        settings=wandb.Settings(init_timeout=INIT_TIMEOUT, silent=True, console="off"),
    )


def finish_wandb() -> None:
    """Close the W&B run, if one is open."""
    if wandb.run is not None:
        wandb.finish()
