"""GGUF files say what the merged model says; llama.cpp itself is tried where it is installed."""

import json
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import llama3_tokenizer
from peft import get_peft_model
from test_export import write_replies
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from scripts import export, gguf
from scripts.cli import parse
from scripts.config import load_config
from scripts.data import load_preferences
from scripts.gguf import GgufError
from scripts.model import load_tokenizer, model_from_wheel
from scripts.probes import main_probe
from scripts.serve import Server


def test_a_missing_tool_is_named_with_its_cure_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(gguf.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(GgufError, match=r"no-such-package not installed .*setup\.sh --gguf"):
        export.main(SimpleNamespace(action="gguf", config=tmp_path / "not read.yaml"))


def test_the_shapes_are_all_taken_or_left_out_by_name(capsys):
    tokenizer = llama3_tokenizer()
    assert list(gguf.conversations(tokenizer)) == list(gguf.SHAPES)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    assert set(gguf.SHAPES) - set(gguf.conversations(tokenizer)) == {"system", "several turns"}
    assert "refuses it: system" in capsys.readouterr().out


def test_a_split_that_the_converter_takes_for_another_is_known():
    tokenizer = llama3_tokenizer()
    assert gguf.is_gpt2_split(tokenizer)
    digits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(digits)
    assert not gguf.is_gpt2_split(tokenizer)


needs_tools = pytest.mark.skipif(
    any(find_spec(name) is None for name in gguf.NEEDED),
    reason=f"needs llama-cpp-python and its converter: {gguf.INSTALL}, .venv-gguf/bin/python",
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A finished run of SmolLM2 but for its training: an adapter that moves a token by much."""
    folder = tmp_path_factory.mktemp("smollm2") / "tuned"
    cfg = load_config(
        "configs/smollm2-135m-cpu.yaml", {"report_to": "none"}, output_dir=str(folder)
    )
    base = str(model_from_wheel(cfg.model.model_name_or_path))
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), get_peft_config(cfg.model))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.004)
    model.save_pretrained(folder / "adapter")
    cfg.save(folder / "config.yaml")
    export.main(parse("export", ["--config", str(folder / "config.yaml"), "--rows", "3"]))
    return cfg, load_tokenizer(base)


@pytest.mark.slow
@needs_tools
def test_the_default_model_goes_through_llama_cpp_and_is_the_same(smollm2):
    """Convert, quantize, read back: tokens, log-probabilities, replies, broken files."""
    cfg, tokenizer = smollm2
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    write_replies(cfg, *(prompt[-1]["content"] for prompt in probe.prompts))
    options = ["--config", str(cfg.run_dir / "config.yaml"), "--rows", "3"]
    export.main(parse("export", ["gguf", *options, "--questions", "2"]))
    rows = json.loads((cfg.run_dir / "gguf.json").read_text())
    assert [row["file"] for row in rows] == [f"tuned-{k}.gguf" for k in ("f16", "q8_0", "q4_k_m")]
    sizes, gaps = ([row[name] for row in rows] for name in ("MB", "from_merged"))
    assert sizes == sorted(sizes, reverse=True) and gaps == sorted(gaps)
    assert not list((cfg.run_dir / "gguf").glob("*.part"))
    path = cfg.run_dir / "gguf" / "tuned-q8_0.gguf"
    llama = gguf.open_gguf(path, 512)
    talks = gguf.conversations(tokenizer)
    gguf.refuse_other_tokens(llama, tokenizer, talks)
    other = load_tokenizer(str(cfg.run_dir / "merged"))
    other.chat_template = other.chat_template.replace("helpful", "helpless")
    with pytest.raises(GgufError, match="prompt tokens differ"):
        gguf.refuse_other_tokens(llama, other, talks)
    llama.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GgufError, match="cannot read"):
        gguf.open_gguf(path, 512)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.slow
@needs_tools
def test_llama_cpps_own_server_says_what_the_file_says(smollm2, tmp_path):
    pytest.importorskip("fastapi", reason=f"needs llama-cpp-python[server]: {gguf.INSTALL}")
    cfg, tokenizer = smollm2
    file = tmp_path / "model.gguf"
    gguf.convert(cfg.run_dir / "merged", file, "f16", tokenizer)
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    llama = gguf.open_gguf(file, 512)
    prompts, most = probe.prompts[:3], cfg.recipe.max_new_tokens
    wanted = [text for text, _ in gguf.answers(llama, prompts, most)]
    llama.close()
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port)]
    process = subprocess.Popen([*command, "--n_ctx", "512"], stderr=subprocess.DEVNULL)
    try:
        url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            try:
                requests.get(url + "/models", timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.3)
        client = Server(url, "", timeout=120)
        client.model = client.only_model()
        client.more = {"repeat_penalty": 1}  # this server's own default is 1.1
        assert [client.reply(prompt, most) for prompt in prompts] == wanted
    finally:
        process.terminate()
        process.wait(timeout=30)
