"""The adapter is saved, merged into 16-bit weights, and the merge is proved."""

import pytest
import torch
from conftest import token_rows
from transformers import AutoModelForCausalLM

from scripts.adapter import load_adapter, save_adapter
from scripts.cli import RecipeError
from scripts.data import load_preferences
from scripts.evaluate import pair_logps
from scripts.export import MergeError, completion_logps, merge_adapter
from scripts.model import load_tokenizer
from scripts.pairs.tokens import tokenize_pairs


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


def test_saved_adapter_comes_back_the_same(trained, tiny_trainer):
    trainer, _, adapter = trained
    rows = token_rows(trainer)
    wanted = pair_logps(trainer, rows)
    fresh = tiny_trainer()
    assert (pair_logps(fresh, rows)["chosen"] != wanted["chosen"]).all()
    load_adapter(fresh.model, adapter)
    assert pair_logps(fresh, rows)["chosen"] == pytest.approx(wanted["chosen"], abs=1e-5)


def test_another_models_adapter_is_refused(trained, tiny_trainer):
    _, _, adapter = trained
    other = tiny_trainer(lora_target_modules=["q_proj", "v_proj"])
    with pytest.raises(RecipeError, match="does not fit this model"):
        load_adapter(other.model, adapter)
