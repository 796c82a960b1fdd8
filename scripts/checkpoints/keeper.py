"""A trainer that loses no finished step: TRL's loop, with what may stop it handled around it."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer

from scripts.base import RecipeError, in_notebook, put_in_place, write_whole
from scripts.checkpoints import identity
from scripts.checkpoints.lock import HELD_BY_PARENT
from scripts.checkpoints.store import ASIDE, damage, newest_whole, rotate_checkpoints, seal, step_of
from scripts.checkpoints.trouble import Stopped, TrainingError, explain, first_line

PENDING = "pending.json"  # in a checkpoint: what was added up since the last log


class Keeper(DPOTrainer):
    """TRL's trainer, or mixed in before a subclass of it; `settings` is `identity.settings` of the
    run's config, and `loader_timeout` its, both set once the trainer is built.

    - A checkpoint is written aside and put in its place whole, with the run's identity.
    - Going on from another run's, or from a damaged one, is refused; a finished run does no step.
    - SIGTERM, SIGHUP, Ctrl-C, an error of memory, disk or data: the last finished step becomes a
      checkpoint, and one line says so. A second Ctrl-C stops without one.
    - A loss, margin, gradient or weight that is not finite stops training, and the batch is kept.
    - `train` called again goes on where it was stopped; once it is through, it trains nothing anew.

    It overrides methods of transformers' `Trainer` that are private, hence the pinned version.
    transformers' own `enable_jit_checkpoint` waits three seconds, saves in the middle of a step,
    takes that step all the same, and ends as if training were through.
    """

    settings: dict[str, Any] | None = None
    loader_timeout: float = 600  # seconds
    _asked: int | None = None  # the signal that asks for a stop
    _aside: Path | None = None  # where a checkpoint is being written
    _kept: Path | None = None  # the newest checkpoint of this run
    _start: dict[str, Any] | None = None  # the state at the start of an unfinished step
    _epoch_rng: dict[str, Any] | None = None
    _updating = False  # weights and optimiser may be of two different steps
    _identity: dict | None = None
    _outcome: TrainOutput | None = None  # of the finished training
    _broke_off = False  # the last call of `train` did not finish
    _number = 1  # of the step that is under way, for the messages
    _batches: list = ()

    # ---- the whole of training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """TRL's; raises a `RecipeError` that says what is kept and how to go on."""
        if self._outcome is not None:
            print(
                f"This training is through ({self.state.global_step} steps): nothing is trained "
                "anew. For another one load the model and build the trainer again."
            )
            return self._outcome
        if self._broke_off:
            resume_from_checkpoint = self._where_it_broke_off() or resume_from_checkpoint
        checkpoint = self._to_go_on_from(resume_from_checkpoint)
        self._kept, self._updating, self._start = checkpoint, False, None
        if checkpoint or self.args.save_strategy != "no":
            self._identity = self._identify()
        if checkpoint:
            identity.refuse_another(checkpoint, self._identity)
        self._broke_off = True
        with self._signals():
            try:
                outcome = super().train(str(checkpoint) if checkpoint else None, **kwargs)
                self._stop_if_asked()
                self._refuse_a_shorter_run()
                self._outcome, self._broke_off = outcome, False
                return outcome
            except (RecipeError, KeyboardInterrupt):
                raise
            except Exception as error:
                what = explain(error, self._run_dir)
                if what is None and not self._asked:
                    error.add_note(self._rescued())
                    raise
                raise self._ended(what) from error

    def _refuse_a_shorter_run(self) -> None:
        """Under a constant rate the length may be another: longer, not shorter than was trained."""
        if self.state.global_step > self.state.max_steps:
            raise RecipeError(
                f"{self._kept} is of step {self.state.global_step}, and max_steps or "
                f"num_train_epochs ask for {self.state.max_steps}: take another --output-dir, or "
                "--overwrite to begin anew (what is there is set aside)"
            )

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's card, where the trainer itself sends the model to the hub. Beside a run it would
        name no base that was read from a folder; `export push` makes a card from the run."""
        if self.args.push_to_hub:
            super().create_model_card(*args, **kwargs)

    @property
    def _run_dir(self) -> Path:
        return Path(self.args.output_dir)

    def _to_go_on_from(self, asked: str | bool | None) -> Path | None:
        if not asked:
            return None
        if asked is True:
            found, remarks = newest_whole(self._run_dir)
            for remark in remarks:
                print(remark)
            if found is None:
                raise RecipeError(f"no whole checkpoint in {self._run_dir}; begin without one")
            return found
        if wrong := damage(Path(asked)):
            raise RecipeError(f"{asked} is no whole checkpoint: {wrong}; take another, or none")
        return Path(asked)

    def _where_it_broke_off(self) -> Path | None:
        """The newest checkpoint of the call before, in this process; None: before its first step.

        Raises:
            RecipeError: no checkpoint holds the steps that were taken.
        """
        if self._kept is None and (self.state.global_step or self._updating):
            raise RecipeError(
                f"this trainer stopped at step {self.state.global_step}, and no checkpoint is "
                "kept: load the model and build the trainer again"
            )
        return self._kept

    def _identify(self) -> dict:
        return {
            "config": self.settings or {},
            "data": identity.data_digest(self.train_dataset),
            "model": identity.model_digest(self.accelerator.unwrap_model(self.model)),
        }

    # ---- stopping ----

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While training, SIGTERM, Ctrl-C and SIGHUP (the terminal has gone; not under `nohup`) ask
        for a stop at the next safe point."""
        self._asked, self._pid = None, os.getpid()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asking = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            asking.append(signal.SIGHUP)
        old = {one: signal.signal(one, self._ask) for one in asking}
        try:
            yield
        finally:
            for one, handler in old.items():
                signal.signal(one, handler)
            self._asked = None

    def _ask(self, signum: int, frame) -> None:
        if os.getpid() != self._pid:  # a worker of the loader, forked with this handler
            return
        if signum == signal.SIGINT and self._asked == signum:
            raise KeyboardInterrupt
        self._asked = signum

    def _stop_if_asked(self) -> None:
        """Raise `Stopped` if a signal came; one process stops in any step, several at its end."""
        asked = self._asked
        if self.args.world_size > 1:
            if self._start is not None:
                return
            flag = torch.tensor(asked or 0, device=self.args.device)
            asked = int(self.accelerator.gather(flag.reshape(1)).max().item())
        if asked:
            raise self._stopped(asked, together=True)

    def _stopped(self, signum: int, together: bool = False) -> Stopped:
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        return Stopped(f"stopped by {name}. {self._rescued(together)}", signum)

    def _ended(self, what: str) -> TrainingError | Stopped:
        if self._asked:  # which may have hit the loader's workers, too
            return self._stopped(self._asked)
        what = f"training stopped at step {self._number}: {what}"
        return TrainingError(f"{what}. {self._rescued()}")

    def _rescued(self, together: bool = False) -> str:
        """Make the last finished step a checkpoint if it is none yet, and say what is kept.

        Several processes can only save `together`, not when one of them fails.
        """
        done = self.state.global_step
        known = done == 0 or (self._kept is not None and step_of(self._kept) >= done)
        failed = ""
        if not known and not self._updating and (together or self.args.world_size == 1):
            try:
                self._save_checkpoint(self.model, None)
            except Exception as error:
                failed = f" (step {done} could not be: {first_line(error)})"
        again = "the same command"
        if in_notebook() and HELD_BY_PARENT not in os.environ:  # somebody sits before it
            again = "this cell, run again,"
        if self._kept is None:
            return f"No checkpoint is kept{failed}; {again} begins again"
        return (
            f"Kept: {self._kept}, step {step_of(self._kept)} of {self.state.max_steps}{failed}; "
            f"{again} goes on from there"
        )

    # ---- one step ----

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # transformers looks only after a step, and so takes one too many on going on
            self.control.should_training_stop = True
            return
        self._put_back_pending(kwargs.get("resume_from_checkpoint"))
        # The order of an epoch is drawn before its first step: going on draws it again.
        at_boundary = float(self.state.epoch or 0).is_integer()
        self._epoch_rng = _random_state() if at_boundary else None
        super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._number = self.state.global_step + 1
        try:
            with time_limit(self.loader_timeout):
                samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        except TimeIsUp as error:
            raise self._ended(
                f"no batch came for {self.loader_timeout} s (loader_timeout): the data's disk or "
                "network hangs, or a worker of the loader does"
            ) from error
        except Exception as error:
            if explain(error, self._run_dir):
                raise
            raise self._ended(
                f"the next batch cannot be read ({type(error).__name__}: {first_line(error)}); see "
                "that the dataset is where it was"
            ) from error
        self._batches, self._start = samples[0], None
        return samples

    def training_step(self, *args, **kwargs):
        if self._start is None:
            self._start = self._state_between_steps(self._epoch_rng or _random_state())
            self._epoch_rng = None
        self._stop_if_asked()
        loss = super().training_step(*args, **kwargs)
        margins = self._metrics["train"].get("rewards/margins") or [0.0]
        for name, value in (("loss", loss.item()), ("margin", margins[-1])):
            if not math.isfinite(value):
                raise self._not_finite(f"the {name} is {value}")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # float16's scaler meets infinite gradients now and then, and leaves their step out
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm is {float(norm)}")
        self._updating = True  # from here on the optimiser changes the weights
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self._start is not None:  # else it is the end of an epoch
            trained = [p.detach() for p in self.model.parameters() if p.requires_grad and p.numel()]
            largest = torch.stack([n.float() for n in torch._foreach_norm(trained, math.inf)])
            if not largest.isfinite().all().item():
                raise self._not_finite("the step left weights that are not finite")
        self._updating, self._start = False, None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._stop_if_asked()

    def log(self, *args, **kwargs) -> None:
        """TRL's; what could not be written or printed is not added up again in the next log."""
        mode = "train" if self.model.training else "eval"
        try:
            super().log(*args, **kwargs)
        finally:
            self._metrics[mode].clear()

    def prediction_step(self, *args, **kwargs):
        if self.is_in_train and self.args.world_size == 1:
            self._stop_if_asked()
        return super().prediction_step(*args, **kwargs)

    def _not_finite(self, what: str) -> TrainingError:
        return self._ended(
            f"{what}; its pairs are in {self._keep_batch(what)}. A lower learning_rate, a "
            "max_grad_norm of 1 or less, or leaving out a broken pair helps"
        )

    def _keep_batch(self, what: str) -> Path:
        """Write the step's pairs, chosen and rejected as text and tokens, to the run folder."""
        rows = []
        for batch in self._batches:
            ids = [row[mask.bool()] for row, mask in
                   zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
            half = len(ids) // 2  # all chosen, then all rejected
            for pair in zip(ids[:half], ids[half:], strict=True):
                named = dict(zip(("chosen", "rejected"), pair, strict=True))
                texts = {side: self.processing_class.decode(row) for side, row in named.items()}
                rows.append(texts | {f"{side}_ids": row.tolist() for side, row in named.items()})
        path = self._run_dir / "failed_batch.json"
        found = {"step": self._number, "what": what, "pairs": rows}
        try:
            write_whole(path, json.dumps(found, indent=1, ensure_ascii=False))
        except OSError as error:
            print(f"{path} could not be written: {first_line(error)}")
        return path

    # ---- what a checkpoint holds ----

    def _state_between_steps(self, rng: dict[str, Any]) -> dict[str, Any]:
        """What the loop holds beside weights, optimiser, schedule and counters."""
        return {
            "rng": rng,
            "tr_loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def _put_back_pending(self, checkpoint: str | None) -> None:
        """Go on adding up the next log where the checkpoint was written, at the first epoch."""
        file = Path(checkpoint or "") / PENDING
        if checkpoint and self.state.global_step == step_of(checkpoint) and file.exists():
            kept = json.loads(file.read_text())
            self._tr_loss += kept["tr_loss"]
            self._globalstep_last_logged = kept["last_logged"]
            self._metrics["train"] = defaultdict(list, kept["metrics"])

    def _save_rng_state(self, output_dir: str) -> None:
        """transformers'; in the middle of a step, as it was at the step's start."""
        then = self._start["rng"] if self._start else self._epoch_rng
        if then is None:
            return super()._save_rng_state(output_dir)
        now = _random_state()
        _set_random_state(then)
        super()._save_rng_state(output_dir)
        _set_random_state(now)

    def _get_output_dir(self, trial):
        return str(self._aside) if self._aside else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it is pushed from its place, below
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        """TRL's, into a folder aside that is then flushed and renamed."""
        target = self._run_dir / f"checkpoint-{self.state.global_step}"
        main, aside = self.accelerator.is_main_process, self._run_dir / ASIDE
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                self._finish(aside / target.name, target)
        finally:
            self._aside = None
            if main:
                shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._kept = target
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(target))
        if self.args.should_save:  # old ones go only now
            best = self.state.best_model_checkpoint
            rotate_checkpoints(
                self._run_dir, self.args.save_total_limit, self.state.global_step, best
            )

    def _finish(self, part: Path, target: Path) -> None:
        """Complete the checkpoint in `part` and put it in its place."""
        best = self.state.best_global_step
        if best and (step_of(target) == best or (self._run_dir / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(self._run_dir / f"checkpoint-{best}")
            self.state.save_to_json(str(part / "trainer_state.json"))
        state = self._start or self._state_between_steps({})
        pending = {key: value for key, value in state.items() if key != "rng"}
        (part / PENDING).write_text(json.dumps(pending))
        self._identity = self._identity or self._identify()
        seal(part, self._identity, resumable=not self.args.save_only_model)
        put_in_place(part, target)


def _random_state() -> dict[str, Any]:
    """The states that transformers saves, which on one device are all that training draws from."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    setters: dict[str, Callable] = {
        "python": random.setstate,
        "numpy": np.random.set_state,
        "torch": torch.random.set_rng_state,
        "cuda": torch.cuda.random.set_rng_state,
    }
    for name, value in state.items():
        setters[name](value)


class TimeIsUp(BaseException):
    """What `time_limit` raises; no `Exception`, because loaders try again after those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in what takes longer, even if it waits for the system; on the main thread
    only, which is the one that signals reach."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame) -> None:
        raise TimeIsUp

    old = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
