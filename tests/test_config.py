"""Configs are read strictly, and every one that ships builds its arguments."""

import math
import typing

import pytest
from peft import LoraConfig
from trl import DPOConfig, get_peft_config, get_quantization_config

from scripts.base import ROOT
from scripts.config import (
    HINTS,
    ConfigError,
    cpu_computes_bfloat16,
    load_config,
    parse_overrides,
    refuse_changed,
)
from scripts.pairs.formats import FORMATS

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEFAULT = "configs/smollm2-135m-cpu.yaml"
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_its_arguments(path):
    cfg = load_config(path, may_lack_gpu=True)
    lora, quantization = get_peft_config(cfg.model), get_quantization_config(cfg.model)
    assert isinstance(lora, LoraConfig)
    assert lora.target_modules == SEVEN
    assert quantization.bnb_4bit_quant_type == "nf4"
    assert quantization.bnb_4bit_use_double_quant
    slow = cfg.given.get("use_cpu") and not cpu_computes_bfloat16()
    expected = "torch.float32" if slow else "torch.bfloat16"
    assert str(quantization.bnb_4bit_compute_dtype) == expected
    assert cfg.dpo.beta == 0.1
    assert cfg.dpo.loss_type[0] == "sigmoid"
    assert cfg.dpo.output_dir == f"outputs/{path.stem}"


def test_short_and_full_a100_runs_differ_only_in_how_much_is_trained():
    full, short, forty = (
        load_config(f"configs/llama3-8b-a100{name}.yaml", {"use_cpu": True}).given
        for name in ("", "-short", "-40gb-short")
    )
    assert {k for k in full | short if full.get(k) != short.get(k)} == {
        "train_samples", "eval_samples", "max_steps", "num_train_epochs", "logging_steps",
        "eval_strategy", "eval_steps", "save_steps", "eval_prompts", "output_dir",
    }  # fmt: skip
    assert (short["train_samples"], short["max_steps"]) == (150, 50)
    # On 40 GB the short run takes the same steps.
    batch = ["per_device_train_batch_size", "gradient_accumulation_steps"]
    differing = {k for k in short | forty if short.get(k) != forty.get(k)}
    assert differing == {*batch, "output_dir"}
    assert math.prod(short[key] for key in batch) == math.prod(forty[key] for key in batch)


def test_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"key `learning_rat` \(did you mean `learning_rate`"):
        load_config(DEFAULT, {"learning_rat": 1e-4})
    path = tmp_path / "mine.yaml"
    path.write_text("lora_rank: 8\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key `lora_rank`"):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("lora_r", 1.5, "a valid integer"),
        ("use_peft", "perhaps", "a valid boolean"),
        ("train_samples", -3, "greater than 0"),
        ("test_split_size", 1.0, "less than 1 or 'auto'"),
        ("test_split_size", float("nan"), "less than 1"),
        ("merge_dtype", "int7", "'float16', 'bfloat16' or 'float32'"),
        ("loss_type", ["sigmoyd"], "'sigmoid', 'hinge'"),
        ("max_length", -5, "greater than or equal to 2 or 'auto'"),
        ("learning_rate", 20, "less than or equal to 1"),
        ("beta", float("inf"), "a finite number"),
        ("seed", 2**40, "less than 4294967296"),
        ("aims", {"exact": {"at": 1}}, "'at_least' or 'at_most'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_would(key, value, limit):
    with pytest.raises(ConfigError) as refused:
        load_config(DEFAULT, {key: value})
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"override: `{key}` must be ") and f"got {value!r}" in line
    assert limit in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_steps": 0}, "`max_steps: 0` trains nothing"),
        ({"questions": "data/nope.jsonl"}, "questions: .*nope.jsonl"),
        ({"questions_level": "nope"}, "questions: .*nope"),
    ],
    ids=str,
)
def test_what_would_fail_after_training_is_refused_at_once(values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(DEFAULT, values)


def test_the_formats_of_the_config_are_those_that_are_read():
    allowed = set(typing.get_args(HINTS["dataset_format"]))
    assert allowed == {"auto", *FORMATS}


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("beta: 0.1\nlora_r: 8\n\nbeta: 0.5\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: `beta` is set twice \(lines 1 and 4\)"):
        load_config(path)
    path.write_text("dataset_columns:\n  a: chosen\n  a: rejected\n")
    with pytest.raises(ConfigError, match=r"`a` is set twice \(lines 2 and 3\)"):
        load_config(path)


def test_yaml_reads_5e_5_as_text_and_the_config_as_a_number():
    assert load_config(DEFAULT, parse_overrides(["learning_rate=5e-5"])).dpo.learning_rate == 5e-5


def test_values_that_trl_refuses_are_config_errors():
    with pytest.raises(ConfigError, match="loss_weights"):
        load_config(DEFAULT, {"loss_type": ["sigmoid"], "loss_weights": [0.5, 0.5]})


def test_weights_of_4_bits_are_not_trained_themselves():
    with pytest.raises(ConfigError, match="set load_in_4bit"):
        load_config(DEFAULT, {"use_peft": False})
    assert not load_config(DEFAULT, {"use_peft": False, "load_in_4bit": False}).model.use_peft


def test_saved_config_gives_the_same_run_again(tmp_path):
    cfg = load_config(DEFAULT, {"beta": 0.3, "train_samples": 7, "output_dir": str(tmp_path)})
    cfg.save(tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml")
    assert (again.recipe, again.script, again.model) == (cfg.recipe, cfg.script, cfg.model)
    first, second = cfg.dpo.to_dict(), again.dpo.to_dict()
    assert {k for k in first if first[k] != second[k]} == set()


def test_a_run_elsewhere_can_be_looked_at_without_its_gpu():
    cfg = load_config("configs/llama3-8b-a100.yaml", may_lack_gpu=True)
    assert cfg.dpo.bf16
    assert "use_cpu" not in cfg.given  # what the config itself says stays


def test_checkpointing_under_its_other_name_is_not_ignored():
    with pytest.raises(ConfigError, match="set activation_checkpointing: true"):
        load_config(DEFAULT, {"gradient_checkpointing": True})
    on = {"gradient_checkpointing": True, "activation_checkpointing": True}
    assert load_config(DEFAULT, on).dpo.activation_checkpointing


def test_one_module_is_a_module_and_not_a_pattern():
    assert load_config(DEFAULT, {"lora_target_modules": ["q_proj"]}).model.lora_target_modules == [
        "q_proj"
    ]
    whole = load_config(DEFAULT, {"lora_target_modules": "all-linear"})
    assert whole.model.lora_target_modules == "all-linear"


def test_every_unknown_key_is_named_at_once_and_foreign_ones_with_ours():
    foreign = {"rpo_alpha": 1.0, "torch_dtype": "bfloat16", "betta": 0.2, "zzz": 1}
    with pytest.raises(ConfigError) as told:
        load_config(DEFAULT, foreign)
    assert str(told.value) == (
        "override: unknown keys `rpo_alpha` (instead: loss_type: [sigmoid, sft] with loss_weights: "
        "[1.0, rpo_alpha]); `torch_dtype` (instead: dtype); `betta` (did you mean `beta`?); `zzz`"
    )


def test_a_key_of_an_earlier_version_is_passed_over_and_named(tmp_path, capsys):
    old = load_config(DEFAULT, {"output_dir": str(tmp_path)})
    old.save(tmp_path / "config.yaml")
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("loader_timeout: 600\n")
    again = load_config(tmp_path / "config.yaml")
    assert (again.recipe, again.dpo.to_dict()) == (old.recipe, old.dpo.to_dict())
    assert "`loader_timeout` is no longer a setting" in capsys.readouterr().out


def test_a_run_pinned_to_its_commits_is_no_other_run(tmp_path):
    """As with a model of the hub, whose commit goes into the saved config."""
    cfg = load_config(DEFAULT, {"output_dir": str(tmp_path)})
    cfg.save(tmp_path / "config.yaml")
    cfg.pin("model_revision", "0123abcd")
    assert load_config(tmp_path / "config.yaml").model.model_revision == "0123abcd"
    refuse_changed(cfg, DEFAULT, {"output_dir": str(tmp_path)}, None)


def test_what_a_cell_turns_is_in_the_saved_config_and_is_no_change_of_the_first_cell(tmp_path):
    asked = {"output_dir": str(tmp_path), "max_length": "auto"}
    cfg = load_config(DEFAULT, asked)
    cfg.save(tmp_path / "config.yaml")
    cfg.settle_max_length(64)
    same = DPOConfig(**cfg.arguments(DPOConfig))
    assert same.to_dict() == cfg.dpo.to_dict()
    cfg.use(DPOConfig(**cfg.arguments(DPOConfig) | {"beta": 0.3}))
    assert (cfg.dpo.beta, cfg.given["beta"], cfg.dpo.max_length) == (0.3, 0.3, 64)
    refuse_changed(cfg, DEFAULT, asked, None)
    assert load_config(tmp_path / "config.yaml").dpo.to_dict() == cfg.dpo.to_dict()


def test_a_run_folder_is_named_after_config_and_overrides():
    def folder(**overrides):
        return load_config(DEFAULT, overrides).dpo.output_dir

    assert folder() == "outputs/smollm2-135m-cpu"
    assert folder(beta=0.2) == "outputs/smollm2-135m-cpu-beta-0.2"
    assert folder(beta=0.1) == folder(use_cpu=True) == folder()  # what the file says anyway
    # How it is logged, saved or measured makes no other run: it goes on in its folder.
    assert folder(save_steps=7, max_new_tokens=9, activation_checkpointing=True) == folder()
    assert folder(learning_rate=3e-4, beta=0.2) == folder(beta=0.2, learning_rate=3e-4)
    assert folder(loss_type=["sigmoid"], loss_weights=[1.0]).endswith(
        "-loss_type-sigmoid-loss_weights-1.0"
    )
    many = {"beta": 0.2, "seed": 1, "max_steps": 3, "learning_rate": 1e-3, "lora_r": 8}
    assert folder(**many) != folder(**many | {"seed": 2})
    assert len(folder(**many)) < 60
    assert folder(beta=0.2, output_dir="outputs/mine") == "outputs/mine"


def test_a_value_changed_after_the_config_was_read_is_told():
    asked = {"beta": 0.2, "max_length": "auto"}
    cfg = load_config(DEFAULT, asked)
    refuse_changed(cfg, DEFAULT, asked, None)
    cfg.settle_max_length(64)  # as the data decides it
    refuse_changed(cfg, DEFAULT, asked, None)
    with pytest.raises(ConfigError, match=r"`beta` is 0\.3 there and 0\.2 here.*Run the cells"):
        refuse_changed(cfg, DEFAULT, {"beta": 0.3, "max_length": "auto"}, None)
    with pytest.raises(ConfigError, match="`output_dir` is 'outputs/b' there"):
        refuse_changed(cfg, DEFAULT, {"beta": 0.2, "max_length": "auto"}, "outputs/b")


def test_a_path_that_is_there_is_meant_by_its_name_whatever_yaml_makes_of_it(tmp_path):
    for name in ("my #1 pairs.jsonl", "a: b.jsonl", "[draft].jsonl", "2024"):
        (tmp_path / name).write_text("{}")
        path = str(tmp_path / name)
        assert parse_overrides([f"dataset_name={path}"]) == {"dataset_name": path}
    assert parse_overrides(["dataset_name=null"]) == {"dataset_name": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_name", "https://user:canary@example.org/pairs.jsonl"),
        ("dataset_name", "https://:canary@example.org/pairs.jsonl"),
        ("wandb_project", "hf_" + "canary" * 6),
    ],
)
def test_a_password_is_not_taken_into_a_config(key, value):
    """It would be saved, logged and shown with the rest."""
    with pytest.raises(ConfigError, match=f"`{key}` holds a password or a token") as told:
        load_config(DEFAULT, {key: value})
    assert "canary" not in str(told.value)
    assert load_config(DEFAULT, {"wandb_project": "hf_llama_experiments"})
