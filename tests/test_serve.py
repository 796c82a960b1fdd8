"""Files for Ollama, vLLM and NIM; and the client that compares a server's replies with the run's:
servers that work, and servers that do not."""

import json
import shutil
import subprocess

import pytest
from conftest import llama3_tokenizer, token_rows
from test_export import write_replies

from scripts import gguf, serve
from scripts.adapter import save_adapter
from scripts.base import RecipeError
from scripts.cli import parse
from scripts.data import load_preferences
from scripts.export import merge_adapter
from scripts.model import load_tokenizer
from scripts.probes import main_probe
from scripts.serve import (
    Server,
    ServingError,
    agreement,
    read_turns,
    served_replies,
    write_serving,
)

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_tokenizer():
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


# The files


def test_the_marks_around_each_turn_are_found():
    turns = read_turns(chatml_tokenizer())
    assert turns.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert turns.system == "You are kind." and turns.reply == "<|im_start|>assistant\n"
    llama3 = read_turns(llama3_tokenizer())
    assert llama3.system is None
    # Ollama's tokenizer puts the begin-of-text before the prompt, so it is not in the template.
    assert llama3.around["system"][0] == "<|start_header_id|>system<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "changes or leaves out the text",
        ),
        ("{{ raise_exception('never') }}", "refuses a plain conversation"),
        ("{% for m in messages %}{{ '{{' + m['content'] }}{% endfor %}", "cannot hold"),
    ],
)
def test_a_template_that_a_modelfile_cannot_say_is_refused(template, message):
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ServingError, match=message):
        read_turns(tokenizer)


GO = """package main

import (
	"encoding/json"
	"io"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var given struct {
		Template string
		Talks    [][]Message
	}
	text, _ := io.ReadAll(os.Stdin)
	if err := json.Unmarshal(text, &given); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	for _, talk := range given.Talks {
		if err := parsed.Execute(os.Stdout, map[string]any{"Messages": talk}); err != nil {
			panic(err)
		}
		os.Stdout.Write([]byte{0})
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go's text/template (golang-go)")
@pytest.mark.parametrize("make", [chatml_tokenizer, llama3_tokenizer])
def test_go_writes_the_prompt_that_transformers_writes(make, tmp_path):
    """Ollama's engine is Go's text/template; the system prompt is the Modelfile's."""
    tokenizer = make()
    turns, talks = read_turns(tokenizer), gguf.conversations(tokenizer)
    first = [] if turns.system is None else [{"role": "system", "content": turns.system}]
    whole = [t if t[0]["role"] == "system" else [*first, *t] for t in talks.values()]
    given = {"Template": turns.go_template(), "Talks": whole}
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")], input=json.dumps(given).encode(),
        capture_output=True, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    prompts = done.stdout.decode().split("\0")[:-1]
    assert prompts == [turns.prompt(talk) for talk in talks.values()]
    differing = [
        name
        for (name, talk), prompt in zip(talks.items(), prompts, strict=True)
        if prompt != serve.template_text(tokenizer, talk)
    ]
    # Llama 3's template trims a text; Go's has no function for it, and Ollama's own does not.
    assert differing == (["white space"] if "trim" in tokenizer.chat_template else [])


@pytest.fixture
def merged(tiny_run):
    """A merged tiny run, to write files for."""
    trainer, cfg = tiny_run()
    save_adapter(trainer, cfg)
    merge_adapter(cfg, cfg.model.model_name_or_path, trainer.processing_class, token_rows(trainer))
    return cfg, trainer.processing_class


def test_files_for_ollama_vllm_and_nim(merged):
    cfg, tokenizer = merged
    cfg.model.model_name_or_path = "owner/name"
    folder, remarks = write_serving(cfg, tokenizer, "my model", system="Be kind.")
    assert remarks == ["Ollama's prompt differs from the chat template's for: white space"]
    text = (folder / "ollama" / "Modelfile").read_text()
    assert text.startswith('FROM ../../merged\nTEMPLATE """{{ range .Messages }}')
    for line in ('SYSTEM """Be kind."""', 'PARAMETER stop "<|eot_id|>"', "PARAMETER temperature 0"):
        assert line in text.splitlines()
    adapter = folder / "loras" / "my model"
    assert {p.name for p in adapter.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    values = json.loads((adapter / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "owner/name"  # and no path of this machine
    commands = (folder / "README.md").read_text()
    assert "--enable-lora --max-lora-rank 16" in commands
    assert "--lora-modules 'my model=loras/my model'" in commands
    assert "NIM_PEFT_SOURCE=/opt/nim/loras" in commands
    (cfg.run_dir / "gguf").mkdir()
    for kind in ("f16", "q8_0"):
        (cfg.run_dir / "gguf" / f"{cfg.run_dir.name}-{kind}.gguf").write_text("")
    folder, _ = write_serving(cfg, tokenizer)
    text = (folder / "ollama" / "Modelfile").read_text()
    assert text.startswith(f"FROM ../../gguf/{cfg.run_dir.name}-q8_0.gguf\n")
    assert "SYSTEM" not in text  # the template has none of its own
    cfg.model.use_peft = False
    folder, _ = write_serving(cfg, tokenizer)
    commands = (folder / "README.md").read_text()
    assert not (folder / "loras").exists() and "lora" not in commands


def test_nothing_is_written_before_the_merge(tiny_cfg):
    with pytest.raises(RecipeError, match=r"no merged model in .*; make it first"):
        write_serving(tiny_cfg(), llama3_tokenizer())


# The check

PROMPTS = ("One?", "Two?", "Three?")
MODELS = b'{"data": [{"id": "tuned"}]}'


def completion(text) -> tuple:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def faithful(path: str, body: bytes) -> tuple:
    """A server of the tuned model itself."""
    if path.endswith("/models"):
        return 200, {}, MODELS
    asked = json.loads(body)
    assert asked["model"] == "tuned" and asked["temperature"] == 0 and asked["max_tokens"] == 6
    return completion(f" Reply {PROMPTS.index(asked['messages'][-1]['content'])}.\n")


def server(url: str, **how) -> Server:
    return Server(url + "/v1", "tuned", backoff=0.01, **how)


@pytest.fixture
def evaluated(tiny_cfg):
    """A run with three replies of its evaluation, and their probe."""
    cfg = tiny_cfg()
    return cfg, write_replies(cfg, *PROMPTS)


def test_replies_are_compared_with_the_runs_own(loopback, evaluated, tiny_llama3):
    def half(path, body):
        return completion("Something else.") if b"Two?" in body else faithful(path, body)

    (cfg, probe), tokenizer = evaluated, load_tokenizer(str(tiny_llama3))
    frame = served_replies(server(loopback(faithful)), cfg, probe, None)
    assert frame["same"].all() and frame["served"].tolist() == frame["kept"].tolist()
    shown = agreement(frame, probe, tokenizer)
    assert "3 of 3 replies" in shown and "run:" not in shown
    assert len(served_replies(server(loopback(faithful)), cfg, probe, 2)) == 2
    frame = served_replies(server(loopback(half)), cfg, probe, None)
    assert frame["same"].tolist() == [True, False, True]
    shown = agreement(frame, probe, tokenizer)
    assert "2 of 3 replies" in shown and "'Something else.'" in shown
    assert "0.667" in shown  # exact, by the checker, where the run's own is 1


def test_what_a_server_does_unasked_can_be_switched_off(loopback, evaluated):
    def penalizing(path, body):
        plain = json.loads(body).get("repeat_penalty") == 1
        return faithful(path, body) if plain else completion("Other words.")

    asked = server(loopback(penalizing))
    assert not served_replies(asked, *evaluated, None)["same"].any()
    asked.more = parse("serve", ["--url", "x", "--body", '{"repeat_penalty": 1}']).body
    assert served_replies(asked, *evaluated, None)["same"].all()


def test_a_busy_server_is_asked_again(loopback, evaluated):
    answers = [(503, {}, b"starting")] * 2

    def busy(path, body):
        return answers.pop() if answers else faithful(path, body)

    assert served_replies(server(loopback(busy)), *evaluated, None)["same"].all()
    assert not answers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, {}, b"out of memory"), r"the server at .* said 500: out of memory"),
        ((401, {}, b"no"), r"said 401 \(set OPENAI_API_KEY\)"),
        ((200, {}, b"hello"), "gave no chat completion"),
        (completion(None), "gave no chat completion"),
    ],
)
def test_a_lasting_trouble_is_one_clear_error(loopback, evaluated, answer, message):
    with pytest.raises(RecipeError, match=message) as caught:
        served_replies(server(loopback(lambda *_: answer), retries=1), *evaluated, None)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_that_is_not_there(evaluated):
    gone = server("http://127.0.0.1:9", retries=1)
    for ask in (gone.only_model, lambda: served_replies(gone, *evaluated, None)):
        with pytest.raises(RecipeError, match=r"the server at .* does not answer"):
            ask()


@pytest.mark.parametrize("listed", [b'{"data": [{"id": "a"}, {"id": "b"}]}', b"<html>"])
def test_the_model_must_be_named_unless_it_is_the_only_one(loopback, listed):
    with pytest.raises(ServingError, match="does not list one model; name it: --model"):
        server(loopback(lambda *_: (200, {}, listed))).only_model()
    assert server(loopback(faithful)).only_model() == "tuned"


def test_the_command_keeps_what_was_said_and_may_fail_on_it(loopback, tiny_cfg, capsys):
    """From the run folder alone; the run's own prompts are its two held-out pairs'."""
    cfg = tiny_cfg()
    cfg.save(cfg.run_dir / "config.yaml")
    tokenizer = load_tokenizer(cfg.model.model_name_or_path)
    prompts = main_probe(cfg, load_preferences(cfg, tokenizer)["test"]).prompts
    write_replies(cfg, *(prompt[-1]["content"] for prompt in prompts))

    def always(path, body):
        return (200, {}, MODELS) if path.endswith("/models") else completion("Reply 0.")

    options = ["--url", loopback(always) + "/v1", "--config", str(cfg.run_dir / "config.yaml")]
    serve.main(parse("serve", ["check", *options, "--least-same", "0.5"]))
    assert "1 of 2 replies" in capsys.readouterr().out
    rows = [json.loads(r) for r in (cfg.run_dir / "served.jsonl").read_text().splitlines()]
    assert [row["served"] for row in rows] == ["Reply 0."] * 2
    with pytest.raises(ServingError, match=r"fewer than 0\.9"):
        serve.main(parse("serve", [*options, "--least-same", "0.9"]))
