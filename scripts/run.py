"""Execute the notebook headless with papermill, and print the results.

    python -m scripts.run --config configs/smollm2-135m-cpu.yaml --set beta=0.2

The executed notebook goes into the run folder as `notebook.ipynb`; when a cell fails it is written
all the same, with the error at its top. The same command goes on with a run that was stopped; in
the folder of a finished one it asks for `--resume`, `--overwrite` or another folder.

Exit codes: 0, all cells ran; 1, a cell failed or the kernel was killed; 2, config, path or option
have a mistake; 75, stopped by SIGTERM or SIGHUP, a checkpoint is kept; 130, the same by Ctrl-C.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("run")

import argparse
import json
import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_markdown_cell
from papermill.exceptions import PapermillExecutionError

from scripts.adapter import trained_folder
from scripts.base import CTRL_C, ROOT, STOPPED
from scripts.checkpoints import HELD_BY_PARENT, newest_whole
from scripts.config import Config, config_from_args, parse_overrides
from scripts.headless import ENGINE, section
from scripts.memory import GB
from scripts.run_folder import settle
from scripts.tables import evaluation_table

NOTEBOOK = ROOT / "notebooks" / "llama3_dpo.ipynb"
CLEAR = ("TrainingError", "Stopped")  # errors that say themselves what is kept


def execute(cfg: Config, config: str, overrides: dict) -> None:
    """Run the notebook for `cfg`, its output passed on as it comes.

    Raises:
        PapermillExecutionError: a cell failed.
    """
    os.environ[HELD_BY_PARENT] = str(cfg.run_dir.resolve())  # the kernel runs in our folder
    # The client below passes the notebook's own output on; papermill's line per cell says nothing.
    logging.getLogger("papermill").setLevel(logging.WARNING)
    papermill.execute_notebook(
        str(NOTEBOOK),
        str(cfg.run_dir / "notebook.ipynb"),
        parameters={
            "config": config,
            "overrides": overrides,
            "output_dir": str(cfg.run_dir.resolve()),
        },
        cwd=str(ROOT),
        engine_name=ENGINE,
        kernel_name="python3",
        progress_bar=False,
    )


def place(notebook: Path, number: int) -> str:
    """The code cell `number` of a saved notebook, and the section that it stands in."""
    cells = nbformat.read(notebook, as_version=4).cells
    at = next(i for i, cell in enumerate(cells) if cell.get("execution_count") == number)
    return f"cell {number} ({section(cells, at)})"


def put_on_top(cfg: Config, head: str, text: str) -> None:
    """Begin the saved notebook with what went wrong, and what to do next."""
    path = cfg.run_dir / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, new_markdown_cell(f"## {head}\n\n```\n{text}\n```\n"))
    nbformat.write(notebook, path)


def kept(cfg: Config) -> str:
    """What of the training is kept, and how to go on."""
    if trained_folder(cfg).is_dir():
        return f"The training is kept in {trained_folder(cfg)}: --resume does what is left"
    last, remarks = newest_whole(cfg.run_dir)
    if last is None:
        return "; ".join(["No checkpoint is kept: the same command begins again", *remarks])
    return f"Kept: {last}: the same command goes on from there"


def kernel_died(cfg: Config) -> str:
    """What the death of the notebook's kernel means: nearly always a kill for lack of memory."""
    gb = psutil.virtual_memory()
    return (
        "The notebook's kernel was killed from outside, as the system does when memory runs "
        f"short. This machine has {gb.total / GB:.1f} GB, of which {gb.available / GB:.1f} are "
        "free now; `python -m scripts.plan` says how much the run needs and what to change. "
        f"{kept(cfg)}."
    )


class Signals:
    """Hands SIGTERM, SIGHUP and Ctrl-C on to the notebook's kernel, which keeps a checkpoint and
    stops; a second SIGTERM or Ctrl-C ends it at once.

    A kernel is no member of the terminal's group of processes, so it gets neither by itself.
    """

    def __init__(self) -> None:
        self.got: int | None = None
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, self._hand_on)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under `nohup`
            signal.signal(signal.SIGHUP, self._hand_on)

    def _hand_on(self, signum: int, frame) -> None:
        # A terminal that goes may send SIGHUP twice: as its system, and as its shell.
        again, self.got = self.got == signum != signal.SIGHUP, signum
        kernels = [p for p in psutil.Process().children() if "ipykernel_launcher" in p.cmdline()]
        for kernel in kernels:
            kernel.send_signal(signal.SIGKILL if again else signum)
        if not kernels:
            raise KeyboardInterrupt

    @property
    def name(self) -> str:
        return "Ctrl-C" if self.got == signal.SIGINT else signal.Signals(self.got).name

    def end(self, message: str) -> None:
        """End the command with the code that tells a stop from a failure."""
        with suppress(OSError):  # the terminal may have gone
            print(f"\n{message}", file=sys.stderr)
        sys.exit(CTRL_C if self.got == signal.SIGINT else STOPPED)


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
    settle(cfg, resume=args.resume, overwrite=args.overwrite)
    if cfg.dpo.resume_from_checkpoint:
        overrides["resume_from_checkpoint"] = cfg.dpo.resume_from_checkpoint
    start, signals = time.monotonic(), Signals()
    notebook = cfg.run_dir / "notebook.ipynb"
    try:
        execute(cfg, args.config, overrides)
    except KeyboardInterrupt:
        signals.end(f"stopped by {signals.name} before the notebook ran. {kept(cfg)}")
    except PapermillExecutionError as error:
        said = error.evalue if error.ename != "KeyboardInterrupt" else f"by Ctrl-C. {kept(cfg)}"
        where = place(notebook, error.exec_count)
        if signals.got:
            put_on_top(cfg, f"The run was stopped in {where}", said)
            signals.end(said if error.ename == "Stopped" else f"stopped: {said}")
        helps = "" if error.ename in CLEAR else f"\n{kept(cfg)}."
        put_on_top(cfg, f"The run failed in {where}", f"{error.ename}: {said}{helps}")
        print(f"\nThe notebook failed in {where}: {error.ename}: {said}{helps}")
        sys.exit(f"Its output so far, the error at the top: {notebook}")
    except RuntimeError as error:
        # What a kernel that dies gives: the second while it starts.
        if not isinstance(error, DeadKernelError) and "died" not in str(error):
            raise
        if signals.got:
            said = f"stopped by {signals.name}, not in the training. {kept(cfg)}"
            if notebook.exists():
                put_on_top(cfg, "The run was stopped", said)
            signals.end(said)
        if not notebook.exists():
            raise
        said = kernel_died(cfg)
        put_on_top(cfg, "The kernel was killed", said)
        sys.exit(f"\nerror: {said}\nIts output so far, with this at the top: {notebook}")
    print(summary(cfg))
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")
