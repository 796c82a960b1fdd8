"""Bad input: what a config, an option or a path may not be, each refused in one line and at once.

Nothing is mocked and nothing loaded: all cases but the last few call the reader of configs itself,
which is what every command and the notebook call first.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from scripts import cli
from scripts.base import ROOT, InputError
from scripts.config import load_config, parse_overrides

AREA = "bad inputs"
DEFAULT = "configs/smollm2-135m-cpu.yaml"
PATIENCE = 2.0  # seconds to say no, once the libraries are there

# Values by key, as they stand after `--set KEY=`: the slips of people. Each is refused by the key's
# name before anything is loaded.
VALUES: dict[str, list[str]] = {
    "beta": ["0", "-1", ".nan", "small", "true", "''", "{a: 1}"],
    "learning_rate": ["1e6", ".inf", "-1e-5", "fast", "2"],
    "loss_weights": ["[0, 0]", "[-1, 1]", "[1]", "[1, x]"],
    "loss_type": ["sigmoidd", "[]", "dpo", "[sigmoid, sftt]"],
    "lora_r": ["0", "1.5", "true", "r"],
    "lora_dropout": ["-0.1", "1"],
    "lora_target_modules": ["3", "[q_proj, 3]", "lm_head"],
    "dtype": ["int7", "bf16", "auto", "null"],
    "attn_implementation": ["flash", "flash_attention_2"],
    "bnb_4bit_quant_type": ["nf5", "int4"],
    "use_peft": ["perhaps", "false"],
    "model_name_or_path": ["null", "''", "/no/such/folder", "./nowhere", "a/b/c", "README.md",
        "https://huggingface.co/a/b"],
    "dataset_name": ["null", "''", "/no/such.jsonl", "nowhere.jsonl", "scripts", "README.md",
        "ftp://x/y.jsonl"],
    "dataset_format": ["orka"],
    "dataset_columns": ["prompt", "[a, b]"],
    "dataset_train_split": ["test"],
    "train_samples": ["0", "1.5", "all"],
    "test_split_size": ["0", "1.5", "some"],
    "max_length": ["1", "-5", "long"],
    "per_device_train_batch_size": ["0", "2.5"],
    "gradient_accumulation_steps": ["0"],
    "max_steps": ["-7", "many"],
    "num_train_epochs": ["0", "-1"],
    "warmup_steps": ["-1", "few"],
    "save_steps": ["0", "often"],
    "save_strategy": ["sometimes", "1"],
    "eval_strategy": ["stepps"],
    "optim": ["adam", "paged_adamw"],
    "lr_scheduler_type": ["cosin"],
    "seed": ["-1", "4294967296", "x"],
    "report_to": ["wandbb", "comet_ml"],
    "wandb_project": ["''", "team/project"],
    "merge_dtype": ["bf16"],
    "output_dir": ["''", ".", "/", "data", "README.md", "/proc/run"],
    "resume_from_checkpoint": ["/no/such/checkpoint"],
    "push_to_hub": ["true"],
    "hub_token": ["hf_abcdefghijklmnop"],
    "gradient_checkpointing": ["true"],
    "fp16": ["true"],
}  # fmt: skip

# What must be taken although it looks odd.
TAKEN = [["save_strategy=no"], ["report_to=none"], ["learning_rate=5e-5"], ["max_steps=-1"],
         ["max_length=null"], ["lora_r=16.0"], ["loss_type=sigmoid", "loss_weights=null"],
         ["lora_target_modules=all-linear"], ["dtype=auto", "load_in_4bit=false"],
         ["save_steps=0.5"], ["warmup_steps=0.1"]]  # fmt: skip

NOT_OVERRIDES = ["beta", "", "=3", "beta=[1", "beta={", "betta=0.1", "BETA=0.1",
                 "lora_r=!!python/object:os.system"]  # fmt: skip

FILES: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- beta\n",
    "binary": bytes(range(256)),
    "latin-1": b"wandb_project: caf\xe9",
    "a tab": b"beta:\t0.1\n\tlora_r: 3\n",
    "a Python object": b"beta: !!python/object/apply:os.system ['true']\n",
    "an unclosed list": b"loss_weights: [1, 2\n",
    "deep": b"beta: " + b"[" * 3000,
    "no model": b"dataset_name: data\n",
    "no data": b"model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\n",
    "another tool's": b"base_model: a/b\ndatasets: [{path: x}]\nadapter: qlora\n",
}


def refused(act: Callable[[], object], *words: str) -> str:
    """The one line that `act` is refused with, in time; `words` must all be in it."""
    start = time.monotonic()
    try:
        act()
    except InputError as error:
        line, code = str(error), error.exit_code
    else:
        raise AssertionError("accepted")
    seconds = time.monotonic() - start
    assert code == 2, code
    assert line and "\n" not in line, f"not one line: {line!r}"
    assert len(line) < 700, f"{len(line)} characters: {line[:200]}"
    assert seconds < PATIENCE, f"after {seconds:.1f} s"
    missing = [word for word in words if word not in line]
    assert not missing, f"without {missing}: {line}"
    return line


def with_set(*pairs: str) -> Callable[[], object]:
    return lambda: load_config(DEFAULT, parse_overrides(pairs))


def _value(key: str, text: str) -> None:
    line = refused(with_set(f"{key}={text}"), key)
    assert "hf_abcdef" not in line, "the token is shown"


def _file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content)
        refused(lambda: load_config(path), "mine.yaml")


def model_folder(folder: Path, width: int = 8) -> Path:
    """A folder with all the files of a tiny model, in name; nothing of it is ever computed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"w": np.ones((width, width), np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _cut(folder: Path, size: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])


WEIGHTS = "model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (partial(_cut, size=-1), WEIGHTS),
    "weights empty": (partial(_cut, size=0), WEIGHTS),
    "weights are git-lfs's pointer": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), "git-lfs"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "no .safetensors"),
    "weights are a pickle": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "a part missing": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            '{"weight_map": {"w": "model-2.safetensors"}}'), "model-2.safetensors"),
    "folder gone": (shutil.rmtree, "no folder"),
}  # fmt: skip


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


def _build(**options: object) -> None:
    """Options of `data build` that argparse cannot check: refused before a model is looked for."""
    from scripts.pairs.build import make_judge, parse_styles

    args = cli.parse("data", ["build", "--prompts", "p"])
    vars(args).update(options)
    cfg = load_config(DEFAULT)
    refused(lambda: (parse_styles(args.samples), make_judge(args, cfg)), "--")


def _split(**values: str) -> None:
    """A misspelt split of data that is here names those that there are."""
    from scripts.data import source_of
    from scripts.pairs.sources import read_source

    cfg = load_config(DEFAULT, values)
    refused(lambda: read_source(source_of(cfg)), *values.values())


def _taken(*pairs: str) -> None:
    """What must be taken although it looks odd."""
    load_config(DEFAULT, parse_overrides(pairs))


def _taken(*pairs: str) -> None:
    load_config(DEFAULT, parse_overrides(pairs))


def _command(command: str, *words: str) -> None:
    """A command as a process of its own: exit code 2, one line, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-300:]}"
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in ("error: ", *words)), last


COMMANDS = [
    ("scripts.training --set beta=0", "`beta`", "above 0", "got 0"),
    ("scripts.export --config /no/such.yaml", "no config file"),
]


def faults() -> Iterable[tuple[str, Callable[[], None]]]:
    """Each case by its name; the callable raises `AssertionError` where it is not survived."""
    yield from processless()
    for command, *words in COMMANDS:
        yield f"python -m {command}", partial(_command, command, *words)


def processless() -> Iterator[tuple[str, Callable[[], None]]]:
    """All cases that need no process of their own."""
    for key, texts in VALUES.items():
        for text in texts:
            yield f"{key}={text}", partial(_value, key, text)
    for pair in NOT_OVERRIDES:
        yield f"--set {pair!r}", partial(refused, with_set(pair))
    for name, content in FILES.items():
        yield f"config file: {name}", partial(_file, content)
    for name, (damage, word) in DAMAGE.items():
        yield f"model: {name}", partial(_damage, damage, word)
    yield "data: an empty file", partial(_data, Path.touch, "is empty")
    yield "data: an empty folder", partial(_data, Path.mkdir, "no data")
    for samples in ("plain=0", "plain", "loud=3"):
        yield f"--samples {samples!r}", partial(_build, samples=samples)
    endpoint = {"judge": "endpoint", "judge_model": "m", "judge_url": "localhost:8000"}
    yield "--judge-url without http", partial(_build, **endpoint)
    yield "--judge reward without a model", partial(_build, judge="reward")
    yield "split misspelt", partial(_split, dataset_train_split="trian")
    for pairs in TAKEN:
        yield f"taken: {' '.join(pairs)}", partial(_taken, *pairs)
