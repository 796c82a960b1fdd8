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
from scripts.cli import parse
from scripts.data import load_preferences
from scripts.evaluate import pair_logps
from scripts.export import MergeError, completion_logps, merge_adapter
from scripts.model import load_tokenizer
from scripts.pairs.provenance import weights_state
from scripts.pairs.tokens import tokenize_pairs
from scripts.run import summary


@pytest.fixture
def trained(tiny_run):
    trainer, cfg = tiny_run()
    trainer.train()
    return trainer, cfg, save_adapter(trainer, cfg)


def test_tokenised_rows_are_the_trainers(tiny_run):
    trainer, cfg = tiny_run()
    tokenizer = load_tokenizer(cfg.model.model_name_or_path)
    rows = tokenize_pairs(load_preferences(cfg)["test"].to_list(), tokenizer)
    for mine, its in zip(rows, trainer.eval_dataset, strict=True):
        assert mine == {name: its[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}


def test_merged_model_says_what_the_adapter_says(trained):
    trainer, cfg, adapter = trained
    rows = token_rows(trainer)
    adapted = completion_logps(trainer.model, rows)
    base = cfg.model.model_name_or_path
    target, merged, report = merge_adapter(cfg, base, adapter, trainer.processing_class, rows)
    for ours, theirs in zip(completion_logps(merged, rows), adapted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert report["error"] < 1e-4 < report["effect"]
    again = AutoModelForCausalLM.from_pretrained(target)  # a plain model, no adapter, no 4 bits
    assert type(again.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert load_tokenizer(str(target)).chat_template is not None


def test_an_adapter_too_faint_for_16_bits_is_refused(tiny_llama3, tiny_run, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    base.lm_head.weight.data.mul_(100)  # a random head is near uniform; make small errors show
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(str(tiny_llama3)).save_pretrained(tmp_path / "base")
    trainer, cfg = tiny_run(model_name_or_path=str(tmp_path / "base"))
    for name, value in trainer.model.named_parameters():
        if "lora_B" in name:  # about as large as the rounding of the weights it is added to
            value.data.normal_(std=1e-4)
    adapter = save_adapter(trainer, cfg)
    cfg.recipe.merge_dtype = "bfloat16"
    base, rows = cfg.model.model_name_or_path, token_rows(trainer)
    earlier = cfg.run_dir / "merged" / "model.safetensors"
    earlier.parent.mkdir()
    earlier.write_text("an earlier merge")
    with pytest.raises(MergeError, match="do not use"):
        merge_adapter(cfg, base, adapter, trainer.processing_class, rows)
    assert earlier.read_text() == "an earlier merge"
    assert not (cfg.run_dir / "merged.unproved").exists()
    assert require_adapter(cfg) == adapter and any(adapter.glob("*.safetensors"))


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


@pytest.mark.parametrize("merge_dtype", ["bfloat16", "float16"])
def test_a_whole_model_of_16_bits_loses_nothing(tiny_llama3, tiny_cfg, tmp_path, merge_dtype):
    """Trained in bfloat16, its weights fit both formats; arithmetic must not pass for rounding."""
    cfg = tiny_cfg(use_peft=False, merge_dtype=merge_dtype)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3, dtype="bfloat16")
    model.lm_head.weight.data.mul_(100)  # a random head is near uniform; make differences show
    model.save_pretrained(tmp_path / "model")
    rows = [{"prompt_ids": [1, 2, 3], "chosen_ids": list(range(4, 40))}]
    base, tokenizer = str(tiny_llama3), load_tokenizer(str(tiny_llama3))
    _, merged, report = merge_adapter(cfg, base, tmp_path / "model", tokenizer, rows)
    assert merged.dtype == getattr(torch, merge_dtype)
    assert report["error"] < 1e-4 < 1 < report["effect"]


def test_saved_adapter_comes_back_the_same(trained, tiny_trainer):
    trainer, _, adapter = trained
    rows = token_rows(trainer)
    wanted = pair_logps(trainer, rows)
    fresh = tiny_trainer()
    assert (pair_logps(fresh, rows)["chosen"] != wanted["chosen"]).all()
    load_adapter(fresh.model, adapter)
    assert pair_logps(fresh, rows)["chosen"] == pytest.approx(wanted["chosen"], abs=1e-5)


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
        ({"lora_r": 8}, "r is 8 there and 16 here"),
        # the same tensors, scaled otherwise
        ({"lora_alpha": 64}, "lora_alpha is 64 there and 32 here"),
        ({"use_rslora": True}, "use_rslora is True there and False here"),
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


def test_weights_that_do_not_fit_are_refused_by_name(adapted, tmp_path):
    """The settings agree, the tensors do not: a damaged file, or a base of another size."""
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first, second = sorted(weights)[:2]
    save_file({k: v for k, v in weights.items() if k != first} | {"odd": weights[first]}, file)
    with pytest.raises(AdapterError, match=rf"{first} is missing there; odd has no place here\."):
        load_adapter(model, tmp_path)
    save_file(weights | {second: weights[second][:, :8].contiguous()}, file)
    with pytest.raises(AdapterError, match=rf"{second} is \(64, 8\) there and \(\d+, 16\) here"):
        load_adapter(model, tmp_path)


def test_another_models_weights_are_refused(tiny_llama3, tmp_path):
    """Of a run without an adapter: a model with a layer less."""
    small = AutoModelForCausalLM.from_pretrained(tiny_llama3, num_hidden_layers=1)
    small.save_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama3)
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn.* is missing"):
        load_adapter(model, tmp_path / "small")


def test_a_run_without_training_has_nothing_to_load(tiny_cfg):
    with pytest.raises(AdapterError, match=r"no adapter in .*; train first"):
        require_adapter(tiny_cfg())
    with pytest.raises(AdapterError, match=r"no model in .*; train first"):
        require_adapter(tiny_cfg(use_peft=False))
