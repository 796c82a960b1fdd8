"""Execute the notebook headless with papermill, and print what came of it.

    python -m scripts.run --config configs/smollm2-135m-cpu.yaml --set beta=0.2

The executed notebook goes into the run folder as `notebook.ipynb`; when a cell fails it is written
all the same, with the error at its top. `--resume` goes on from the run's last checkpoint.

Exit codes: 0, all cells ran; 1, a cell failed or the config has a mistake; 2, no such option.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("run")  # before the libraries load, so that --help is answered at once

import argparse
import json
import logging
import sys
import time

import nbformat
import papermill
from nbformat.v4 import new_markdown_cell
from papermill.exceptions import PapermillExecutionError
from transformers.trainer_utils import get_last_checkpoint

from scripts.adapter import trained_folder
from scripts.config import ROOT, Config, RecipeError, config_from_args, parse_overrides
from scripts.evaluate import evaluation_table

NOTEBOOK = ROOT / "notebooks" / "llama3_dpo.ipynb"


def execute(cfg: Config, config: str, overrides: dict) -> None:
    """Run the notebook for `cfg`, its output passed on as it comes.

    Raises:
        PapermillExecutionError: a cell failed.
    """
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    # papermill passes the notebook's own output on through this logger; its line per cell as well.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    for noisy in ("httpx", "httpx2", "papermill.translators"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    papermill.execute_notebook(
        str(NOTEBOOK),
        str(cfg.run_dir / "notebook.ipynb"),
        parameters={
            "config": config,
            "overrides": overrides,
            "output_dir": str(cfg.run_dir.resolve()),
        },
        cwd=str(ROOT),
        kernel_name="python3",
        log_output=True,
        progress_bar=False,
    )


def put_error_on_top(cfg: Config, error: PapermillExecutionError) -> None:
    """Begin the saved notebook with what went wrong, in which cell, and what to do next."""
    path = cfg.run_dir / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(
        0,
        new_markdown_cell(
            f"## The run failed in cell {error.exec_count}\n\n"
            f"```\n{error.ename}: {error.evalue}\n```\n\n"
            "What ran before it is below. Mend it and run the same command again; with `--resume` "
            "training goes on from its last checkpoint, if the config keeps any (`save_strategy`)."
        ),
    )
    nbformat.write(notebook, path)


def checkpoint(cfg: Config) -> str:
    """The run's last checkpoint.

    Raises:
        RecipeError: there is none to go on from.
    """
    last = get_last_checkpoint(cfg.run_dir) if cfg.run_dir.is_dir() else None
    if last is None:
        raise RecipeError(
            f"--resume: no checkpoint in {cfg.run_dir}; leave --resume out, and to keep some set "
            "save_strategy: steps and save_steps"
        )
    return last


def summary(cfg: Config) -> str:
    """Where the run's results are, and its before/after table."""
    figures = json.loads((cfg.run_dir / "evaluation.json").read_text())
    trained = trained_folder(cfg)
    places = {
        "executed notebook": "notebook.ipynb",
        "figures": "figures/",
        "evaluation": "evaluation.json",
        "both models' replies": "replies.jsonl",
        trained.name: f"{trained.name}/",
        "merged model": "merged/",
        "step log": "metrics.jsonl",
        "resolved config": "config.yaml",
    }
    lines = [f"  {name:<22}{cfg.run_dir / place}" for name, place in places.items()]
    aims = [f"  {name}: {verdict}" for name, verdict in figures["targets"].items()]
    table = evaluation_table(figures).to_string()
    head = f"Before and after on {figures['prompts']} held-out prompts (95% intervals):"
    return "\n".join(["", "The run's results:", *lines, "", head, table, "", "Aims:", *aims])


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)  # mistakes show before a kernel starts
    overrides = parse_overrides(args.overrides)
    if args.resume:
        overrides["resume_from_checkpoint"] = checkpoint(cfg)
        print(f"going on from {overrides['resume_from_checkpoint']}")
    start = time.monotonic()
    try:
        execute(cfg, args.config, overrides)
    except PapermillExecutionError as error:
        put_error_on_top(cfg, error)
        print(f"\nThe notebook failed in cell {error.exec_count}: {error.ename}: {error.evalue}")
        sys.exit(f"Its output so far, the error at the top: {cfg.run_dir / 'notebook.ipynb'}")
    print(summary(cfg))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    cli.command(main, ARGS)
