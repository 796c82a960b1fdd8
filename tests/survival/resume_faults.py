"""Killed in training, and gone on with; or gone on from what is not this run's."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial

from tests.survival import tiny
from tests.survival.probes import SignalAtStep

AREA = "killed in training, resumed"
# Settings that change the weights; each with another value.
CHANGES = {
    "beta": 0.2,
    "max_length": 48,
    "max_steps": 8,
    "lr_scheduler_type": "constant",  # with it `max_steps` no longer counts
    "prefix_sharing": False,
}
WAYS = {
    "": {},
    ", two passes, accumulated": {
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "save_steps": 1,
    },
    ", TRL's way": {"prefix_sharing": False},
    ", logs every third step": {"logging_steps": 3},
    ", length chosen from the data": {"max_length": "auto"},
    ", reference scored beforehand": {"precompute_ref_log_probs": True},
    ", all weights trained": {"use_peft": False, "learning_rate": 1e-3},
}


def killed(step: int, event: str, options: tuple[str, ...], settings: dict) -> None:
    run_dir = tiny.scratch("killed") / "run"
    done = tiny.run(run_dir, probe=SignalAtStep(signal.SIGKILL, step, event), **settings)
    assert done.code == -signal.SIGKILL, done.text[-1500:]
    again = tiny.run(run_dir, *options, **settings)
    assert again.code == 0, again.text[-1500:]
    assert "going on from" in again.text, again.text[-1500:]
    if settings.get("use_peft") is False:
        name = "model/model.safetensors"
        whole = tiny.uninterrupted(**settings) / name
        assert (run_dir / name).read_bytes() == whole.read_bytes()
    else:
        tiny.same_as_uninterrupted(run_dir, **settings)


def another_setting(key: str, value) -> None:
    run_dir = tiny.scratch("changed") / "run"
    shutil.copytree(interrupted(), run_dir)
    for options in (["--resume"], []):
        done = tiny.run(run_dir, *options, **{key: value})
        assert done.code == 1, done.text[-1500:]
        line = done.one_line()
        assert "is another run's" in line and f"`{key}`" in line, line
    assert not (run_dir / "adapter").exists()


def interrupted():
    """A run that was killed at step 4 of 6; made once."""
    if not _interrupted:
        run_dir = tiny.scratch("interrupted") / "run"
        tiny.run(run_dir, probe=SignalAtStep(signal.SIGKILL, 5))
        _interrupted.append(run_dir)
    return _interrupted[0]


_interrupted: list = []


def other_data() -> None:
    """The file has the same name, and one other word."""
    run_dir = tiny.scratch("data") / "run"
    folder = tiny.write_pairs(tiny.scratch("own"))
    tiny.run(run_dir, dataset_name=str(folder), probe=SignalAtStep(signal.SIGKILL, 5))
    tiny.write_pairs(folder, ("skt", *tiny.WORDS[1:]))
    done = tiny.run(run_dir, dataset_name=str(folder))
    assert done.code == 1 and "the training pairs differ" in done.one_line(), done.text


def other_model() -> None:
    """The folder has the same name, and other weights."""
    run_dir, folder = tiny.scratch("run") / "run", tiny.scratch("model") / "model"
    shutil.copytree(tiny.model(), folder)
    settings = {"model_name_or_path": str(folder)}
    tiny.run(run_dir, probe=SignalAtStep(signal.SIGKILL, 5), **settings)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    for place in range(len(raw) - 4000, len(raw), 4):
        raw[place] ^= 1
    file.write_bytes(raw)
    done = tiny.run(run_dir, **settings)
    assert done.code == 1 and "the weights differ" in done.one_line(), done.text


def moved() -> None:
    """Run folder, model and data have moved, and log and save settings are others: the same run."""
    run_dir = tiny.scratch("moved") / "run"
    shutil.copytree(interrupted(), run_dir)
    model, data = tiny.scratch("model") / "m", tiny.scratch("pairs") / "p"
    shutil.copytree(tiny.model(), model)
    shutil.copytree(tiny.pairs(), data)
    done = tiny.run(
        run_dir, "--resume", model_name_or_path=str(model), dataset_name=str(data), save_steps=1
    )
    assert done.code == 0, done.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def finished() -> None:
    """A finished run is not trained one step more, and not overwritten unasked."""
    run_dir = tiny.scratch("finished") / "run"
    shutil.copytree(tiny.uninterrupted(), run_dir)
    before = tiny.adapter(run_dir)
    refused = tiny.run(run_dir)
    assert refused.code == 1 and f"--output-dir {run_dir}-2" in refused.one_line(), refused.text
    assert tiny.adapter(run_dir) == before
    again = tiny.run(run_dir, "--resume")
    assert again.code == 0 and "step" not in again.text.split("going on")[1], again.text
    tiny.same_as_uninterrupted(run_dir)
    anew = tiny.run(run_dir, "--overwrite", seed=1)
    assert anew.code == 0, anew.text[-1500:]
    assert tiny.adapter(run_dir) != before
    assert (run_dir / "earlier/adapter/adapter_model.safetensors").read_bytes() == before


def finished_without_checkpoints() -> None:
    """What is left of such a run is told, and not to begin anew."""
    run_dir = tiny.scratch("finished") / "run"
    tiny.run(run_dir, save_strategy="no")
    done = tiny.run(run_dir, "--resume", save_strategy="no")
    assert done.code == 1 and "scripts.evaluate" in done.one_line(), done.text


def another_length(steps: int) -> None:
    """Under a constant rate a longer run goes on from a shorter one; a shorter one is refused."""
    run_dir, constant = tiny.scratch("length") / "run", {"lr_scheduler_type": "constant"}
    tiny.run(run_dir, probe=SignalAtStep(signal.SIGKILL, 6, "on_save"), **constant)
    done = tiny.run(run_dir, max_steps=steps, **constant)
    if steps > 6:
        assert done.code == 0 and "going on from" in done.text, done.text[-1500:]
        tiny.same_as_uninterrupted(run_dir, max_steps=steps, **constant)
    else:
        assert done.code == 1 and f"ask for {steps}" in done.one_line(), done.text[-1500:]
        assert not (run_dir / "adapter").exists()


def in_use() -> None:
    """A second run in the folder is refused while the first lives, not after it was killed."""
    run_dir = tiny.scratch("locked") / "run"
    first = tiny.start(run_dir, probe=SignalAtStep(signal.SIGSTOP, 3))
    try:
        first.wait_for("step    2/6")
        done = tiny.run(run_dir)
    finally:
        first.process.kill()
        first.process.join()
    assert done.code == 1, done.text
    assert "is in use by another process" in done.one_line(), done.text
    again = tiny.run(run_dir)
    assert again.code == 0, again.text[-1500:]
    tiny.same_as_uninterrupted(run_dir)


def no_lock() -> None:
    """Where the lock should be, there is a folder."""
    run_dir = tiny.scratch("locked") / "run"
    (run_dir / ".run.lock").mkdir(parents=True)
    done = tiny.run(run_dir)
    assert done.code == 1 and ".run.lock cannot be locked" in done.one_line(), done.text


def faults() -> Iterator[tuple[str, Callable[[], None]]]:
    for way, settings in WAYS.items():
        yield f"SIGKILL after step 3{way}", partial(killed, 3, "on_step_end", (), settings)
    for step in (4, 5):
        yield (
            f"SIGKILL at the start of step {step + 1}",
            partial(killed, step, "on_step_begin", ("--resume",), {}),
        )
    yield "SIGKILL once the last step is saved", partial(killed, 6, "on_save", (), {})
    for key, value in CHANGES.items():
        yield f"resumed with another {key}", partial(another_setting, key, value)
    yield "resumed with other data under the same name", other_data
    yield "resumed with another model under the same name", other_model
    yield "resumed after all has moved", moved
    for what, steps in (("longer", 8), ("shorter", 4)):
        yield f"a {what} run under a constant rate", partial(another_length, steps)
    yield "the command given again after the run has finished", finished
    yield "a finished run that kept no checkpoint", finished_without_checkpoints
    yield "a second run in a folder in use", in_use
    yield "a folder that cannot be locked", no_lock
