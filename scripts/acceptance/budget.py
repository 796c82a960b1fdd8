"""Programs that may only take so long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.base import ROOT, RecipeError


class PartError(RecipeError):
    """A part did not come to its end; the message is one line."""


class Budget:
    """Seconds that all parts share."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def run(self, arguments: list[str], log: Path, most: float = 3600, codes=(0,)) -> str:
        """Run `python arguments` from the project's root, and return what it printed.

        Its output goes to `log` as it comes, so that what a killed program said is kept.

        Raises:
            PartError: it took longer than `most` or what is left (it and all that it started are
                then stopped), or ended with an exit code that is not in `codes`.
        """
        limit = min(most, self.left())
        if limit < 1:
            raise PartError("not begun: the time was used up")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                raise PartError(f"stopped after {limit:.0f} s; its output: {log.name}") from None
            finally:
                if process.poll() is None:  # also when this program is interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        said = log.read_text(errors="replace")
        if code not in codes:
            last = (said.strip().splitlines() or ["no output"])[-1]
            raise PartError(f"exit code {code}: {last[:200]} (more in {log.name})")
        return said
