"""What leaves a run is the model that was evaluated: forms, GGUF files, files for servers."""

import json
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import llama3_tokenizer, token_rows
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from scripts import evaluate, export
from scripts.adapter import save_adapter
from scripts.base import RecipeError
from scripts.checkpoints.identity import settings
from scripts.cli import parse
from scripts.config import load_config
from scripts.data import load_preferences
from scripts.export import MergeError, merge_adapter
from scripts.model import load_tokenizer, model_from_wheel
from scripts.probes import Probe, main_probe
from scripts.serve import Server
from scripts.shipping import gguf, serving
from scripts.shipping.forms import (
    FORMS,
    Form,
    Scores,
    build,
    completion_logps,
    evaluated_policy,
    kept_replies,
    mean_gap,
    proof_table,
    prove,
    shipped_form,
)
from scripts.shipping.gguf import GgufError
from scripts.shipping.serving import ServingError, read_turns, write_serving

KINDS = ("dequantized", "original")
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def quantized(tiny_llama3, tiny_run, tmp_path):
    """A trained tiny run whose adapter sits on NF4 weights; nothing else is rounded."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    base.lm_head.weight.data.mul_(100)  # a random head is near uniform; make small errors show
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama3)).save_pretrained(tmp_path / "base")
    trainer, cfg = tiny_run(model_name_or_path=str(tmp_path / "base"), load_in_4bit=True)
    trainer.train()
    cfg.save(cfg.run_dir / "config.yaml")
    return trainer, cfg, save_adapter(trainer, cfg)


def gaps(run) -> tuple[Scores, dict[str, float]]:
    """The policy's scores, and how far a merge into each kind of weights is from them."""
    trainer, cfg, adapter = run
    base, rows = cfg.model.model_name_or_path, token_rows(trainer)
    scores = evaluated_policy(cfg, base, adapter, rows)
    models = {kind: build(cfg, base, adapter, Form(kind, "float32")) for kind in KINDS}
    return scores, {
        kind: mean_gap(completion_logps(model, rows), scores.policy)
        for kind, model in models.items()
    }


def merge(run, policy, **settings):
    trainer, cfg, adapter = run
    for name, value in settings.items():
        setattr(cfg.recipe, name, value)
    base, tokenizer = cfg.model.model_name_or_path, trainer.processing_class
    return merge_adapter(cfg, base, adapter, tokenizer, token_rows(trainer), policy)


def test_the_nf4_weights_written_out_are_the_model_that_was_trained(quantized):
    """Not to the last digit: on a CPU, bitsandbytes computes with NF4 in bfloat16."""
    scores, far = gaps(quantized)
    assert 4 * far["dequantized"] < far["original"] and far["dequantized"] < 0.1 * scores.effect
    assert shipped_form(quantized[1]) == Form("dequantized", "float32")
    _, merged, report = merge(quantized, None)
    assert report == {"effect": scores.effect, "error": pytest.approx(far["dequantized"])}
    assert "quantization_config" not in merged.config.to_dict()
    assert merged.config.use_cache  # else it would be shipped as slow as it was trained
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear


def test_a_merge_is_held_against_what_was_evaluated_and_not_against_itself(quantized):
    """The original weights differ from the 4-bit ones, and a merge into them has to show that."""
    scores, far = gaps(quantized)
    moved = 1.5 * far["original"]  # had training moved no more than that
    faint = Scores(scores.policy, [row + moved for row in scores.policy])
    merge(quantized, faint)
    kept = quantized[1].run_dir / "merged" / "model.safetensors"
    before = kept.read_bytes()
    with pytest.raises(MergeError, match=r"the evaluated one differ.*export prove"):
        merge(quantized, faint, merge_into="original")
    assert kept.read_bytes() == before


def test_the_policy_that_is_scored_is_the_trainers(quantized):
    trainer, cfg, adapter = quantized
    rows = token_rows(trainer)
    scores = evaluated_policy(cfg, cfg.model.model_name_or_path, adapter, rows)
    wanted = evaluate.pair_logps(trainer, rows)
    for ours, theirs in ((scores.policy, "chosen"), (scores.reference, "ref_chosen")):
        sums = [one.sum().item() for one in ours]
        assert sums == pytest.approx(wanted[theirs].tolist(), rel=1e-2)


def test_every_form_is_measured_against_the_policy(quantized, capsys):
    trainer, cfg, adapter = quantized
    options = ["--config", str(cfg.run_dir / "config.yaml")]
    evaluate.main(parse("evaluate", options))
    base, tokenizer = cfg.model.model_name_or_path, trainer.processing_class
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    forms = [Form(weights, "float32", how) for weights, how in
             (("dequantized", True), ("original", True), ("original", False))]  # fmt: skip
    frame = prove(cfg, base, adapter, tokenizer, token_rows(trainer), probe, forms=forms)
    assert frame["form"].tolist()[1:] == [form.name for form in forms]
    trained, merged, adapted = frame["difference"][1:]
    assert 4 * trained < merged == pytest.approx(adapted, rel=1e-2)
    assert frame["of_training"][2] == pytest.approx(merged / frame.attrs["effect"])
    assert frame["same"][0] == 1 and frame["same"][1] >= frame["same"][2]
    assert not proof_table(frame).isna().any(axis=None)
    export.main(parse("export", ["prove", *options, "--questions", "1"]))
    shown = capsys.readouterr().out
    assert all(form.name in shown for form in FORMS)
    assert len(json.loads((cfg.run_dir / "prove.json").read_text())) == len(FORMS) + 1


def test_without_4_bits_there_is_nothing_to_dequantize(tiny_cfg):
    assert shipped_form(tiny_cfg(merge_into="dequantized")) == Form("original", "float32")


def test_what_is_merged_into_may_differ_when_a_run_goes_on(tiny_cfg):
    assert settings(tiny_cfg()) == settings(tiny_cfg(merge_into="original"))


def probe_of(*prompts: str) -> Probe:
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Probe(talks, lambda i, text: {"exact": float(text == f"Reply {i}.")})


def write_replies(cfg, *prompts: str) -> Probe:
    rows = [{"prompt": p, "tuned": f"Reply {i}."} for i, p in enumerate(prompts)]
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    (cfg.run_dir / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return probe_of(*prompts)


def test_kept_replies_must_be_there_and_of_these_prompts(tiny_cfg):
    cfg = tiny_cfg()
    with pytest.raises(RecipeError, match=r"there is no .*replies\.jsonl.*scripts\.evaluate"):
        kept_replies(cfg, probe_of("One?"))
    probe = write_replies(cfg, "One?", "Two?")
    assert kept_replies(cfg, probe) == ["Reply 0.", "Reply 1."]
    with pytest.raises(RecipeError, match="of other prompts"):
        kept_replies(cfg, probe_of("One?", "Three?"))
    (cfg.run_dir / "replies.jsonl").write_text('{"prompt": ')
    with pytest.raises(RecipeError, match="holds no replies"):
        kept_replies(cfg, probe)


# GGUF


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
    from peft import get_peft_model
    from trl import get_peft_config

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
    return cfg, base


@pytest.mark.slow
@needs_tools
def test_the_default_model_goes_through_llama_cpp_and_is_the_same(smollm2, capsys):
    """Merge, convert, quantize, read back: tokens, log-probabilities, replies, broken files."""
    cfg, base = smollm2
    tokenizer = load_tokenizer(base)
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    options = ["--config", str(cfg.run_dir / "config.yaml"), "--rows", "3"]
    export.main(parse("export", options))
    write_replies(cfg, *(prompt[-1]["content"] for prompt in probe.prompts))
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
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "helpless")
    with pytest.raises(GgufError, match="prompt tokens differ"):
        gguf.refuse_other_tokens(llama, tokenizer, talks)
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
    cfg, base = smollm2
    if not (cfg.run_dir / "merged").is_dir():
        export.main(parse("export", ["--config", str(cfg.run_dir / "config.yaml")]))
    file, tokenizer = tmp_path / "model.gguf", load_tokenizer(base)
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


# Files for servers


def chatml_tokenizer():
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


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
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "as it is"),
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
    """Ollama's engine is Go's text/template; what it does beyond is in `Turns.prompt`."""
    tokenizer = make()
    turns, talks = read_turns(tokenizer), gguf.conversations(tokenizer)
    whole = [
        talk if talk[0]["role"] == "system" or turns.system is None
        else [{"role": "system", "content": turns.system}, *talk]
        for talk in talks.values()
    ]  # fmt: skip
    given = {"Template": turns.go_template(), "Talks": whole}
    (tmp_path / "main.go").write_text(GO)
    done = subprocess.run(
        ["go", "run", str(tmp_path / "main.go")], input=json.dumps(given).encode(),
        capture_output=True, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    prompts = done.stdout.decode().split("\0")[:-1]
    assert prompts == [turns.prompt(talk) for talk in talks.values()]
    wanted = [serving.template_text(tokenizer, talk) for talk in talks.values()]
    different = [name for name, a, b in zip(talks, prompts, wanted, strict=True) if a != b]
    # Llama 3's template trims a text; Go's has no function for it, and Ollama's own does not.
    trims = "trim" in tokenizer.chat_template
    assert different == (["white space"] if trims else [])
    assert serving.differing(turns, tokenizer, talks) == different


def test_two_messages_of_one_role_are_joined_as_ollama_does():
    turns = read_turns(chatml_tokenizer())
    talk = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    assert "user\nOne.\n\nTwo.<|im_end|>" in turns.prompt(talk)
    assert talk[0]["content"] == "One."


@pytest.fixture
def served(tiny_run):
    """A merged tiny run, to write files for."""

    def make(**settings):
        trainer, cfg = tiny_run(**settings)
        adapter = save_adapter(trainer, cfg)
        tokenizer = trainer.processing_class
        base = cfg.model.model_name_or_path
        merge_adapter(cfg, base, adapter, tokenizer, token_rows(trainer))
        return cfg, tokenizer

    return make


def test_files_for_ollama_vllm_and_nim(served):
    cfg, tokenizer = served()
    folder, remarks = write_serving(cfg, tokenizer, "my model", system="Be kind.")
    assert remarks == ["Ollama's prompt is not the chat template's for: white space"]
    text = (folder / "ollama" / "Modelfile").read_text()
    assert text.startswith('FROM ../../merged\nTEMPLATE """{{ range .Messages }}')
    for line in ('SYSTEM """Be kind."""', 'PARAMETER stop "<|eot_id|>"', "PARAMETER temperature 0"):
        assert line in text.splitlines()
    adapter = folder / "loras" / "my model"
    assert sorted(p.name for p in adapter.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
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


def test_the_adapter_names_the_base_and_not_a_path_of_the_machine(served, tmp_path):
    cfg, _ = served()
    before = (cfg.run_dir / "adapter" / "adapter_config.json").read_text()
    cfg.model.model_name_or_path = "owner/name"
    serving.copy_adapter(cfg, tmp_path / "copy")
    values = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "owner/name" and values["r"] == 16
    assert (cfg.run_dir / "adapter" / "adapter_config.json").read_text() == before


def test_an_adapter_that_vllm_does_not_take_is_said(served):
    cfg, tokenizer = served()
    cfg.model.lora_r = 416
    folder, _ = write_serving(cfg, tokenizer)
    assert "--max-lora-rank 512" in (folder / "README.md").read_text()
    for rank, dora, why in ((1024, False, "rank 1024"), (16, True, "DoRA")):
        cfg.model.lora_r, cfg.model.use_dora = rank, dora
        folder, remarks = write_serving(cfg, tokenizer)
        assert any(why in remark for remark in remarks)
        assert not (folder / "loras").exists()
        assert "--enable-lora" not in (folder / "README.md").read_text()


def test_nothing_is_written_before_the_merge(tiny_cfg):
    with pytest.raises(ServingError, match=r"there is no .*merged; first"):
        write_serving(tiny_cfg(), llama3_tokenizer())
