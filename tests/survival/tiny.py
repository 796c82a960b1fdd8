"""Runs of a tiny random Llama in processes of their own, which faults may kill, starve or stop.

The processes are forked from one server that has the libraries loaded, so that each takes a second
or two and not the ten that loading takes; they are real ones, with real signals and limits.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

WORDS = ("sky", "bee", "sea", "sun", "ice", "oak", "fox", "owl")
SETTINGS = {
    "load_in_4bit": False, "dtype": "float32", "merge_dtype": "float32", "bf16": False,
    "loss_type": "sigmoid", "loss_weights": None, "report_to": "none", "max_steps": 6,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "warmup_steps": 1,
    "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2,
    "save_total_limit": 2, "lora_r": 4, "max_length": 64,
}  # fmt: skip


class Done(NamedTuple):
    """How a run ended."""

    code: int  # exit code, or minus the signal that killed it
    text: str  # what it printed, errors too

    def one_line(self) -> str:
        """The one line that it ended with; an `AssertionError` if there was a traceback."""
        assert "Traceback" not in self.text, self.text[-1500:]
        errors = [x for x in self.text.splitlines() if x.startswith(("error: ", "stopped by"))]
        assert len(errors) == 1, self.text[-1500:]
        return errors[0]


def write_model(folder: Path) -> None:
    """A random two-layer Llama with a byte-level tokenizer, 70 kB in all."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.conftest import LLAMA3_TEMPLATE, SPECIALS

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([name for name in SPECIALS if "reserved" not in name])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id, pad_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_pairs(folder: Path, words: tuple[str, ...] = WORDS) -> Path:
    """Eight training pairs and two held out, as text."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": f"What of the {w}?", "chosen": f"A {w}.", "rejected": f"{w} " * (i % 3 + 2)}
        for i, w in enumerate((*words, "elm", "ant"))
    ]
    for name, part in (("train", rows[:-2]), ("test", rows[-2:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@functools.cache
def _home() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="survival-")


def scratch(name: str) -> Path:
    """A new folder that goes when the runner ends."""
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_home().name))


@functools.cache
def model() -> Path:
    folder = scratch("model")
    process = _server().Process(target=write_model, args=(folder,))
    process.start()
    process.join()
    return folder


@functools.cache
def pairs() -> Path:
    return write_pairs(scratch("pairs"))


@functools.cache
def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.training", "tests.survival.tiny"])
    return context


def _child(log: Path, command: str, arguments: list[str], probe, limits: dict) -> None:
    """In the forked process: what `python -m scripts.<command> <arguments>` does."""
    # Through a pipe: a limit on the size of files, which a fault may set, is not for pipes.
    with log.open("wb") as file:
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
    os.dup2(cat.stdin.fileno(), 1)
    os.dup2(cat.stdin.fileno(), 2)
    cat.stdin.close()
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - to the end
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    import importlib

    from scripts import cli
    from scripts.quiet import quiet

    quiet()
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if probe:
        probe()
    try:
        main = importlib.import_module(f"scripts.{command}").main
        cli.command(main, cli.parse(command, arguments))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Started(NamedTuple):
    process: BaseProcess
    log: Path

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until it has printed `text`."""
        for _ in range(int(seconds / 0.1)):
            if self.log.exists() and text in self.log.read_text(errors="replace"):
                return
            if not self.process.is_alive():
                break
            self.process.join(0.1)
        raise AssertionError(f"it never said {text!r}: {self.log.read_text()[-1500:]}")

    def end(self, seconds: float = 120) -> Done:
        """Wait for it."""
        self.process.join(seconds)
        time.sleep(0.05)  # its last words are still on their way
        text = self.log.read_text(errors="replace")
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"it hangs: {text[-300:]}")
        return Done(self.process.exitcode, text)


def start(
    run_dir: Path,
    *options: str,
    probe: Callable[[], None] | None = None,
    limits: dict[int, int] | None = None,
    command: str = "training",
    **overrides,
) -> Started:
    """Start a tiny run in `run_dir`; `probe`, a function of a module, is called in it first."""
    values = {"model_name_or_path": str(model()), "dataset_name": str(pairs())}
    values |= SETTINGS | overrides
    sets = [f"--set={key}={json.dumps(value)}" for key, value in values.items()]
    arguments = ["--config", "configs/smollm2-135m-cpu.yaml", "--output-dir", str(run_dir)]
    log = scratch("log") / "log.txt"
    process = _server().Process(
        target=_child, args=(log, command, [*arguments, *sets, *options], probe, limits or {})
    )
    process.start()
    return Started(process, log)


def run(run_dir: Path, *options: str, **more) -> Done:
    """`start`, and wait for its end."""
    return start(run_dir, *options, **more).end()


def adapter(run_dir: Path) -> bytes:
    """The weights that the run saved."""
    file = run_dir / "adapter" / "adapter_model.safetensors"
    assert file.exists(), f"no adapter in {run_dir}"
    return file.read_bytes()


@functools.cache
def _uninterrupted(settings: tuple) -> Path:
    run_dir = scratch("whole") / "run"
    done = run(run_dir, **{key: json.loads(value) for key, value in settings})
    assert done.code == 0, done.text[-1500:]
    return run_dir


def uninterrupted(**overrides) -> Path:
    """The folder of the same run that nothing happened to."""
    return _uninterrupted(tuple(sorted((k, json.dumps(v)) for k, v in overrides.items())))


def same_as_uninterrupted(run_dir: Path, **overrides) -> None:
    """The adapter is the uninterrupted run's bit for bit, and every step is logged once, alike."""
    whole = uninterrupted(**overrides)
    assert adapter(run_dir) == adapter(whole), "the adapter differs from the uninterrupted run's"
    mine, theirs = steps(run_dir), steps(whole)
    assert mine == theirs, f"the logs differ: {mine} and {theirs}"


def steps(run_dir: Path) -> list[tuple]:
    """Step, loss and margin of every training log, in the order of the file."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return [(r["step"], r["loss"], r["rewards/margins"]) for r in rows if "loss" in r]
