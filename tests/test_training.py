"""The seams of training: templates to tokens, the loss to the paper, one reference, one seed."""

import json
import math

import pytest
import torch
from conftest import BOT, EOT, LLAMA3_WORDS, PAIRS, token_rows
from datasets import Dataset
from torch.nn.functional import logsigmoid

from scripts.config import load_config
from scripts.evaluate import implicit_rewards, pair_logps
from scripts.export import completion_logps
from scripts.model import load_model, load_tokenizer
from scripts.pairs.formats import to_pair
from scripts.run_folder import describe_machine, start_run
from scripts.run_log import history
from scripts.training import build_trainer


def batch_of(trainer, rows=2):
    dataset = trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    return trainer.data_collator(dataset.select(range(rows)).to_list())


def test_template_to_tokens_one_begin_of_text_and_answers_end_their_turn(tiny_trainer):
    trainer = tiny_trainer()
    tokenizer = trainer.processing_class
    for row, (prompt, chosen, rejected) in zip(trainer.train_dataset, PAIRS, strict=False):
        assert row["prompt_ids"][0] == BOT
        for side, text in (("chosen_ids", chosen), ("rejected_ids", rejected)):
            whole = row["prompt_ids"] + row[side]
            assert whole.count(BOT) == 1
            assert row[side][-1] == EOT
            assert tokenizer.decode(row[side]) == f"{text}<|eot_id|>"
        assert prompt in tokenizer.decode(row["prompt_ids"])


def test_loss_counts_the_answers_tokens_only(tiny_trainer):
    trainer = tiny_trainer()
    batch = batch_of(trainer)
    for i, side in enumerate(("chosen_ids", "rejected_ids")):
        for j in range(2):
            row, at = trainer.train_dataset[j], 2 * i + j
            counted = batch["input_ids"][at][batch["completion_mask"][at].bool()]
            assert counted.tolist() == row[side]
    # Changing a prompt's padding or mask is no business of the loss; changing an answer's token is.
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    padded = {k: torch.nn.functional.pad(v, (0, 3)) for k, v in batch.items()}
    assert torch.allclose(loss, trainer.compute_loss(model, padded), atol=1e-6)


def test_untrained_adapter_has_zero_reward_and_loss_ln_2(tiny_trainer):
    trainer = tiny_trainer()
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    chosen, rejected = implicit_rewards(pair_logps(trainer, token_rows(trainer)), trainer.beta)
    assert abs(chosen).max() == 0.0
    assert abs(rejected).max() == 0.0


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_is_the_papers_formula_by_hand(tiny_trainer, beta):
    """Eq. 7 of arXiv 2305.18290, from log-softmaxes of whole logits, row by row."""
    trainer = tiny_trainer(beta=beta, max_steps=3)
    trainer.train()
    model, rows = trainer.model, trainer.train_dataset.select(range(2)).to_list()

    def log_prob(row, side):
        one = {"prompt_ids": row["prompt_ids"], "chosen_ids": row[side]}
        return completion_logps(model, [one])[0].sum()

    losses = []
    for row in rows:
        chosen, rejected = log_prob(row, "chosen_ids"), log_prob(row, "rejected_ids")
        with model.disable_adapter():
            ref_chosen, ref_rejected = log_prob(row, "chosen_ids"), log_prob(row, "rejected_ids")
        margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        losses.append(-logsigmoid(margin))
    by_hand = torch.stack(losses).mean().item()
    assert by_hand < math.log(2) - 0.01, "the adapter should have moved"
    loss = trainer.compute_loss(model.train(), batch_of(trainer))
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def test_the_sft_term_is_the_chosen_answers_loss_per_token(tiny_trainer):
    trainer = tiny_trainer(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])
    rows = trainer.train_dataset.select(range(2)).to_list()
    per_token = -torch.cat(completion_logps(trainer.model, rows)).mean().item()
    loss = trainer.compute_loss(trainer.model.train(), batch_of(trainer))
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * per_token, rel=1e-5)


def test_one_reference_and_no_second_model(tiny_trainer):
    trainer = tiny_trainer()
    assert trainer.ref_model is None
    assert list(trainer.model.peft_config) == ["default"]  # no copy of the adapter either
    before = pair_logps(trainer, token_rows(trainer))
    trainer.train()
    after = pair_logps(trainer, token_rows(trainer))
    assert (after["ref_chosen"] == before["ref_chosen"]).all()
    assert (after["ref_rejected"] == before["ref_rejected"]).all()
    assert (after["chosen"] != before["chosen"]).all()


def test_only_the_adapter_is_trained_and_its_count_is_true(tiny_trainer):
    trainer = tiny_trainer()
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    trainer.train()
    for name, value in trainer.model.named_parameters():
        if "lora_" in name:
            assert value.requires_grad
        else:
            assert torch.equal(value, base[name]), name
    trained, _ = trainer.model.get_nb_trainable_parameters()
    # by hand: rank 16 on 64->64 (q, o), 64->32 (k, v), 64->128 (gate, up) and 128->64 (down)
    assert trained == 2 * 16 * (2 * 128 + 2 * 96 + 3 * 192)


def test_same_seed_same_result_and_another_seed_another(tiny_trainer, tmp_path):
    def run(name, seed):
        trainer = tiny_trainer(seed=seed, output_dir=str(tmp_path / name), max_steps=3)
        trainer.train()
        return history(trainer.state.log_history)["loss"].tolist()

    first = run("a", 1)
    assert first == run("b", 1)
    assert first != run("c", 2)


def test_training_learns_the_pairs_and_logs_every_step(tiny_trainer, capsys):
    trainer = tiny_trainer(max_steps=8)
    trainer.train()
    steps = history(trainer.state.log_history)
    assert steps["loss"].iloc[0] == pytest.approx(math.log(2), abs=1e-5)
    assert steps["loss"].iloc[-1] < 0.5
    assert steps["rewards/accuracies"].iloc[-1] == 1.0
    written = history(trainer.model and (trainer.callback_handler.callbacks[-1].path))
    assert written["loss"].tolist() == steps["loss"].tolist()
    assert "step    8/8" in capsys.readouterr().out


def test_llama3_shape_in_nf4_takes_one_step(tiny_cfg, llama3_vocabulary):
    """The 8B path without its weights: system prompt, NF4, bf16, checkpointing, 128256 tokens."""
    cfg = tiny_cfg(
        load_in_4bit=True, dtype="bfloat16", bf16=True, activation_checkpointing=True, max_steps=1,
        model_name_or_path=str(llama3_vocabulary),
    )  # fmt: skip
    orca = [{"system": "Be brief.", "question": q, "chosen": c, "rejected": r} for q, c, r in PAIRS]
    rows = Dataset.from_list([to_pair(row, "orca") for row in orca])
    path = cfg.model.model_name_or_path
    model = load_model(cfg, path)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    trainer = build_trainer(cfg, model, load_tokenizer(path), {"train": rows, "test": rows})
    assert trainer.train_dataset[0]["prompt_ids"].count(LLAMA3_WORDS) == 1
    before = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    before = before.lora_B["default"].weight.detach().clone()
    trainer.train()
    after = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert history(trainer.state.log_history)["loss"].iloc[0] == pytest.approx(math.log(2), 1e-2)
    assert not torch.equal(before, after.lora_B["default"].weight)
    assert trainer.model.get_base_model().lm_head.out_features == 128_256


def test_run_folder_says_what_made_it(tiny_cfg):
    cfg = tiny_cfg()
    facts = start_run(cfg)
    assert facts == describe_machine()
    assert json.loads((cfg.run_dir / "environment.json").read_text())["trl"] == "1.16.0"
    assert "beta: 0.1" in (cfg.run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("fast", [False, True], ids=["slow CPU", "fast CPU"])
def test_a_run_says_that_it_computes_in_float32(tiny_cfg, monkeypatch, capsys, fast):
    monkeypatch.setattr("scripts.config.cpu_computes_bfloat16", lambda: fast)
    cfg = tiny_cfg(dtype="bfloat16", bf16=True)
    start_run(cfg)
    line = "This CPU computes bfloat16 slowly: the run uses float32 (dtype, bf16)"
    assert capsys.readouterr().out.count(line) == (not fast)
    assert str(cfg.model.dtype).endswith("bfloat16" if fast else "float32")
    again = load_config(cfg.run_dir / "config.yaml")  # what the run uses stands there
    assert not again.slow and again.dpo.bf16 == fast


@pytest.mark.gpu
def test_one_step_on_a_gpu_in_nf4(tiny_cfg):
    cfg = tiny_cfg(
        load_in_4bit=True, dtype="bfloat16", bf16=True, use_cpu=False, optim="paged_adamw_32bit"
    )
    path = cfg.model.model_name_or_path
    rows = Dataset.from_list(
        [to_pair({"question": q, "chosen": c, "rejected": r}, "orca") for q, c, r in PAIRS]
    )
    trainer = build_trainer(
        cfg, load_model(cfg, path), load_tokenizer(path), {"train": rows, "test": rows}
    )
    trainer.train()
    assert trainer.model.device.type == "cuda"
    assert history(trainer.state.log_history)["loss"].iloc[0] == pytest.approx(math.log(2), 1e-2)


def test_a_new_run_in_a_folder_sets_the_old_adapter_aside(tiny_cfg):
    """Else a run that is killed would leave it beside a config that it was not trained with."""
    cfg = tiny_cfg()
    (cfg.run_dir / "adapter").mkdir(parents=True)
    (cfg.run_dir / "adapter" / "weights").write_text("old")
    (cfg.run_dir / "evaluation.json").write_text("{}")
    (cfg.run_dir / "merged").mkdir()  # which the new run's merge would replace
    start_run(cfg)
    assert (cfg.run_dir / "earlier" / "merged").is_dir() and not (cfg.run_dir / "merged").exists()
    assert not (cfg.run_dir / "adapter").exists() and not (cfg.run_dir / "evaluation.json").exists()
    assert (cfg.run_dir / "earlier" / "adapter" / "weights").read_text() == "old"
    (cfg.run_dir / "adapter").mkdir()
    (cfg.run_dir / "checkpoint-1").mkdir()
    resumed = tiny_cfg(resume_from_checkpoint=str(cfg.run_dir / "checkpoint-1"))
    start_run(resumed)
    assert (cfg.run_dir / "adapter").exists()


def test_no_card_is_written_that_names_no_base_model(tiny_run):
    trainer, cfg = tiny_run(save_strategy="steps", save_steps=1)
    trainer.train()
    assert list(cfg.run_dir.glob("checkpoint-*"))
    assert not (cfg.run_dir / "README.md").exists()
