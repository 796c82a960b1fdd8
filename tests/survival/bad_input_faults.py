"""Bad input: the mistakes that people make in a config, an option or a path.

Each is refused in one line, before anything is loaded. Nothing is mocked: all
cases but the last few call the reader of configs itself, as every command and the notebook do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from scripts.base import ROOT, InputError
from scripts.config import load_config, parse_overrides

AREA = "bad inputs"
DEFAULT = "configs/smollm2-135m-cpu.yaml"
WEIGHTS = "model.safetensors"

# `--set` as it is mistyped, and words that the line must have.
SETS: dict[str, tuple[str, ...]] = {
    "betta=0.1": ("betta", "beta"),
    "lora_rank=8": ("lora_rank", "lora_r"),
    "beta": ("key=value",),
    "beta=0": ("beta",),
    "beta=small": ("beta",),
    "beta=[0.1": ("beta",),
    "learning_rate=fast": ("learning_rate",),
    "learning_rate=2": ("learning_rate",),
    "loss_type=dpo": ("loss_type",),
    "beta={a: 1}": ("beta",),
    "lora_r=0": ("lora_r",),
    "lora_target_modules=lm_head": ("lora_target_modules",),
    "dtype=bf16": ("dtype", "bfloat16"),
    "dtype=auto": ("dtype", "bfloat16"),
    "attn_implementation=flash": ("attn_implementation", "sdpa"),
    "attn_implementation=flash_attention_2": ("attn_implementation", "flash_attn"),
    "bnb_4bit_quant_type=int4": ("bnb_4bit_quant_type", "nf4"),
    "optim=paged_adamw": ("paged_adamw", "adamw_torch"),
    "report_to=wandbb": ("report_to", "wandb"),
    "report_to=comet_ml": ("report_to", "not installed"),
    "wandb_project=team/project": ("wandb_project",),
    "fp16=true": ("fp16",),
    "hub_token=hf_abcdefghijklmnop": ("hub_token",),
    "push_to_hub=true": ("push_to_hub",),
    "lora_dropout=1.5": ("lora_dropout",),
    "load_in_4bit=perhaps": ("load_in_4bit",),
    "max_length=0": ("max_length",),
    "max_steps=many": ("max_steps",),
    "per_device_train_batch_size=0": ("per_device_train_batch_size",),
    "save_strategy=sometimes": ("SaveStrategy", "steps"),
    "merge_dtype=int7": ("merge_dtype",),
    "on_bad_rows=keep": ("on_bad_rows",),
    "model_name_or_path=null": ("model_name_or_path",),
    "model_name_or_path=/no/such/folder": ("/no/such/folder",),
    "model_name_or_path=README.md": ("README.md",),
    "dataset_name=nowhere.jsonl": ("nowhere.jsonl",),
    "dataset_name=scripts": ("scripts",),
    "output_dir=README.md": ("README.md",),
    "output_dir=/proc/run": ("/proc/run",),
}

FILES: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- beta\n",
    "binary": bytes(range(256)),
    "latin-1": b"wandb_project: caf\xe9",
    "a key twice": b"beta: 0.1\nbeta: 0.2\n",
    "a tab": b"beta:\t0.1\n\tlora_r: 3\n",
    "an unclosed list": b"loss_weights: [1, 2\n",
    "a Python object": b"beta: !!python/object/apply:os.system ['true']\n",
    "no model": b"dataset_name: data\n",
    "no data": b"model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\n",
    "another tool's": b"base_model: a/b\ndatasets: [{path: x}]\nadapter: qlora\n",
}


def refused(act: Callable[[], object], *words: str) -> None:
    """`act` is refused in one line with all `words` in it."""
    try:
        act()
    except InputError as error:
        line = str(error)
    else:
        raise AssertionError("accepted")
    assert line and "\n" not in line and len(line) < 700, line[:900]
    missing = [word for word in words if word not in line]
    assert not missing, f"without {missing}: {line}"


def model_folder(folder: Path, width: int = 8) -> Path:
    """A folder with all the files of a tiny model, in name; nothing of it is ever computed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"w": np.ones((width, width), np.float32)}, folder / WEIGHTS)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (lambda f: os.truncate(f / WEIGHTS, 300), WEIGHTS),
    "weights are git-lfs's pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), "git-lfs"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "safetensors"),
    "weights are a pickle": (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "safetens"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "folder gone": (shutil.rmtree, "no folder"),
}  # fmt: skip

# What must be taken although it looks odd.
TAKEN = ["save_strategy=no", "report_to=none", "learning_rate=5e-5", "max_steps=-1", "lora_r=16.0",
         "max_length=null", "lora_target_modules=all-linear", "save_steps=0.5"]  # fmt: skip


def _file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content)
        refused(lambda: load_config(path), "mine.yaml")


def _damage(damage: Callable[[Path], object], word: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(Path(temporary) / "model")
        values = {"model_name_or_path": str(folder), "output_dir": f"{temporary}/run"}
        load_config(DEFAULT, values)  # whole, it is taken
        damage(folder)
        refused(lambda: load_config(DEFAULT, values), word)


def _data(make: Callable[[Path], object], word: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "pairs.jsonl"
        make(path)
        refused(lambda: load_config(DEFAULT, {"dataset_name": str(path)}), word)


def _command(command: str, *words: str) -> None:
    """A command as a process of its own: one line, no traceback, exit code 1 or 2."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode in (1, 2), f"exit code {done.returncode}: {done.stderr[-300:]}"
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("error: ", *words)), last


COMMANDS = [
    ("scripts.training --set beta=0", "`beta`", "got 0"),
    ("scripts.run --set beta=0", "`beta`"),
    ("scripts.export --config /no/such.yaml", "no config file"),
    ("scripts.data build --prompts /no/such.jsonl", "/no/such.jsonl"),
    ("scripts.doctor /no/such/run", "/no/such/run"),
]


def processless() -> Iterator[tuple[str, Callable[[], None]]]:
    """All cases that need no process of their own."""
    for pair in TAKEN:
        yield f"taken: {pair}", partial(_load, pair)
    for pair, words in SETS.items():
        yield f"--set {pair}", partial(refused, partial(_load, pair), *words)
    for name, content in FILES.items():
        yield f"config file: {name}", partial(_file, content)
    for name, (damage, word) in DAMAGE.items():
        yield f"model: {name}", partial(_damage, damage, word)
    yield "data: an empty file", partial(_data, Path.touch, "no data")
    yield "data: an empty folder", partial(_data, Path.mkdir, "no data")
    yield "data: gone", partial(_data, lambda path: None, "no file or folder")


def _load(pair: str) -> None:
    load_config(DEFAULT, parse_overrides([pair]))


def faults() -> Iterable[tuple[str, Callable[[], None]]]:
    """Each case by its name; the callable raises `AssertionError` where it is not survived."""
    yield from processless()
    for command, *words in COMMANDS:
        yield f"python -m {command}", partial(_command, command, *words)
