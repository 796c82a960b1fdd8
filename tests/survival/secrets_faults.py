"""Secrets: runs with canary tokens, well and failing; no file, output or process may show them.

The tokens stand where a user has them: in the environment. A server on loopback plays W&B, which
refuses the key, so that the run goes on offline with the key at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.base import ROOT
from tests.loopback import Quiet, serving

AREA = "secrets"
CANARIES = {
    "HF_TOKEN": "hf_CANARYhfCANARYhfCANARYhfCANARY01",
    "WANDB_API_KEY": "CANARYwandb" + "a1b2c3d4e" * 3 + "77",
    "OPENAI_API_KEY": "sk-CANARYopenaiCANARYopenai01",
    "JUPYTER_TOKEN": "CANARYjupyterCANARY01",
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_model(folder: Path) -> Path:
    """A random Llama of two narrow layers that reads and writes bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=vocabulary["<|end|>"],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_pairs(folder: Path) -> Path:
    """Four pairs to train on and two to hold out."""
    rows = [
        {"prompt": f"Count to {n}.", "chosen": f"It is {n}.", "rejected": f"That is long, {n}."}
        for n in ("one", "two", "three", "four", "five", "six")
    ]
    folder.mkdir()
    for name, part in {"train": rows[:4], "test": rows[4:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def tiny_config(folder: Path, **values) -> Path:
    """A config of a run of two steps in `folder`."""
    config = {
        "model_name_or_path": str(tiny_model(folder / "model")),
        "dataset_name": str(tiny_pairs(folder / "pairs")),
        "output_dir": str(folder / "run"), "use_cpu": True, "bf16": False, "dtype": "float32",
        "merge_dtype": "float32", "use_peft": True, "lora_r": 2,
        "lora_target_modules": ["q_proj", "v_proj"], "max_length": 128, "max_steps": 2,
        "learning_rate": 1e-3, "optim": "adamw_torch", "per_device_train_batch_size": 2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "wandb", "max_new_tokens": 4,
        "activation_checkpointing": False,
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config | values))
    return path


@contextmanager
def refusing() -> Iterator[str]:
    """The address of a server that knows no key, whatever is asked of it."""

    class Handler(Quiet):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

    with serving(Handler) as address:
        yield address


def environment(folder: Path, url: str) -> dict[str, str]:
    """That of this process, with the canaries, all caches and homes in `folder`, and hub and W&B at
    `url`."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    places = {"HOME": home, "HF_HOME": home / "hf", "XDG_CACHE_HOME": home / "cache",
              "WANDB_DIR": home / "wandb", "WANDB_CACHE_DIR": home / "wandb-cache",
              "WANDB_CONFIG_DIR": home / "wandb-config", "TMPDIR": home,
              "IPYTHONDIR": home / "ipython", "JUPYTER_RUNTIME_DIR": home / "jupyter"}  # fmt: skip
    more = {"WANDB_BASE_URL": url, "HF_ENDPOINT": url, "HF_HUB_VERBOSITY": "debug"}
    return os.environ | {k: str(v) for k, v in places.items()} | more | CANARIES


def arguments_of_processes(of: int) -> set[str]:
    """The command lines of the process `of` and of all that it started."""
    lines = set()
    try:
        process = psutil.Process(of)
        for one in [process, *process.children(recursive=True)]:
            try:
                lines.add(" ".join(one.cmdline()))
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return lines


def run(folder: Path, *words: str) -> tuple[int, str, set[str]]:
    """Run a command with the canaries: its exit code, its output, and all command lines seen."""
    with refusing() as url:
        return _watched(words, environment(folder, url))


def _watched(words: tuple[str, ...], env: dict[str, str]) -> tuple[int, str, set[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    seen: set[str] = set()

    def watch() -> None:
        while process.poll() is None:
            seen.update(arguments_of_processes(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate(timeout=560)
    watcher.join()
    return process.returncode, output, seen


def leaks(folder: Path, output: str, lines: Iterable[str]) -> list[str]:
    """Where a canary, or its first sixteen characters, is to be read."""
    found = []
    for name, canary in CANARIES.items():
        begin = canary[:16].encode()
        for path in folder.rglob("*"):
            if path.is_file() and begin in path.read_bytes():
                found.append(f"{name} in {path.relative_to(folder)}")
        found += [f"{name} in the output"] * (begin.decode() in output)
        found += [
            f"{name} in the arguments of {line[:60]}" for line in lines if begin.decode() in line
        ]
    return found


def _run(words: list[str], code: int, *said: str, **values) -> None:
    """A run ends as it should, says what it should, and shows no canary anywhere."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = tiny_config(folder, **values)
        ended, output, lines = run(folder, *words, "--config", str(config))
        assert ended == code, f"exit code {ended}: {output[-600:]}"
        missing = [word for word in said if word not in output]
        assert not missing, f"without {missing}: {output[-600:]}"
        assert lines, "no process was looked at"
        found = leaks(folder, output, lines)
        assert not found, "; ".join(found)


def _refused(words: list[str]) -> None:
    """A token given where none belongs is refused, and not repeated."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = tiny_config(folder)
        code, output, _ = run(folder, *words, "--config", str(config))
        assert code == 2, f"exit code {code}: {output[-600:]}"
        assert not leaks(folder, output, ()), output[-600:]


def _a_leak_is_found() -> None:
    """The search itself: a canary that is written is found, in each of the places."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, canary = Path(temporary), CANARIES["HF_TOKEN"]
        (folder / "deep").mkdir()
        (folder / "deep" / "log.bin").write_bytes(b"\0\1" + canary.encode() + b"\2")
        found = leaks(folder, f"token={canary}", [f"python --token {canary}"])
        assert len(found) == 3, found


def faults() -> Iterable[tuple[str, Callable[[], None]]]:
    """Each run by its name; the callable raises `AssertionError` where a secret is shown."""
    training, notebook = ["scripts.training"], ["scripts.run"]
    yield "the search finds a leak", _a_leak_is_found
    yield "training", partial(_run, training, 0, "saved:")
    broken = {"max_length": 2, "lora_target_modules": ["no_such_proj"]}
    yield "training that fails", partial(_run, training, 1, "error", **broken)
    yield "training, no such model", partial(_run, training, 1, model_name_or_path="some/model")
    yield "notebook", partial(_run, notebook, 0, "Done in")
    yield "notebook that fails", partial(_run, notebook, 1, "failed in cell", **broken)
    token = CANARIES["HF_TOKEN"]
    yield "a token as hub_token", partial(_refused, [*training, "--set", f"hub_token={token}"])
    address = f"model_name_or_path=https://user:{token}@huggingface.co/a/b"
    yield "a token in an address", partial(_refused, [*training, "--set", address])
    yield "a token as another value", partial(_refused, [*training, "--set", f"beta={token}"])
    yield "a token as key", partial(_refused, [*training, "--set", f"{token}=1"])
