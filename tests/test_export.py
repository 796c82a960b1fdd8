"""What training made is saved, put back, merged into 16-bit weights, and the merge is proved."""

import json
import shutil

import pytest
import torch
from conftest import token_rows
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from scripts import evaluate, export
from scripts.adapter import AdapterError, load_adapter, require_adapter, save_adapter
from scripts.base import RecipeError
from scripts.cli import parse
from scripts.evaluate import pair_logps
from scripts.export import (
    FORMS,
    Form,
    MergeError,
    evaluated_policy,
    load_form,
    load_to_merge,
    merge_adapter,
    prove_merge,
    shipped_form,
)
from scripts.model import load_tokenizer
from scripts.pairs.provenance import weights_state
from scripts.probes import Probe
from scripts.proof import completion_logps, kept_replies, mean_gap
from scripts.run import summary


@pytest.fixture
def trained(tiny_run):
    trainer, cfg = tiny_run()
    trainer.train()
    return trainer, cfg, save_adapter(trainer, cfg)


@pytest.fixture
def sharp_base(tiny_llama3, tmp_path):
    """The tiny model's folder with a head far from uniform, so that small errors show."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    base.lm_head.weight.data.mul_(100)
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama3)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def quantized(sharp_base, tiny_run):
    """A trained tiny run whose adapter sits on NF4 weights; nothing else is rounded."""
    trainer, cfg = tiny_run(model_name_or_path=sharp_base, load_in_4bit=True)
    trainer.train()
    cfg.save(cfg.run_dir / "config.yaml")
    save_adapter(trainer, cfg)
    return trainer, cfg


# The merge


def test_a_merge_written_out_by_hand_is_proved_and_says_what_the_adapter_says(trained):
    """As the notebook does it: PEFT's and transformers' own calls between two of ours."""
    trainer, cfg, adapter = trained
    rows, base = token_rows(trainer), cfg.model.model_name_or_path
    merged = PeftModel.from_pretrained(load_to_merge(cfg, base), adapter).merge_and_unload()
    with pytest.raises(MergeError, match=r"there is no .*merged\.unproved"):
        prove_merge(cfg, base, rows)
    merged.save_pretrained(cfg.run_dir / export.UNPROVED)
    trainer.processing_class.save_pretrained(cfg.run_dir / export.UNPROVED)
    check = prove_merge(cfg, base, rows)
    assert check["error"] < 1e-4 < check["effect"]
    assert not (cfg.run_dir / export.UNPROVED).exists()
    again = AutoModelForCausalLM.from_pretrained(cfg.run_dir / "merged")  # no adapter, no 4 bits
    assert type(again.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    adapted = completion_logps(trainer.model, rows)
    assert mean_gap(completion_logps(again, rows), adapted) < 1e-4
    assert merge_adapter(cfg, base, trainer.processing_class, rows) == check  # the command's way


def test_the_nf4_weights_written_out_are_the_model_that_was_trained(quantized):
    """Not to the last digit: on a CPU, bitsandbytes computes with NF4 in bfloat16."""
    trainer, cfg = quantized
    base, rows = cfg.model.model_name_or_path, token_rows(trainer)
    policy, reference = evaluated_policy(cfg, base, rows)
    wanted = pair_logps(trainer, rows)  # the policy that is scored is the trainer's
    for ours, theirs in ((policy, "chosen"), (reference, "ref_chosen")):
        sums = [one.sum().item() for one in ours]
        assert sums == pytest.approx(wanted[theirs].tolist(), rel=1e-2)
    far = {
        kind: mean_gap(completion_logps(load_form(cfg, base, Form(kind, "float32")), rows), policy)
        for kind in ("dequantized", "original")
    }
    effect = mean_gap(policy, reference)
    assert 4 * far["dequantized"] < far["original"] and far["dequantized"] < 0.1 * effect
    assert shipped_form(cfg) == Form("dequantized", "float32")
    report = merge_adapter(cfg, base, trainer.processing_class, rows)
    assert report == {"effect": effect, "error": pytest.approx(far["dequantized"])}
    merged = AutoModelForCausalLM.from_pretrained(cfg.run_dir / "merged")
    assert "quantization_config" not in merged.config.to_dict()
    assert merged.config.use_cache  # else it would be shipped as slow as it was trained


def test_a_merge_further_away_than_training_moved_is_refused(quantized):
    """Of an adapter that says nothing, the original weights are not what was evaluated."""
    trainer, cfg = quantized
    file = require_adapter(cfg) / "adapter_model.safetensors"
    save_file({name: value * 0 for name, value in load_file(file).items()}, file)
    cfg.recipe.merge_into = "original"
    earlier = cfg.run_dir / "merged" / "model.safetensors"
    earlier.parent.mkdir()
    earlier.write_text("an earlier merge")
    with pytest.raises(MergeError, match=r"differs from the evaluated one.*export prove"):
        merge_adapter(cfg, cfg.model.model_name_or_path, trainer.processing_class,
                      token_rows(trainer))  # fmt: skip
    assert earlier.read_text() == "an earlier merge"
    assert not (cfg.run_dir / export.UNPROVED).exists() and file.is_file()


@pytest.mark.parametrize("merge_dtype", ["bfloat16", "float16"])
def test_a_whole_model_of_16_bits_loses_nothing(tiny_llama3, tiny_cfg, merge_dtype):
    """Trained in bfloat16, its weights fit both formats; arithmetic must not pass for rounding."""
    cfg = tiny_cfg(use_peft=False, merge_dtype=merge_dtype)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3, dtype="bfloat16")
    model.lm_head.weight.data.mul_(100)  # a random head is near uniform; make differences show
    model.save_pretrained(cfg.run_dir / "model")
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": list(range(4, 40))}]
    base = str(tiny_llama3)
    report = merge_adapter(cfg, base, load_tokenizer(base), rows)
    merged = AutoModelForCausalLM.from_pretrained(cfg.run_dir / "merged")
    assert merged.dtype == getattr(torch, merge_dtype)
    assert report["error"] < 1e-4 < 1 < report["effect"]


def test_without_4_bits_there_is_nothing_to_dequantize(tiny_cfg):
    assert shipped_form(tiny_cfg(merge_into="dequantized")) == Form("original", "float32")


@pytest.mark.parametrize("settings", [{}, {"use_peft": False}], ids=["adapter", "whole model"])
def test_a_finished_run_is_evaluated_and_exported_by_its_commands(tiny_run, settings, capsys):
    """Train, save, and let both commands work from the run folder alone."""
    trainer, cfg = tiny_run(**settings, merge_dtype="float16")
    trainer.train()
    saved = save_adapter(trainer, cfg)
    assert saved.name == ("model" if settings else "adapter")
    rows = token_rows(trainer)
    wanted = pair_logps(trainer, rows)
    cfg.save(cfg.run_dir / "config.yaml")
    before = {file: file.read_bytes() for file in saved.iterdir()}
    options = ["--config", str(cfg.run_dir / "config.yaml")]
    evaluate.main(parse("evaluate", options))
    figures = json.loads((cfg.run_dir / "evaluation.json").read_text())
    margin = wanted["chosen"] - wanted["ref_chosen"] - wanted["rejected"] + wanted["ref_rejected"]
    assert figures["reward_margin"]["mean"] == pytest.approx(0.1 * margin.mean(), rel=1e-3)
    assert abs(margin).max() > 0.01  # it was trained
    export.main(parse("export", options))
    assert "merged" in capsys.readouterr().out.splitlines()[-1]
    merged = AutoModelForCausalLM.from_pretrained(cfg.run_dir / "merged")
    assert merged.dtype == torch.float16
    again = [x.sum().item() for x in completion_logps(merged.float(), rows)]
    assert wanted["chosen"] == pytest.approx(again, abs=0.05)
    assert {file: file.read_bytes() for file in saved.iterdir()} == before  # nothing is lost
    text = summary(cfg)
    assert str(saved) in text and "implicit-reward accuracy at least 0.75: too few prompts" in text


# Every form, in one table


def test_every_form_is_measured_against_the_policy(quantized, capsys):
    _, cfg = quantized
    options = ["--config", str(cfg.run_dir / "config.yaml")]
    evaluate.main(parse("evaluate", options))
    export.main(parse("export", ["prove", *options]))
    shown = capsys.readouterr().out
    assert all(form.name in shown for form in FORMS)
    policy, *forms = json.loads((cfg.run_dir / "prove.json").read_text())
    assert [row["form"] for row in forms] == [form.name for form in FORMS]
    assert policy["same"] == 1 and policy["difference"] == 0
    far = {row["form"]: row["difference"] for row in forms}
    merged = far["merged into the original weights, float16"]
    assert 4 * far["merged into dequantized NF4, float16"] < merged
    assert merged == pytest.approx(far["adapter on the original weights, float16"], rel=1e-2)


def probe_of(*prompts: str) -> Probe:
    talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Probe(talks, lambda i, text: {"exact": float(text == f"Reply {i}.")})


def write_replies(cfg, *prompts: str) -> Probe:
    """Leave the evaluation's replies to `prompts` in the run folder."""
    rows = [{"prompt": p, "tuned": f"Reply {i}."} for i, p in enumerate(prompts)]
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    (cfg.run_dir / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return probe_of(*prompts)


def test_kept_replies_must_be_there_and_of_these_prompts(tiny_cfg):
    cfg = tiny_cfg()
    with pytest.raises(RecipeError, match=r"there is no .*replies\.jsonl.*scripts\.evaluate"):
        kept_replies(cfg, probe_of("One?"))
    probe = write_replies(cfg, "One?", "Two?")
    assert kept_replies(cfg, probe) == {0: "Reply 0.", 1: "Reply 1."}
    assert len(kept_replies(cfg, probe, 1)) == 1 and kept_replies(cfg, probe, 0) == {}
    with pytest.raises(RecipeError, match="are not this config's"):
        kept_replies(cfg, probe_of("One?", "Three?"))


# What was saved goes back into its own model, and into no other


def test_saved_adapter_comes_back_the_same(trained, tiny_trainer):
    trainer, _, adapter = trained
    rows = token_rows(trainer)
    wanted = pair_logps(trainer, rows)
    fresh = tiny_trainer()
    assert (pair_logps(fresh, rows)["chosen"] != wanted["chosen"]).all()
    load_adapter(fresh.model, adapter)
    assert pair_logps(fresh, rows)["chosen"] == pytest.approx(wanted["chosen"], abs=1e-5)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"is damaged: 1 tensors are missing"):
        load_adapter(fresh.model, adapter)


@pytest.fixture
def adapted(tiny_cfg):
    """Makes a tiny model with the fresh adapter of a config; keywords replace its values."""

    def make(**overrides) -> PeftModel:
        cfg = tiny_cfg(**overrides)
        model = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path)
        return get_peft_model(model, get_peft_config(cfg.model))

    return make


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # an adapter with fewer modules, which PEFT loads without a word
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "is ['q_proj', 'v_proj'] there"),
        # the same tensors, scaled otherwise
        ({"lora_alpha": 64}, "lora_alpha is 64 there and 32 here"),
    ],
)
def test_an_adapter_of_another_config_is_refused(adapted, tmp_path, settings, message):
    adapted(**settings).save_pretrained(tmp_path / "run" / "adapter")
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError) as error:
        load_adapter(model, tmp_path / "run" / "adapter")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
    assert f"--config {tmp_path / 'run' / 'config.yaml'}" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_another_base_with_equal_shapes_is_refused(adapted, tiny_llama3, tmp_path):
    saved = tmp_path / "run" / "adapter"
    adapted().save_pretrained(saved)
    other = tmp_path / "another"
    shutil.copytree(tiny_llama3, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    model = get_peft_model(model, adapted().peft_config["default"])
    with pytest.raises(AdapterError, match="was trained on another model"):
        load_adapter(model, saved)
    # Where the run noted the content, a copy under another name is the same model ...
    origin = {"name": str(tiny_llama3), "commit": None, "content": weights_state(str(other))}
    (tmp_path / "run" / "origins.json").write_text(json.dumps({"model": origin}))
    load_adapter(model, saved)
    # ... and other weights under the same name are another.
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="was trained on another model"):
        load_adapter(model, saved)


def test_a_damaged_adapter_is_refused_by_all_that_reads_it(trained):
    _, cfg, adapter = trained
    assert require_adapter(cfg) == adapter
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is damaged"):
        require_adapter(cfg)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RecipeError, match=r"adapter_model\.safetensors is cut or damaged"):
        require_adapter(cfg)


def test_a_run_without_training_has_nothing_to_load(tiny_cfg):
    with pytest.raises(AdapterError, match=r"no adapter in .*; train first"):
        require_adapter(tiny_cfg())
    with pytest.raises(AdapterError, match=r"no model in .*; train first"):
        require_adapter(tiny_cfg(use_peft=False))
