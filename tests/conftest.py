"""What the tests share: a tiny model shaped like Llama 3, a few pairs, and servers on loopback."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import DPOTrainer

from scripts.config import Config, load_config
from scripts.data import load_preferences
from scripts.model import load_tokenizer
from scripts.training import assemble
from tests.loopback import Quiet, serving

# Llama 3 has 128,000 tokens, and 256 special ones after them; the tests' tokenizer has fewer.
WORDS, LLAMA3_WORDS = 1000, 128_000
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{i}|>" for i in range(2, 256))]
SPECIALS[6], SPECIALS[7], SPECIALS[9] = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
VOCABULARY, BOT, EOT = WORDS + len(SPECIALS), WORDS, WORDS + 9
LLAMA3_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PAIRS = [
    ("What is the capital of France?", "Paris.", "That is a long story, and it begins long ago."),
    (
        "Name a prime number.",
        "Seven.",
        "Numbers are many, and some of them are prime, as you know.",
    ),
    ("Is water wet?", "Yes.", "Wetness is a matter that has been debated at length by many."),
    (
        "What do bees make?",
        "Honey.",
        "Bees are insects. Insects have six legs. Legs are for walking.",
    ),
    ("How many days has a week?", "Seven days.", "Weeks go by and by, and every one is a week."),
    (
        "Who wrote Hamlet?",
        "Shakespeare.",
        "A play is written by someone, and someone wrote this one.",
    ),
]


def llama3_tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with Llama 3's special tokens and chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    vocabulary |= {f"<filler_{i}>": i for i in range(len(alphabet), words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    # Like Llama 3's own, it puts a begin-of-text before whatever it is given.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", words)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA3_TEMPLATE,
    )


def pairs_of(cfg: Config) -> DatasetDict:
    """The pairs of `cfg`, by the tokenizer of its model."""
    return load_preferences(cfg, load_tokenizer(cfg.model.model_name_or_path))


def write_llama(folder: Path, words: int = WORDS) -> Path:
    """Fill `folder` with a random two-layer Llama and its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words + len(SPECIALS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=words,
        eos_token_id=words + 9,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    llama3_tokenizer(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama3(tmp_path_factory) -> Path:
    """A folder with a random two-layer Llama that has Llama 3's special tokens and chat format."""
    return write_llama(tmp_path_factory.mktemp("tiny-llama3"))


@pytest.fixture(scope="session")
def llama3_vocabulary(tmp_path_factory) -> Path:
    """The same with all of Llama 3's 128,256 tokens."""
    return write_llama(tmp_path_factory.mktemp("llama3-vocabulary"), LLAMA3_WORDS)


@pytest.fixture(scope="session")
def reward_folder(tiny_llama3, tmp_path_factory) -> Path:
    """A folder with a tiny random reward model and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama3, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    llama3_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def explicit(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def pairs_in(folder: Path, train: list[dict], held_out: list[dict] | None = None) -> str:
    """A folder with pairs to train on and, unless told others, one pair held out."""
    write_jsonl(folder / "p" / "train.jsonl", train)
    held_out = held_out or [explicit("Held out?", "Yes.", "No.")]
    write_jsonl(folder / "p" / "test.jsonl", held_out)
    return str(folder / "p")


def token_rows(trainer) -> list[dict]:
    """The held-out pairs as the trainer tokenised them."""
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    return trainer.eval_dataset.select_columns(columns).to_list()


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_jsonl(folder / "train.jsonl", [explicit(*pair) for pair in PAIRS[:4]])
    write_jsonl(folder / "test.jsonl", [explicit(*pair) for pair in PAIRS[4:]])
    return folder


@pytest.fixture
def tiny_cfg(tiny_llama3, pairs_folder, tmp_path):
    """Makes the `Config` of a tiny float32 run; keywords replace its values."""

    def make(**overrides) -> Config:
        values = {
            "model_name_or_path": str(tiny_llama3),
            "dataset_name": str(pairs_folder),
            "max_length": 160,
            "output_dir": str(tmp_path / "run"),
            "load_in_4bit": False,
            "dtype": "float32",
            "merge_dtype": "float32",
            "bf16": False,
            "loss_type": "sigmoid",
            "loss_weights": None,
            "report_to": "none",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
            "max_new_tokens": 6,
        }
        return load_config("configs/smollm2-135m-cpu.yaml", values | overrides)

    return make


@pytest.fixture
def any_cpu_in_bfloat16(monkeypatch):
    """Has configs keep their bfloat16 on a CPU that computes it slowly: the models are tiny."""
    monkeypatch.setattr("scripts.config.cpu_computes_bfloat16", lambda: True)


@pytest.fixture
def tiny_run(tiny_cfg):
    """Makes trainer and config of a tiny run. Building a config resets accelerate's state, so a
    test that uses a trainer takes its config from here."""

    def make(**overrides) -> tuple[DPOTrainer, Config]:
        cfg = tiny_cfg(**overrides)
        return assemble(cfg).trainer, cfg

    return make


@pytest.fixture
def tiny_trainer(tiny_run):
    """Makes the trainer of a tiny run."""
    return lambda **overrides: tiny_run(**overrides)[0]


@pytest.fixture
def loopback():
    """Starts HTTP servers on 127.0.0.1. `answer(path, body)` gives (status, headers, body); the
    headers of each request are put into `seen`."""
    servers = ExitStack()

    def start(answer, seen: list | None = None) -> str:
        class Handler(Quiet):
            def respond(self) -> None:
                if seen is not None:
                    seen.append(dict(self.headers))
                length = int(self.headers.get("Content-Length") or 0)
                status, headers, body = answer(self.path, self.rfile.read(length))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:  # a truncated answer claims more than it has
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_HEAD = respond

        return servers.enter_context(serving(Handler))

    with servers:
        yield start


@pytest.fixture
def endpoint(loopback, monkeypatch):
    """Points the hub's client at a server on loopback; `token` is what HF_TOKEN would be."""

    def use(answer, token=None):
        url = loopback(answer)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        return url

    return use


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and this machine has none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
