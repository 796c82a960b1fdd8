"""The log of a run, step by step: a file, a line, and a figure under the running cell."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from scripts.base import in_notebook, write_whole
from scripts.progress import Progress


class RunLog(TrainerCallback):
    """Write every log to `metrics.jsonl`, tell it in one line, and redraw the live figure.

    In a notebook line and figure stand under the running cell and are updated in place; elsewhere
    each log is printed as a line.
    """

    def __init__(self, path: Path, redraws: int = 12) -> None:
        self.path = path
        self.redraws = redraws
        self._figure = self._bar = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # transformers takes the intervals that a checkpoint holds; the config's hold.
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            # A resumed run takes the log that its checkpoint holds: the file may have later steps,
            # half a line, or none. The summaries of earlier endings are left out.
            rows = [log for log in state.log_history if "train_runtime" not in log]
            lines = [json.dumps({"step": log["step"], **log}) + "\n" for log in rows]
            write_whole(self.path, "".join(lines))
        self._began, self._first = time.monotonic(), state.global_step
        self._figure, self._scored, self._last = None, 0, "the first step is on its way"
        self._bar = Progress(state.max_steps)
        if state.is_world_process_zero:
            self._tell(state, self._last, line=False)

    def _tell(self, state, text: str, *, line: bool) -> None:
        step = f"step {state.global_step:>4}/{state.max_steps}"
        self._bar.show(state.global_step, f"{step}  {text}", line)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs) -> None:
        if state.is_world_process_zero and self._bar:
            self._scored += 1
            self._tell(state, f"held-out batches scored: {self._scored}", line=False)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._scored = 0
        if state.is_world_process_zero and self._bar:
            self._tell(state, self._last, line=False)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" not in logs:
            return
        steps = state.global_step - self._first
        pace = (time.monotonic() - self._began) / max(steps, 1)
        left = pace * (state.max_steps - state.global_step) / 60
        self._last = (
            f"loss {logs['loss']:.3f}"
            f"  margin {logs['rewards/margins']:+.3f}"
            f"  accuracy {logs['rewards/accuracies']:.2f}"
            f"  {pace:.1f} s/step  {left:.1f} min left"
        )
        self._tell(state, self._last, line=True)
        every = max(1, state.max_steps // self.redraws)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self._redraw(history(state.log_history))

    def _redraw(self, frame: pd.DataFrame) -> None:
        """Show or refresh the curves under the running cell; outside a notebook, do nothing."""
        if not in_notebook() or len(frame) < 2:
            return
        from IPython.display import display
        from matplotlib import pyplot as plt

        from scripts.plots import training_curves

        figure = training_curves(frame)
        if self._figure is None:
            self._figure = display(figure, display_id=True)
        else:
            self._figure.update(figure)
        plt.close(figure)


def history(log: list[dict] | Path) -> pd.DataFrame:
    """The training steps of a run, from `trainer.state.log_history` or a `metrics.jsonl`.

    Rewards, margins and the loss are in nats; accuracies are shares of pairs.
    """
    if isinstance(log, Path):
        log = [json.loads(line) for line in log.open()]
    rows = [row for row in log if "loss" in row]
    return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame()
