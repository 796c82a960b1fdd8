"""Checkpoints that are whole or passed over, and a training that loses no finished step.

    trainer = DPOTrainer(..., callbacks=[Checkpoints(cfg), RunLog(...)])
    with resumable(trainer) as checkpoint:
        trainer.train(resume_from_checkpoint=checkpoint)

transformers writes `checkpoint-N`; `Checkpoints` then adds `whole.json`, with the size and digest
of every file and what run it is of, and only then lets older ones go. A checkpoint without it, or
with a changed byte, is passed over. SIGTERM, SIGHUP, Ctrl-C and an error end in a checkpoint of the
last finished step, from which the same command goes on bit for bit on a CPU.

Nothing of transformers' `Trainer` is overridden. These of its private names are used, and
tests/test_resume.py fails when they change: `_save_checkpoint` (called after an error), `_tr_loss`,
`_globalstep_last_logged` and TRL's `_metrics` (what is summed for the next log).
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
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
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

MARKER, PENDING = "whole.json", "pending.json"
NAME = re.compile(r"checkpoint-([0-9]+)")
HELD_BY_PARENT = "DPO_RUN_LOCKED"  # set by the headless command for the kernel that it starts
MEMORY_WORDS = ("defaultcpuallocator", "can't allocate memory", "cannot allocate memory")
# What these keys name is compared itself, by a digest: it may have moved.
DATA_KEYS = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
    "dataset_streaming", "dataset_format", "dataset_columns", "test_split_size", "train_samples",
    "datasets", "dataset_revision",
}  # fmt: skip
MODEL_KEYS = {"model_name_or_path", "model_revision"}
LENGTH_KEYS = {"max_steps", "num_train_epochs"}


class TrainingError(RecipeError):
    """Training cannot go on; the message says why, what is kept, and how to go on."""


class Stopped(RecipeError):
    """A signal stopped the run; the message says what is kept, and how to go on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = CTRL_C if signum == signal.SIGINT else STOPPED


class _Finished(Exception):
    """The checkpoint is of the last step: there is nothing left to train."""


# ---- what a checkpoint holds, and whether it is whole ----


def step_of(folder: Path | str) -> int:
    """The optimiser step in a checkpoint's name."""
    return int(NAME.fullmatch(Path(folder).name).group(1))


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, newest first."""
    found = run_dir.iterdir() if run_dir.is_dir() else ()
    return sorted((p for p in found if NAME.fullmatch(p.name)), key=step_of, reverse=True)


def seal(folder: Path, identity: dict, resumable: bool = True) -> None:
    """Mark a checkpoint as whole, once all of it is on the disk; `resumable` unless optimiser and
    scheduler are left out (`save_only_model`)."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.name != MARKER):
        flush(path)
        if path.is_file():
            files[str(path.relative_to(folder))] = [path.stat().st_size, _digest(path)]
    kept = {"run": identity, "resumable": resumable, "files": files}
    write_whole(folder / MARKER, json.dumps(kept, indent=1))
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


def rotate(run_dir: Path, limit: int | None, step: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, once that of `step` is sealed; `best` is kept.
    Of earlier steps, those without a marker neither count nor stay; later ones are not this run's
    own and are left alone."""
    own = [path for path in checkpoints(run_dir) if step_of(path) <= step]
    whole = [path for path in own if marker(path)]
    keep = whole[:limit] if limit and limit > 0 else whole
    if best and Path(best) in whole and Path(best) not in keep:
        keep = [*whole[: max(1, len(keep) - 1)], Path(best)]
    for path in own:
        if path not in keep:
            shutil.rmtree(path, ignore_errors=True)


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
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            rows = table.column(name).combine_chunks()
            for numbers in (rows.value_lengths(), rows.flatten()):
                digest.update(np.asarray(numbers.cast(pa.int64())).tobytes())
    return digest.hexdigest()[:32]


def model_digest(model: torch.nn.Module, entries: int = 1024) -> str:
    """Digest of a model before training: each tensor's name, type, shape and up to `entries` of
    its numbers, evenly spaced; adapters aside. Another model differs in nearly all of them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if "lora_" in name or not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta and tensor.numel():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // entries)].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def differences(theirs: dict, ours: dict, *, may_have_moved: bool = False) -> list[str]:
    """The keys in which two runs differ, each with both values, and data and model if they do.

    Either may lack `data` and `model`, before these are loaded; then the keys that name them count,
    unless both `may_have_moved`.
    """
    there, here = theirs.get("config", {}), ours.get("config", {})
    by_digest = {"data": (DATA_KEYS, "the training pairs"), "model": (MODEL_KEYS, "the weights")}
    passed, found = set(), []
    for part, (keys, what) in by_digest.items():
        known = theirs.get(part) and ours.get(part)
        if known or may_have_moved:
            passed |= keys
        if known and theirs[part] != ours[part]:
            named = [key for key in sorted(keys) if there.get(key) != here.get(key)]
            why = ", ".join(f"`{k}` was {there.get(k)!r} and is {here.get(k)!r}" for k in named)
            found.append(f"{what} differ" + (f" ({why})" if why else ""))
    return [
        f"`{key}` was {there[key]!r} and is {here[key]!r}"
        if key in there and key in here
        else f"`{key}` is in one of them only"
        for key in sorted({*there, *here} - passed)
        if key not in there or key not in here or there[key] != here[key]
    ] + found


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
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory (torch.OutOfMemoryError); activation_checkpointing: true computes "
            "the same in less and may be set when you resume; or begin again with a smaller "
            "per_device_train_batch_size and more gradient_accumulation_steps (scripts.plan counts "
            "both), and look with nvidia-smi who else uses the GPU"
        )
    short = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if short or any(word in str(error).lower() for word in MEMORY_WORDS):
        return (
            "out of main memory; scripts.plan says what the config needs: end other programs, set "
            "activation_checkpointing: true, or begin again with a smaller "
            "per_device_train_batch_size"
        )
    if disk_is_full(error):
        free = shutil.disk_usage(existing(folder)).free / 1024**2
        return (
            f"a file could not be written, the disk is full ({one_line(error, 200)}; {free:,.0f} "
            f"MB are free at {existing(folder)}); make room, or raise the limit"
        )
    # Not a pipe without a reader, nor a library's network error, which is an OSError of no number.
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return f"a file could not be read or written ({one_line(error, 200)}); see that it is there"
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
        self.outcome: TrainOutput | None = None  # of the finished training
        self.asked: int | None = None  # the signal that asks for a stop
        self.limit: int | None = None  # save_total_limit
        self._identity: dict = {}
        self._step = 0  # the number of the newest step that has begun
        self._start: dict[str, Any] | None = None  # the state at the start of an unfinished step
        self._epoch_rng: dict[str, Any] | None = None
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
        if state.global_step == state.max_steps:  # transformers would take a step too many
            raise _Finished
        self._resume_log(state)

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        # An epoch's order is drawn before its first step: resuming there draws it again.
        at_boundary = float(state.epoch or 0).is_integer()
        self._epoch_rng = _random_state() if at_boundary else None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self.trainer is None:
            return
        self._step = state.global_step + 1
        self._start = {"rng": self._epoch_rng or _random_state()} | self._summed()
        self._epoch_rng = None
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
            _refuse_not_finite(
                [p.grad for p in model.parameters() if p.grad is not None],
                lambda: self._not_finite("a gradient"),
            )
        self._updating = True  # from here on the optimiser changes the weights

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        if self.trainer is None:
            return
        _refuse_not_finite(
            [p for p in model.parameters() if p.requires_grad],
            lambda: self._not_finite("a weight after the step"),
        )
        self._updating, self._start = False, None
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
        folder = self.run_dir / f"checkpoint-{state.global_step}"
        if self.trainer is None:
            return
        if state.is_world_process_zero:
            summed = self._start or self._summed()
            pending = {key: value for key, value in summed.items() if key != "rng"}
            (folder / PENDING).write_text(json.dumps(pending))
            seal(folder, self._identity or self.identity(), not args.save_only_model)
            rotate(self.run_dir, self.limit, state.global_step, state.best_model_checkpoint)
        self.trainer.accelerator.wait_for_everyone()
        self.kept = folder

    # What is summed up for the next log.

    def _summed(self) -> dict[str, Any]:
        if self.trainer is None:
            return {}
        return {
            "tr_loss": self.trainer._tr_loss.item(),
            "last_logged": self.trainer._globalstep_last_logged,
            "metrics": {k: list(v) for k, v in self.trainer._metrics["train"].items()},
        }

    def _resume_log(self, state) -> None:
        """Go on adding up the next log where the checkpoint was written."""
        file = (self.kept or self.run_dir) / PENDING
        if self.kept and state.global_step == step_of(self.kept) and file.is_file():
            pending = json.loads(file.read_text())
            self.trainer._tr_loss += pending["tr_loss"]
            self.trainer._globalstep_last_logged = pending["last_logged"]
            self.trainer._metrics["train"] = defaultdict(list, pending["metrics"])

    def identity(self) -> dict:
        """What run this is: its settings, and digests of its pairs and its model."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        data = data_digest(self.trainer.train_dataset)
        self._identity = {"config": self.settings, "data": data, "model": model_digest(model)}
        return self._identity

    # Stopping.

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
            now = _random_state()
            _set_random_state(self._start["rng"] if self._start else self._epoch_rng or now)
            try:
                trainer._save_checkpoint(trainer.model, trial=None)
                self.on_save(trainer.args, trainer.state, trainer.control)
            except Exception as error:
                failed = f" (step {done} could not be saved: {one_line(error, 200)})"
            _set_random_state(now)
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
        if not module.training or ids is None or self._start is None:
            return
        if not any(ids is known for known, _ in self._batches):  # the reference reads it, too
            self._batches.append((ids, kwargs.get("attention_mask", torch.ones_like(ids))))

    def _not_finite(self, what: str) -> TrainingError:
        rows = []
        for ids, mask in self._batches:
            texts = [
                self.trainer.processing_class.decode(row[keep.bool()])
                for row, keep in zip(ids, mask, strict=True)
            ]
            half = len(texts) // 2  # all chosen, then all rejected
            pairs = zip(texts[:half], texts[half:], strict=True)
            rows += [{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
        path = self.run_dir / "failed_batch.json"
        found = {"step": self._step, "what": f"{what} is not finite"}
        found["pairs"] = rows
        write_whole(path, json.dumps(found, indent=1, ensure_ascii=False))
        return self.ended(
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
    keeper.trainer = trainer
    checkpoint = _to_resume_from(trainer, keeper)
    train = trainer.train

    def train_once(*args, **kwargs) -> TrainOutput:
        if keeper.outcome is None:
            try:
                keeper.outcome = train(*args, **kwargs)
            except _Finished:
                keeper.outcome = TrainOutput(trainer.state.global_step, math.nan, {})
            if keeper.asked:
                keeper.outcome = None
                raise keeper.stopped()
        else:
            steps = trainer.state.global_step
            print(f"This training has finished ({steps} steps): there is nothing left to do.")
        return keeper.outcome

    hook = trainer.model.register_forward_pre_hook(keeper.note_batch, with_kwargs=True)
    keeper.limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    trainer.train = train_once
    try:
        with _signals(keeper):
            yield checkpoint
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
        del trainer.train
        trainer.args.save_total_limit = keeper.limit
        hook.remove()
        keeper.trainer = None


def _to_resume_from(trainer: DPOTrainer, keeper: Checkpoints) -> str | None:
    if keeper.outcome is not None:
        return None
    if keeper.kept is None and trainer.state.global_step:
        raise RecipeError(
            f"this trainer stopped at step {trainer.state.global_step}, and no checkpoint is kept: "
            "load the model and build the trainer again"
        )
    checkpoint = keeper.kept or (Path(keeper.first) if keeper.first else None)
    if checkpoint is not None or trainer.args.save_strategy != "no":
        keeper.identity()
    if checkpoint is None:
        return None
    if wrong := damage(checkpoint):
        raise RecipeError(f"resume_from_checkpoint: {checkpoint} cannot be resumed from: {wrong}")
    refuse_another(checkpoint, keeper._identity)
    keeper.kept, keeper._updating, keeper._start, keeper._step = checkpoint, False, None, 0
    return str(checkpoint)


@contextmanager
def _signals(keeper: Checkpoints) -> Iterator[None]:
    """Meanwhile SIGTERM, Ctrl-C and SIGHUP (the terminal has gone; not under `nohup`) ask for a
    stop at the next safe point; a second Ctrl-C stops at once."""
    keeper.asked, pid = None, os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

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


def _refuse_not_finite(tensors: list[torch.Tensor], error) -> None:
    """Raise what `error` makes if one of `tensors` holds a number that is not finite."""
    tensors = [t.detach() for t in tensors if t.numel()]
    if tensors:
        largest = torch.stack([n.float() for n in torch._foreach_norm(tensors, math.inf)])
        if not largest.isfinite().all().item():
            raise error()


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
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.random.set_rng_state(state["cuda"])
