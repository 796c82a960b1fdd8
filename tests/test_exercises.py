"""The tutorial's exercises: every folded answer is taken out, run, and held against the code."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from scripts.config import load_config
from scripts.data import length_lesson
from scripts.doctor import diagnose, read_run
from scripts.evaluate import reference
from scripts.intervals import length_controlled
from scripts.plan import training_steps
from scripts.plan_memory import model_sizes
from tests.tutorial import CELLS, run_cells

EXERCISES = {name: text for name, text in CELLS.items() if name.startswith("exercise-")}
FOLDED = re.compile(r"<details>\n<summary>Answer</summary>\n\n(.*?)\n</details>", re.DOTALL)
LLAMA = "configs/llama3-8b-a100.yaml"
ROW = ("prompt_ids", "chosen_ids", "rejected_ids")
by_hand = run_cells("logps", "dpo")


def answer(name: str) -> tuple[dict, str]:
    """What the folded code of an exercise defines, and the words below it."""
    (folded,) = FOLDED.findall(EXERCISES[name])
    code, words = re.fullmatch(r"```python\n(.*?)```\n\n(.*)", folded, re.DOTALL).groups()
    names: dict = {}
    exec(code, names)
    return names, words


def said(words: str) -> list[float]:
    """The numbers that the words give, in their order."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", words)
    return [float(number) for number in re.findall(r"(?<![\w.^{])-?\d+(?:\.\d+)?", plain)]


def pair(chosen, ref_chosen, rejected, ref_rejected, beta=0.1) -> dict[str, float]:
    """What the tutorial's `dpo` makes of a pair of one token an answer."""
    policy, reference = (
        {"chosen": torch.tensor([c]), "rejected": torch.tensor([r])}
        for c, r in ((chosen, rejected), (ref_chosen, ref_rejected))
    )
    return {name: value.item() for name, value in by_hand.dpo(policy, reference, beta).items()}


def one(tmp):
    names, words = answer("exercise-1")
    before, lower = pair(-12.0, -14.0, -20.0, -19.0), pair(-18.0, -14.0, -26.0, -19.0)
    figures = {"margin": "margin", "loss": "DPO loss", "weight": "weight of the gradient"}
    for name, figure in figures.items():
        assert names[name] == pytest.approx(before[figure], abs=1e-6)
    assert names["both_lower"] == pytest.approx(lower["margin"], abs=1e-6)
    assert lower["DPO loss"] == pytest.approx(before["DPO loss"], abs=1e-6)
    assert said(words)[:3] == pytest.approx([names[name] for name in figures], abs=5e-3)


def two(tmp):
    names, words = answer("exercise-2")
    assert names["weights"] == model_sizes(load_config(LLAMA, may_lack_gpu=True)).linear
    bits = run_cells("nf4")
    for name, a_weight in (("nf4", bits.ONCE), ("nf4_double", bits.TWICE), ("sixteen_bits", 16)):
        assert names[name] == pytest.approx(names["weights"] * a_weight / 8 / 1024**3)
    logits = torch.empty(1024, 128_256, dtype=torch.float32, device="meta")
    assert names["logits"] == pytest.approx(logits.nbytes / 1024**3)
    exact = [names[n] for n in ("sixteen_bits", "nf4", "nf4_double", "logits")]
    assert said(words)[:4] == pytest.approx(exact, abs=5e-3)


def three(tmp):
    names, words = answer("exercise-3")
    sizes = model_sizes(load_config(LLAMA, may_lack_gpu=True))
    assert names["whole"] == sizes.trained == said(words)[0]
    assert round(100 * sizes.trained / (sizes.base + sizes.trained), 2) == said(words)[1]
    layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
    adapted = get_peft_model(layer, LoraConfig(r=3, target_modules=["0"]))
    assert names["added"](40, 24, 3) == adapted.get_nb_trainable_parameters()[0]


def four(tmp, tiny_trainer):
    loss = answer("exercise-4")[0]["norm_loss"]
    trainer = tiny_trainer(loss_type="sigmoid_norm", beta=5.0, max_steps=2)
    trainer.train()
    row = {name: trainer.train_dataset[0][name] for name in ROW}
    theirs = trainer.evaluate(trainer.train_dataset.select([0]))["eval_loss"]
    assert abs(theirs - math.log(2)) > 0.05  # else any loss would do
    with torch.no_grad(), reference(trainer) as model:
        before = by_hand.score(model, row)
    mine = loss(by_hand.score(trainer.model, row), before, trainer.beta).item()
    assert mine == pytest.approx(theirs, abs=2e-4)


def five(tmp):
    names, words = answer("exercise-5")
    for beta, nats in names["apart"].items():
        assert pair(nats, 0.0, 0.0, 0.0, beta)["DPO loss"] == pytest.approx(0.1, abs=1e-5)
    assert said(words)[:3] == pytest.approx([*names["apart"].values()], abs=0.05)
    cfg = load_config("configs/smollm2-135m-cpu.yaml")
    assert cfg.dpo.per_device_train_batch_size * cfg.dpo.gradient_accumulation_steps == 8
    assert names["steps"] == training_steps(cfg, 553) == said(words)[-1]


def six(tmp):
    rule = answer("exercise-6")[0]["shorter_wins"]
    tokens = np.random.default_rng(0).integers(1, 9, (199, 3))
    lengths = pd.DataFrame(tokens, columns=["prompt", "chosen", "rejected"])
    lengths["chosen"] = lengths["chosen"].clip(upper=6)
    share = rule(lengths["chosen"], lengths["rejected"])
    assert f"in {share:.0%} of the pairs" in length_lesson(lengths)
    assert rule([1, 2, 3], [2, 2, 2]) == 0.5


def seven(tmp):
    names, _ = answer("exercise-7")
    steps = [
        {"step": i, "loss": 0.69 - i / 40, "learning_rate": 1e-4, "rewards/chosen": -i / 10,
         "rewards/rejected": -i / 4, "rewards/margins": 0.15 * i, "rewards/accuracies": 0.95}
        for i in range(1, 21)
    ]  # fmt: skip
    steps[-4:] = [steps[-1] | {"step": i} for i in range(17, 21)]
    (tmp / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp / "config.yaml").write_text(yaml.safe_dump({"beta": 0.1, "loss_type": ["sigmoid"]}))
    assert steps[-1]["rewards/chosen"] == -2 and steps[-1]["rewards/rejected"] == -5
    found = diagnose(read_run(tmp))[0]
    assert found.name == names["finding"]
    assert f"e^{math.log(names['times']):.1f} times" in found.evidence
    told = yaml.safe_load("{" + found.change.split(";")[0].replace(" with ", ", ") + "}")
    assert told == names["change"]
    assert load_config("configs/smollm2-135m-cpu.yaml", names["change"]).dpo.loss_type[1] == "sft"


def eight(tmp):
    names, words = answer("exercise-8")
    wins = [1.0] * 9 + [0.5] * 5 + [0.0] * 6
    lengths = np.random.default_rng(0).integers(5, 50, (2, 20))
    rate = length_controlled(wins, *lengths, range(20))["raw"]["mean"]
    assert names["win_rate"] == pytest.approx(rate) == said(words)[0]
    assert names["is_a_finding"] is False


ANSWERS = (one, two, three, four, five, six, seven, eight)
CHECKS = {f"exercise-{i}": check for i, check in enumerate(ANSWERS, 1)}


def test_every_exercise_is_checked_and_numbered_in_order():
    assert list(EXERCISES) == list(CHECKS)
    for name, text in EXERCISES.items():
        assert text.startswith(f"**Exercise {name.partition('-')[2]}.** ")


@pytest.mark.parametrize("name", CHECKS)
def test_the_folded_answer_is_right(name, tmp_path, request):
    check = CHECKS[name]
    more = [request.getfixturevalue("tiny_trainer")] if check is four else []
    check(tmp_path, *more)
