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
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from scripts import cli
from scripts.base import ROOT, InputError
from scripts.config import load_config, parse_overrides

AREA = "bad inputs"
DEFAULT = "configs/smollm2-135m-cpu.yaml"
PATIENCE = 2.0  # seconds to say no, once the libraries are there

# Values by key, as they stand after `--set KEY=`. Every one is refused by the key's name.
VALUES: dict[str, list[str]] = {
    "beta": ["0", "-1", ".nan", ".inf", "-.inf", "1e9", "small", "[0.1]", "true", "null", "''"],
    "learning_rate": ["1e6", ".inf", ".nan", "-1e-5", "fast", "2", "1e400"],
    "loss_weights": ["[0, 0]", "[-1, 1]", "[1]", "[1, .nan]", "[1, .inf]", "[1, x]", "0.5"],
    "loss_type": ["sigmoidd", "[]", "dpo", "[sigmoid, sftt]", "3", "null", "''"],
    "label_smoothing": ["2", "0.5", "-0.1", ".nan", "much"],
    "ld_alpha": ["-0.1", "1.5", ".nan"],
    "f_divergence_type": ["forward", "kl", "1", "null"],
    "f_alpha_divergence_coef": ["0", "1", ".nan"],
    "discopop_tau": ["0", "-1", ".inf"],
    "ref_model_mixup_alpha": ["-0.1", "1.1"],
    "ref_model_sync_steps": ["0", "-5", "1.5"],
    "lora_r": ["0", "-8", "1.5", "true", "100000", "r", ".inf"],
    "lora_alpha": ["0", "-1", "x", ".nan"],
    "lora_dropout": ["-0.1", "1", "1.5", ".nan", ".inf"],
    "lora_target_modules": ["3", "{a: 1}", "[q_proj, 3]", "''", "[]", "lm_head"],
    "lora_task_type": ["SEQ_CLS", "CAUSAL", "1"],
    "dtype": ["int7", "bf16", "float8", "auto", "null", "16"],
    "attn_implementation": ["flash", "sdpaa", "flash_attention_2", "1", "''"],
    "bnb_4bit_quant_type": ["nf5", "int4", "4", "null"],
    "bnb_4bit_quant_storage": ["int3", "uint"],
    "load_in_4bit": ["perhaps", "4", "[true]"],
    "use_peft": ["perhaps", "false", "2"],
    "model_name_or_path": ["null", "''", "' '", "/no/such/folder", "./nowhere", "~/nowhere",
        "https://huggingface.co/a/b", "a/b/c", "a b", "3", "[a]", "README.md"],
    "model_revision": ["null", "''", "1"],
    "dataset_name": ["null", "''", "/no/such.jsonl", "nowhere.jsonl", "./nowhere", "scripts",
        "README.md", "ftp://x/y.jsonl", "7"],
    "dataset_format": ["orka", "1", "null"],
    "dataset_columns": ["prompt", "{a: 3}", "{a: ''}", "[a, b]"],
    "dataset_train_split": ["null", "''", "3", "test"],
    "dataset_test_split": ["''", "train", "[test]"],
    "dataset_streaming": ["true", "often"],
    "on_bad_rows": ["keep", "1", "null"],
    "train_samples": ["0", "-3", "1.5", "all", "true"],
    "eval_samples": ["0", "-1", "x"],
    "eval_prompts": ["0", "-1", "1.5"],
    "test_split_size": ["-1", "0", "1", "1.5", ".nan", "some"],
    "max_new_tokens": ["0", "-1", "1e9", "x"],
    "generation_batch_size": ["0", "-1", "1e9"],
    "max_length": ["1", "0", "-5", "x", "2.5"],
    "truncation_mode": ["middle", "keep", "1"],
    "pad_to_multiple_of": ["0", "-8", "x"],
    "padding_free": ["true"],
    "per_device_train_batch_size": ["0", "-1", "1e9", "2.5"],
    "per_device_eval_batch_size": ["0", "-1"],
    "gradient_accumulation_steps": ["0", "-1", "1.5"],
    "eval_accumulation_steps": ["0", "-1"],
    "precompute_ref_batch_size": ["0", "-1"],
    "max_steps": ["-7", "0", "1.5", "many"],
    "num_train_epochs": ["0", "-1", ".nan", ".inf", "1e9"],
    "warmup_steps": ["-1", ".nan", "1.5", "few"],
    "logging_steps": ["-2", "0", "1.5", ".nan", ".inf"],
    "save_steps": ["-1", "0", "1.5", "often"],
    "eval_steps": ["-1", "0", ".nan"],
    "eval_delay": ["-1", ".nan"],
    "save_total_limit": ["0", "-1", "1.5"],
    "save_strategy": ["sometimes", "true", "1", "null"],
    "eval_strategy": ["stepps", "true", "null"],
    "logging_strategy": ["noo", "1"],
    "optim": ["adam", "galore_adamw", "1", "null", "adamw_torch_4bit"],
    "lr_scheduler_type": ["cosin", "cosine_with_min_lr", "warmup_stable_decay", "1"],
    "lr_scheduler_kwargs": ["{no_such: 1}", "3"],
    "weight_decay": ["-0.1", ".nan", "2"],
    "max_grad_norm": ["-1", ".nan", ".inf"],
    "adam_beta1": ["1", "1.5", "-0.1", ".nan"],
    "adam_beta2": ["1", "2", "-0.1"],
    "adam_epsilon": ["0", "-1e-8", ".nan"],
    "label_smoothing_factor": ["1", "-1"],
    "neftune_noise_alpha": ["-1"],
    "seed": ["-1", "4294967296", "1.5", "x", "2024-13-45", "2024-01-01", "[1]"],
    "data_seed": ["-1", "4294967296"],
    "dataloader_num_workers": ["-1", "100000"],
    "dataloader_prefetch_factor": ["0", "2"],
    "dataset_num_proc": ["0", "-1"],
    "report_to": ["wandbb", "1", "[wandb, wb]", "comet_ml"],
    "wandb_project": ["''", "a/b", "a#b", "3"],
    "run_name": ["3", "''"],
    "merge_dtype": ["int7", "float8", "null", "bf16"],
    "merge_into": ["nf4", "orig", "null", "1"],
    "prefix_sharing": ["perhaps"],
    "prefix_attention": ["flash", "1"],
    "output_dir": ["''", "3", ".", "/", "data", "/dev/null/run", "README.md", "/proc/run"],
    "resume_from_checkpoint": ["/no/such/checkpoint", "true", "''"],
    "push_to_hub": ["true", "perhaps"],
    "hub_token": ["hf_abcdefghijklmnop"],
    "use_liger_kernel": ["true"],
    "sync_ref_model": ["true"],
    "fp16": ["true"],
    "ddp_timeout": ["0", "-1"],
    "ddp_backend": ["smoke"],
    "train_sampling_strategy": ["randomly"],
    "log_level": ["loud"],
    "gradient_checkpointing": ["true"],
    "torch_empty_cache_steps": ["0", "-1"],
    "deepspeed": ["/no/such.json"],
    "debug": ["everything"],
    "accelerator_config": ["/no/such.json", "{no_such: 1}"],
}  # fmt: skip

# Settings that are each good, and together not.
TOGETHER = {
    "exo_pair without smoothing": ["loss_type=exo_pair", "loss_weights=null"],
    "divergence with nca_pair": ["loss_type=nca_pair", "loss_weights=null",
                                 "f_divergence_type=forward_kl"],
    "weighting with aot": ["loss_type=aot", "loss_weights=null", "use_weighting=true"],
    "precompute with streaming": ["precompute_ref_log_probs=true", "dataset_streaming=true"],
    "padding_free with sharing": ["padding_free=true", "prefix_sharing=true"],
    "4 and 8 bits": ["load_in_4bit=true", "load_in_8bit=true"],
    "8 bits trained themselves": ["load_in_4bit=false", "load_in_8bit=true", "use_peft=false"],
    "bf16 and fp16": ["bf16=true", "fp16=true"],
    "best model without evaluation": ["load_best_model_at_end=true"],
    "one weight for two losses": ["loss_weights=[1]"],
    "a synced reference and precomputing": ["sync_ref_model=true", "use_peft=false",
        "load_in_4bit=false", "precompute_ref_log_probs=true"],
}  # fmt: skip

NOT_OVERRIDES = ["beta", "", "=", "=3", "beta=[1", "beta={", "beta='", "betta=0.1", "BETA=0.1",
                 "beta =\t@", "lora_r=!!python/object:os.system", "beta=&a [*a]", "beta=*a",
                 "seed=" + "9" * 5000, "beta=" + "[" * 3000, "beta=\0", "x=2024-99-99"]  # fmt: skip

FILES: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- beta\n",
    "a word": b"beta",
    "a number": b"3",
    "binary": bytes(range(256)),
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "NUL bytes": b"beta: 0.1\x00",
    "latin-1": b"wandb_project: caf\xe9",
    "UTF-16": "beta: 0.1".encode("utf-16"),
    "a key twice": b"beta: 0.1\nbeta: 0.2\n",
    "a list as key": b"? [a, b]\n: 1\n",
    "a mapping as key": b"? {a: b}\n: 1\n",
    "a number as key": b"1: 2\n",
    "null as key": b"null: 2\n",
    "two documents": b"beta: 0.1\n---\nbeta: 0.2\n",
    "a tab": b"beta:\t0.1\n\tlora_r: 3\n",
    "an unknown tag": b"beta: !thing 0.1\n",
    "a Python object": b"beta: !!python/object/apply:os.system ['true']\n",
    "an unclosed list": b"loss_weights: [1, 2\n",
    "an alias to nothing": b"beta: *there\n",
    "itself": b"loss_weights: &a [*a]\n",
    "deep": b"beta: " + b"[" * 3000,
    "JSON cut": b'{"beta": 0.1',
    "no model": b"dataset_name: data\n",
    "no data": b"model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct\n",
    "an unknown key": b"model_name_or_path: a/b\ndataset_name: data\nlora_rank: 8\n",
    "another tool's": b"base_model: a/b\ndatasets: [{path: x}]\nadapter: qlora\n",
}

NO_CONFIG = [
    None,
    3,
    "",
    " ",
    [],
    {"a": 1},
    True,
    b"x",
    "no/such.yaml",
    "configs",
    "a\0b",
    "x" * 5000,
]
NO_OVERRIDES = ["beta=0.2", 3, ["beta=0.2"], 0.5, True, {"beta": "x"}, {"beta": [1]}, {3: 4},
                {None: 1}, {"betta": 1}, {"beta": {"a": 1}}, {"output_dir": 7}]  # fmt: skip

OPTIONS = [
    "plan --pairs -3", "plan --pairs 0", "plan --pairs x", "plan --pairs 1.5",
    "benchmark --repeats 0", "benchmark --repeats -1", "benchmark --formats int3",
    "data build --prompts p --max-new-tokens 0", "data build --prompts p --temperature -1",
    "data build --prompts p --temperature nan", "data build --prompts p --temperature inf",
    "data build --prompts p --top-p 0", "data build --prompts p --top-p 1.5",
    "data build --prompts p --batch-size 0", "data build --prompts p --seed -1",
    "data build --prompts p --judge coin", "data build --prompts p --pairs-per-prompt 0",
    "data build --prompts p --least-gap x", "data build --prompts p --backend tgi",
    "data build",
    "training --no-such-option", "run --resume=3",
]  # fmt: skip


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


def _nearest(key: str, text: str, good: str) -> None:
    """The line tells the value, and a nearest good one, which is then taken."""
    line = refused(with_set(f"{key}={text}"), "must be", "got", f"nearest good value is {good}")
    suggestion = line.split("nearest good value is ")[1]
    load_config(DEFAULT, parse_overrides([f"{key}={suggestion}"]))


NEAREST = [
    ("beta", "0", "0.1"), ("beta", "-1", "0.1"), ("beta", "1e9", "100"), ("lora_r", "0", "1"),
    ("lora_r", "100000", "8192"), ("lora_dropout", "-0.1", "0"), ("max_steps", "-7", "-1"),
    ("logging_steps", "-2", "10"), ("label_smoothing", "2", "0"), ("adam_beta1", "1.5", "0.9"),
    ("learning_rate", "1e6", "1"), ("test_split_size", "-1", "auto"), ("max_new_tokens", "0", "1"),
    ("save_strategy", "sometimes", "steps"), ("save_strategy", "noo", '"no"'),
    ("optim", "adamw", "adamw_torch"), ("merge_dtype", "float15", "float16"),
    ("bnb_4bit_quant_type", "nf5", "nf4"), ("lora_r", "2.5", "2"), ("max_length", "-5", "2"),
    ("seed", "4294967296", "4294967295"), ("report_to", "wandbb", "wandb"),
]  # fmt: skip


def _file(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.yaml"
        path.write_bytes(content)
        refused(lambda: load_config(path), "mine.yaml")


def _option(words: str) -> None:
    name, *rest = words.split()
    errors = StringIO()
    try:
        with redirect_stderr(errors):
            cli.parse(name, rest)
    except SystemExit as end:
        assert end.code == 2, end.code
    else:
        raise AssertionError("accepted")
    assert "error:" in errors.getvalue().splitlines()[-1]


def model_folder(folder: Path, width: int = 8) -> Path:
    """A folder with all the files of a tiny model, in name; nothing of it is ever computed."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    save_file({"w": np.ones((width, width), np.float32)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _rename(folder: Path, old: str, new: str) -> None:
    (folder / old).rename(folder / new)


def _cut(folder: Path, name: str, size: int) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def _index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)


WEIGHTS = "model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (partial(_cut, name=WEIGHTS, size=200), WEIGHTS),
    "weights cut by a byte": (partial(_cut, name=WEIGHTS, size=-1), WEIGHTS),
    "weights cut in the header": (partial(_cut, name=WEIGHTS, size=20), WEIGHTS),
    "weights empty": (partial(_cut, name=WEIGHTS, size=0), "is empty"),
    "weights are text": (lambda f: (f / WEIGHTS).write_text("version https://git-lfs"), WEIGHTS),
    "weights hold no tensor": (lambda f: save_file({}, f / WEIGHTS), "no tensor"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), "no weights"),
    "weights are a pickle": (
        partial(_rename, old=WEIGHTS, new="pytorch_model.bin"), "pytorch_model.bin"),
    "weights are a .pt": (partial(_rename, old=WEIGHTS, new="model.pt"), "model.pt"),
    "config missing": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config empty": (partial(_cut, name="config.json", size=0), "config.json"),
    "config cut": (partial(_cut, name="config.json", size=9), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config of no family": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "config of an unknown family": (
        lambda f: (f / "config.json").write_text('{"model_type": "lama"}'), "lama"),
    "config of a list as family": (
        lambda f: (f / "config.json").write_text('{"model_type": ["llama"]}'), "model_type"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "tokenizer cut": (partial(_cut, name="tokenizer.json", size=5), "tokenizer.json"),
    "tokenizer config broken": (partial(_cut, name="tokenizer_config.json", size=1),
                                "tokenizer_config.json"),
    "generation config broken": (
        lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
    "index without its parts": (
        partial(_index, content='{"weight_map": {"w": "model-2.safetensors"}}'),
        "model-2.safetensors"),
    "index broken": (partial(_index, content="{"), "index.json"),
    "index without a map": (partial(_index, content="{}"), "weight_map"),
    "folder empty": (lambda f: [path.unlink() for path in f.iterdir()], "config.json"),
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


def _case(text: str) -> None:
    from scripts.plan import parse_case

    refused(lambda: parse_case(text), repr(text))


def _split(**values: str) -> None:
    """A misspelt split of data that is here names those that there are."""
    from scripts.pairs.sources import require_splits

    cfg = load_config(DEFAULT, values)
    refused(lambda: require_splits(cfg), *values.values())


def _taken(*pairs: str) -> None:
    """What must be taken although it looks odd."""
    load_config(DEFAULT, parse_overrides(pairs))


TAKEN = [["save_strategy=no"], ["eval_strategy=no"], ["logging_strategy=no"], ["report_to=none"],
         ["learning_rate=5e-5"], ["max_steps=-1"], ["max_length=null"], ["lora_r=16.0"],
         ["loss_type=sigmoid", "loss_weights=null"], ["lora_target_modules=all-linear"],
         ["attn_implementation=eager"], ["dtype=auto", "load_in_4bit=false"],
         ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 0.0}"],
         ["save_steps=0.5"], ["warmup_steps=0.1"], ["report_to=[wandb]"]]  # fmt: skip


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
    ("scripts.training --set beta=0", "`beta`", "above 0", "got 0", "0.1"),
    ("scripts.run --set dtype=int7", "`dtype`"),
    ("scripts.plan --pairs -3", "--pairs"),
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
    for key, text, good in NEAREST:
        yield f"nearest to {key}={text}", partial(_nearest, key, text, good)
    for name, pairs in TOGETHER.items():
        yield name, partial(refused, with_set(*pairs))
    for pair in NOT_OVERRIDES:
        yield f"--set {pair[:30]!r}", partial(refused, with_set(pair))
    for name, content in FILES.items():
        yield f"config file: {name}", partial(_file, content, name)
    for value in NO_CONFIG:
        yield f"config {str(value)[:20]!r}", partial(refused, partial(load_config, value))
    for value in NO_OVERRIDES:
        yield f"overrides {value!r}", partial(refused, partial(load_config, DEFAULT, value))
    for words in OPTIONS:
        yield words, partial(_option, words)
    for name, (damage, word) in DAMAGE.items():
        yield f"model: {name}", partial(_damage, damage, word)
    yield "data: an empty file", partial(_data, Path.touch, "is empty")
    yield "data: an empty folder", partial(_data, Path.mkdir, "no data")
    yield "data: gone", partial(_data, lambda path: None, "no file or folder")
    for text in ("0/1/1x1", "1/1x1", "a/b/cx1", "1/1/1x0", "-1/1/1x1", "1/1/1", ""):
        yield f"case {text!r}", partial(_case, text)
    for samples in ("plain=0", "plain", "loud=3", "plain=-1", "plain=1.5", "plain=9999999", ""):
        yield f"--samples {samples!r}", partial(_build, samples=samples)
    for url in ("localhost:8000", "ftp://x", "", None):
        more = {"judge": "endpoint", "judge_model": "m", "judge_url": url}
        yield f"--judge-url {url!r}", partial(_build, **more)
    yield "--judge reward without a model", partial(_build, judge="reward")
    yield "split misspelt", partial(_split, dataset_train_split="trian")
    yield "test split misspelt", partial(_split, dataset_test_split="tset")
    for pairs in TAKEN:
        yield f"taken: {' '.join(pairs)}", partial(_taken, *pairs)
