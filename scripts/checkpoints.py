"""Checkpoints that are whole or passed over, and a training that loses no finished step.

    trainer = DPOTrainer(..., callbacks=[Checkpoints(cfg), RunLog(...)])
    with resumable(trainer) as checkpoint:
        trainer.train(resume_from_checkpoint=checkpoint)

transformers writes `checkpoint-N`; `Checkpoints` then adds `whole.json`, with the size and digest
of every file and what run it is of, and only then lets older ones go. A checkpoint without it, or
with a changed byte, is passed over. SIGTERM, SIGHUP, Ctrl-C and an error end in a checkpoint of the
last finished step, from which the same command goes on bit for bit on a CPU.

Nothing of transformers' `Trainer` is overridden. Of its private names these are used, and
tests/test_resume.py fails when they change: `_save_checkpoint` (called after an error), `_tr_loss`,
`_globalstep_last_logged` and TRL's `_metrics` (the sums for the next log).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from trl import DPOTrainer

from scripts.base import (
    CTRL_C,
    STOPPED,
    RecipeError,
    disk_is_full,
    existing,
    flush,
    in_notebook,
    one_line,
    write_whole,
)
from scripts.config import Config, is_harmless

MARKER = "whole.json"
NAME = re.compile(r"checkpoint-([0-9]+)")
HELD_BY_PARENT = "DPO_RUN_LOCKED"  # set by the headless command for the kernel that it starts
MEMORY_WORDS = ("defaultcpuallocator", "can't allocate memory", "cannot allocate memory")
# Pairs and weights are compared by their digests: the files that these keys name may have moved.
BY_DIGEST = {
    "data": ("the training pairs", {
        "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
        "dataset_streaming", "dataset_format", "dataset_columns", "test_split_size",
        "train_samples", "datasets", "dataset_revision",
    }),
    "model": ("the weights", {"model_name_or_path", "model_revision"}),
}  # fmt: skip
LENGTH_KEYS = {"max_steps", "num_train_epochs"}


class TrainingError(RecipeError):
    """Training cannot go on; the message says why, what is kept, and how to go on."""


class Stopped(RecipeError):
    """A signal stopped the run; the message says what is kept, and how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = CTRL_C if signum == signal.SIGINT else STOPPED


class _Finished(Exception):
    """There is nothing left to train."""


# ---- what a checkpoint holds, and whether it is whole ----


def step_of(folder: Path | str) -> int:
    """The optimiser step in a checkpoint's name."""
    return int(NAME.fullmatch(Path(folder).name).group(1))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, newest first."""
    found = run_dir.iterdir() if run_dir.is_dir() else ()
    return sorted((p for p in found if NAME.fullmatch(p.name)), key=step_of, reverse=True)


def seal(folder: Path, facts: dict) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk. `facts` go into the marker: whose
    checkpoint it is (`run`), whether it is `resumable`, and the `sums` for the next log."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.name != MARKER):
        flush(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = [path.stat().st_size, _digest(path)]
    write_whole(folder / MARKER, json.dumps(facts | {"files": files}, indent=1))
    flush(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def marker(folder: Path) -> dict:
    """What `seal` wrote; an empty mapping if that cannot be read."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found if isinstance(found["files"], dict) and isinstance(found["run"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, in few words; None if it is whole.

    A missing file counts: transformers would go on without the optimiser's, from zero.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if not NAME.fullmatch(folder.name):
        return "it is not named checkpoint-<step>"
    if not (kept := marker(folder)):
        return f"it has no readable {MARKER}, which is written last"
    if not kept.get("resumable"):
        return "it keeps the weights only (save_only_model)"
    for name, (size, digest) in kept["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _digest(path) != digest:
            return f"{name} differs from what was written"
    step = json.loads((folder / "trainer_state.json").read_text()).get("global_step")
    return None if step == step_of(folder) else f"it is of step {step}, despite its name"


def newest_whole(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if any, and a remark on each newer one that is not whole."""
    remarks = []
    for path in checkpoints(run_dir):
        if (wrong := damage(path)) is None:
            return path, remarks
        remarks.append(f"{path} is not whole ({wrong}); it is passed over")
    return None, remarks


# ---- whose checkpoint it is ----


def run_settings(cfg: Config) -> dict[str, Any]:
    """The resolved arguments that the trained weights depend on, as JSON has them.

    `max_steps` and `num_train_epochs` are left out under a constant learning rate: a longer run
    then begins exactly like a shorter one, and may go on from it.
    """
    values = vars(cfg.recipe) | vars(cfg.script) | vars(cfg.model) | cfg.dpo.to_dict()
    left_out = LENGTH_KEYS if values["lr_scheduler_type"] == "constant" else set()
    values = {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and not is_harmless(key) and key not in left_out
    }
    return json.loads(json.dumps(values, sort_keys=True, default=str))


def data_digest(dataset: Dataset) -> str:
    """Digest of every pair's tokens, in order."""
    digest = hashlib.sha256()
    columns = [f"{part}_ids" for part in ("prompt", "chosen", "rejected")]
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def model_digest(model: torch.nn.Module, entries: int = 1024) -> str:
    """Digest of a model before training, adapters aside: each tensor's name, type, shape and up to
    `entries` of its numbers, evenly spaced. Another model differs in nearly all of them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // entries)].tolist()
            digest.update(json.dumps([name, str(tensor.dtype), tensor.shape, some]).encode())
    return digest.hexdigest()


def differences(theirs: dict, ours: dict, *, may_have_moved: bool = False) -> list[str]:
    """The keys in which two runs differ, each with both values, and data and model if they do.

    Either may lack `data` and `model`, before these are loaded; then the keys that name them count,
    unless both `may_have_moved`.
    """
    there, here = theirs.get("config", {}), ours.get("config", {})
    differ = {
        key: f"`{key}` was {there.get(key)!r} and is {here.get(key)!r}"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    }
    found = []
    for part, (what, keys) in BY_DIGEST.items():
        known = part in theirs and part in ours
        named = [differ.pop(k) for k in sorted(keys & {*differ}) if known or may_have_moved]
        if known and theirs[part] != ours[part]:
            found.append(f"{what} differ" + f" ({', '.join(named)})" * bool(named))
    return [*differ.values(), *found]


def refuse_another(checkpoint: Path, ours: dict, *, may_have_moved: bool = False) -> None:
    """Resume only from a checkpoint of the same run; `may_have_moved` as in `differences`.

    Raises:
        RecipeError: config, data or model differ; the message names the keys.
    """
    if found := differences(marker(checkpoint)["run"], ours, may_have_moved=may_have_moved):
        more = f", and {len(found) - 6} more" * (len(found) > 6)
        raise RecipeError(
            f"{checkpoint} is another run's: {'; '.join(found[:6])}{more}. Give the settings that "
            "it was made with (config.yaml beside it has them), another --output-dir, or "
            "--overwrite to begin again (what is there is set aside)"
        )


# ---- errors in one line ----


def explain(error: BaseException, folder: Path) -> str | None:
    """What an error of the system means for a run that writes to `folder`, and what helps; None for
    any other error."""
    less = (
        "activation_checkpointing: true computes the same in less memory and may be set when you "
        "resume; or begin again with a smaller per_device_train_batch_size (python -m scripts.plan "
        "counts both)"
    )
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: {less}; nvidia-smi shows who else uses the GPU"
    short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if short or any(word in str(error).lower() for word in MEMORY_WORDS):
        return f"out of main memory: end other programs; {less}"
    if disk_is_full(error):
        there = existing(folder)
        free = shutil.disk_usage(there).free / 1024**2
        return (
            f"the disk is full ({one_line(error, 200)}; {free:,.0f} MB are free at {there}): make "
            "room, or raise the limit"
        )
    # Not a pipe without a reader, nor a library's network error, which is an OSError of no number.
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"a file could not be read or written ({one_line(error, 200)}): see that it is there"
    return None


@contextmanager
def explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn an error of memory or disk while `doing` something into one clear `TrainingError`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, RecipeError) and (what := explain(error, folder)):
            raise TrainingError(f"while {doing}: {what}") from error
        raise


# ---- training that can be stopped ----


class Checkpoints(TrainerCallback):
    """Seals checkpoints, looks for a stop, and refuses numbers that are not finite.

    It acts inside `resumable`, which tells it of the trainer, and does nothing elsewhere.
    """

    def __init__(self, cfg: Config) -> None:
        self.run_dir, self.first = cfg.run_dir, cfg.dpo.resume_from_checkpoint
        self.settings = run_settings(cfg)  # before TRL completes the arguments in place
        self.trainer: DPOTrainer | None = None
        self.kept: Path | None = None  # the newest checkpoint of this run
        self.finished = False  # in this process
        self.asked: int | None = None  # the signal that asks for a stop
        self.limit: int | None = None  # save_total_limit
        self.identity: dict = {}  # what run this is: its settings, digests of its pairs and model
        self._step = 0  # the number of the newest step that has begun
        # Of a step that is not finished: what a checkpoint of the step before it has to hold.
        self._random: list[tuple[Callable, Any]] | None = None
        self._sums: dict[str, Any] | None = None
        self._updating = False  # weights and optimiser may be of two different steps
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    # What transformers calls.

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.trainer is None:
            return
        if state.global_step > state.max_steps:
            raise RecipeError(
                f"{self.kept} is of step {state.global_step}, and max_steps or num_train_epochs "
                f"ask for {state.max_steps}: take another --output-dir, or --overwrite to begin "
                "again (what is there is set aside)"
            )
        if self.finished or state.global_step == state.max_steps:
            raise _Finished  # transformers would take a step too many
        # The next log goes on adding up where the checkpoint was written.
        if self.kept and (sums := marker(self.kept).get("sums")):
            self.trainer._tr_loss += sums["loss"]
            self.trainer._globalstep_last_logged = sums["last_logged"]
            self.trainer._metrics["train"] = defaultdict(list, sums["metrics"])

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # An epoch's order is drawn before its first step: resuming there draws it again.
        self._random = _random_state() if float(state.epoch or 0).is_integer() else None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.trainer is None:
            return
        self._step = state.global_step + 1
        self._random, self._sums = self._random or _random_state(), self._summed()
        self._batches.clear()
        self._stop_if_asked()

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._stop_if_asked()

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self.trainer is not None and self.trainer.is_in_train:
            self._stop_if_asked()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if self.trainer is None:
            return
        # float16's scaler meets infinite gradients now and then, and leaves their step out
        if self.trainer.accelerator.scaler is None:
            self._refuse_not_finite("a gradient", [p.grad for p in model.parameters()])
        self._updating = True  # from here on the optimiser changes the weights

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.trainer is None:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        self._refuse_not_finite("a weight after the step", trained)
        self._updating, self._random, self._sums = False, None, None
        if args.world_size > 1:  # several processes stop together, here
            flag = torch.tensor([self.asked or 0], device=args.device)
            self.asked = int(self.trainer.accelerator.gather(flag).max().item()) or None
            control.should_save |= self.asked is not None
            control.should_training_stop |= self.asked is not None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # TRL empties these only after all callbacks have logged; one that fails would leave the
        # step's numbers to be added up with the next one's.
        if self.trainer is not None and "loss" in (logs or {}):
            self.trainer._metrics["train"].clear()

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.trainer is None:
            return
        folder = self.run_dir / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            sums = self._sums or self._summed()
            whole = {"run": self.identity, "resumable": not args.save_only_model, "sums": sums}
            seal(folder, whole)
            stays = state.best_model_checkpoint or str(folder)
            rotate_checkpoints(str(self.run_dir), self.limit, stays, use_mtime=True)
        self.trainer.accelerator.wait_for_everyone()
        self.kept = folder

    def _summed(self) -> dict[str, Any]:
        """What is summed up for the next log."""
        return {
            "loss": self.trainer._tr_loss.item(),
            "last_logged": self.trainer._globalstep_last_logged,
            "metrics": {k: list(v) for k, v in self.trainer._metrics["train"].items()},
        }

    # Stopping.

    def begin(self, trainer: DPOTrainer) -> Path | None:
        """Before `trainer` trains: the checkpoint to go on from, or None.

        Raises:
            RecipeError: that checkpoint is damaged or another run's.
        """
        self.trainer = trainer
        self._updating, self._random, self._sums, self._step = False, None, None, 0
        if self.finished:
            return self.kept
        if self.kept is None and trainer.state.global_step:
            raise RecipeError(
                f"this trainer stopped at step {trainer.state.global_step}, and no checkpoint is "
                "kept: load the model and build the trainer again"
            )
        if not self.identity:
            data = data_digest(trainer.train_dataset)
            model = model_digest(trainer.accelerator.unwrap_model(trainer.model))
            self.identity = {"config": self.settings, "data": data, "model": model}
        checkpoint = self.kept or (Path(self.first) if self.first else None)
        if checkpoint is not None:
            if wrong := damage(checkpoint):
                raise RecipeError(
                    f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {wrong}"
                )
            refuse_another(checkpoint, self.identity)
        self.kept = checkpoint
        return checkpoint

    def _stop_if_asked(self) -> None:
        if self.asked and self.trainer.args.world_size == 1:
            raise self.stopped()

    def stopped(self) -> Stopped:
        """The error that ends a training which a signal stopped."""
        name = "Ctrl-C" if self.asked == signal.SIGINT else signal.Signals(self.asked).name
        return Stopped(f"stopped by {name}. {self.rescued()}", self.asked)

    def ended(self, what: str) -> TrainingError:
        """The error that ends a training for the reason `what`."""
        number = max(self.trainer.state.global_step, self._step)
        return TrainingError(f"training stopped at step {number}: {what}. {self.rescued()}")

    def rescued(self) -> str:
        """Make the last finished step a checkpoint if it is none yet, and say what is kept.

        One process can; of several, none can save alone.
        """
        trainer, failed = self.trainer, ""
        done = trainer.state.global_step
        known = done == 0 or (self.kept is not None and step_of(self.kept) >= done)
        if not known and not self._updating and trainer.args.world_size == 1:
            for restore, state in self._random or ():
                restore(state)
            try:
                trainer._save_checkpoint(trainer.model, trial=None)
                self.on_save(trainer.args, trainer.state, trainer.control)
            except Exception as error:
                failed = f" (step {done} could not be saved: {one_line(error, 200)})"
        again = "the same command"
        if in_notebook() and HELD_BY_PARENT not in os.environ:  # somebody sits before it
            again = "this cell, run again,"
        if self.kept is None:
            return f"No checkpoint is kept{failed}; {again} begins again"
        step = f"step {step_of(self.kept)} of {trainer.state.max_steps}"
        return f"Kept: {self.kept}, {step}{failed}; {again} goes on from there"

    # What is not finite.

    def note_batch(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook on the model: keeps what a training step reads, to name it if the step fails."""
        ids = kwargs.get("input_ids")
        if not module.training or ids is None or self._sums is None:
            return
        if not any(ids is known for known, _ in self._batches):  # the reference reads it, too
            self._batches.append((ids, kwargs.get("attention_mask", torch.ones_like(ids))))

    def _refuse_not_finite(self, what: str, tensors: list[torch.Tensor | None]) -> None:
        """Raise a `TrainingError` if one of `tensors` holds a number that is not finite; the pairs
        of the step are then in `failed_batch.json`."""
        tensors = [t.detach() for t in tensors if t is not None and t.numel()]
        largest = [n.float() for n in torch._foreach_norm(tensors, math.inf)] if tensors else []
        if not largest or torch.stack(largest).isfinite().all().item():
            return
        pairs = []
        for ids, mask in self._batches:
            texts = [
                self.trainer.processing_class.decode(row[keep.bool()])
                for row, keep in zip(ids, mask, strict=True)
            ]
            half = len(texts) // 2  # all chosen, then all rejected
            sides = zip(texts[:half], texts[half:], strict=True)
            pairs += [{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
        found = {"step": self._step, "what": f"{what} is not finite", "pairs": pairs}
        path = self.run_dir / "failed_batch.json"
        write_whole(path, json.dumps(found, indent=1, ensure_ascii=False))
        raise self.ended(
            f"{what} is not finite; the step's pairs are in {path}. A lower learning_rate, a "
            "max_grad_norm of 1 or less, or leaving out a broken pair helps"
        )


@contextmanager
def resumable(trainer: DPOTrainer) -> Iterator[str | None]:
    """Around `trainer.train`: a stop or an error keeps the last finished step.

    Gives the checkpoint to train from: the one that the run resumes from, the newest of this
    trainer after an interrupt, or None. Once training has finished, `train` does nothing more.

    Raises:
        RecipeError: that checkpoint is damaged or another run's.
        Stopped, TrainingError: in one line, why training ended and what is kept.
    """
    keeper = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Checkpoints))
    checkpoint, state = keeper.begin(trainer), trainer.state
    hook = trainer.model.register_forward_pre_hook(keeper.note_batch, with_kwargs=True)
    keeper.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        with _signals(keeper):
            yield str(checkpoint) if checkpoint else None
        if keeper.asked:  # several processes, or after the last step
            raise keeper.stopped()
        keeper.finished = True
    except _Finished:
        if keeper.finished:
            trainer.state = state  # with the whole log
            steps = state.global_step
            print(f"This training has finished ({steps} steps): there is nothing left to do.")
        keeper.finished = True
    except RecipeError:
        raise
    except Exception as error:
        if keeper.asked:
            raise keeper.stopped() from error
        if what := explain(error, keeper.run_dir):
            raise keeper.ended(what) from error
        error.add_note(keeper.rescued())
        raise
    finally:
        trainer.args.save_total_limit = keeper.limit
        hook.remove()
        keeper.trainer = None


@contextmanager
def _signals(keeper: Checkpoints) -> Iterator[None]:
    """Meanwhile SIGTERM, Ctrl-C and SIGHUP (the terminal has gone; not under `nohup`) ask for a
    stop at the next safe point; a second Ctrl-C stops at once."""
    keeper.asked, pid = None, os.getpid()

    def ask(signum: int, frame) -> None:
        if os.getpid() != pid:  # a worker of the loader, forked with this handler
            return
        if signum == signal.SIGINT and keeper.asked == signum:
            raise KeyboardInterrupt
        keeper.asked = signum

    asking = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    before = {one: signal.signal(one, ask) for one in asking}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _random_state() -> list[tuple[Callable, Any]]:
    """The states that transformers saves, which on one device are all that training draws from,
    each with the function that restores it."""
    states = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.random.set_rng_state, torch.random.get_rng_state()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.random.set_rng_state, torch.cuda.random.get_rng_state()))
    return states
