"""What the check passes is what trains: lengths, tools, held-out pairs, data with nothing in it."""

import json

import numpy as np
import pytest
import yaml
from conftest import explicit, pairs_in, pairs_of, write_jsonl
from test_tokens import tokenizer_of, trl_rows

from scripts import plan_memory
from scripts.base import ROOT
from scripts.config import load_config
from scripts.data import check_preferences, load_preferences, require_pairs
from scripts.model import load_tokenizer
from scripts.pairs.load import held_out_count
from scripts.pairs.report import held_out_text, report_text
from scripts.pairs.sources import DataError
from scripts.pairs.tokens import templated, tokenize_pairs
from scripts.plan_memory import choose_max_length
from scripts.preflight import FAIL, OK, WARN, local_data
from scripts.run_folder import start_run
from scripts.training import assemble

DEFAULT = "configs/smollm2-135m-cpu.yaml"
CALL = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SHOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if 'tool_calls' in m %}{% for c in m.tool_calls %}<call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}</call>{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def many(count: int, size: int = 20) -> list[dict]:
    return [explicit(f"Question {i}?", "Yes.", "n" * size + ".") for i in range(count)]


def test_max_length_is_auto_for_other_data_and_stays_for_the_configs_own(tmp_path):
    other = {"dataset_name": str(write_jsonl(tmp_path / "mine.jsonl", many(3)))}
    own = load_config(DEFAULT)
    assert own.dpo.max_length > 100 and not own.length_is_open
    assert load_config(DEFAULT, other).length_is_open
    assert load_config(DEFAULT, other | {"max_length": 300}).dpo.max_length == 300
    again = {"dataset_name": own.script.dataset_name}
    assert load_config(DEFAULT, again).dpo.max_length == own.dpo.max_length
    assert load_config(DEFAULT, other | {"max_length": None}).dpo.max_length is None


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_every_config_takes_auto(name):
    assert load_config(f"configs/{name}", {"max_length": "auto"}, may_lack_gpu=True).length_is_open


def test_the_chosen_length_covers_the_pairs_and_lands_in_the_run_folder(
    tiny_cfg, tiny_llama3, tmp_path, capsys
):
    path = write_jsonl(tmp_path / "p.jsonl", [*many(97, 100), *many(100, 3000)[97:]])
    cfg = tiny_cfg(dataset_name=str(path), max_length="auto", use_cpu=True)
    start_run(cfg)
    assert yaml.safe_load((cfg.run_dir / "config.yaml").read_text())["max_length"] == "auto"
    run = assemble(cfg)
    said = capsys.readouterr().out
    lengths = cfg.dpo.max_length
    assert f"max_length: {lengths}, chosen from the data: 9" in said
    assert "Planned memory" in said
    assert lengths % 32 == 0 and 150 < lengths < 400
    assert run.trainer.data_collator.max_length == run.trainer.args.max_length == lengths
    saved = load_config(cfg.run_dir / "config.yaml")
    assert saved.dpo.max_length == lengths and not saved.length_is_open
    going_on = {"dataset_name": str(path), "output_dir": str(cfg.run_dir)}
    going_on["resume_from_checkpoint"] = str(cfg.run_dir)  # any folder that is there
    assert load_config(DEFAULT, going_on).dpo.max_length == lengths


def test_the_chosen_length_is_what_fits_the_memory(tiny_cfg, monkeypatch):
    cfg = tiny_cfg(max_length="auto", use_cpu=True, per_device_train_batch_size=8)
    lengths = np.full((100, 3), 1500)
    whole, _ = choose_max_length(cfg, lengths)
    assert whole == 2048  # the model's own limit is nearer than the 3,008 that would cover all
    sizes = plan_memory.model_sizes(cfg)
    room = plan_memory.planned_gb(cfg, sizes, 1024) + 0.001
    monkeypatch.setattr(plan_memory, "memory_room", lambda cfg: (room, ""))
    length, said = choose_max_length(cfg, lengths)
    assert length in (1024, 1056)
    assert plan_memory.planned_gb(cfg, sizes, length) <= room + 0.05
    assert "but do not fit; a smaller per_device_train_batch_size" in said


def test_a_check_does_not_touch_the_config_of_another_run(tiny_cfg, tiny_llama3, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", many(20))
    start_run(tiny_cfg(beta=0.7))
    before = (tiny_cfg().run_dir / "config.yaml").read_text()
    cfg = tiny_cfg(dataset_name=str(path), max_length="auto", use_cpu=True)
    load_preferences(cfg, load_tokenizer(str(tiny_llama3)))
    assert (cfg.run_dir / "config.yaml").read_text() == before


def tool_rows() -> list[dict]:
    asked = [{"role": "user", "content": "Weather in Oslo?"}]
    answered = [
        *asked,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "content": "4 degrees"},
    ]
    said = [{"role": "assistant", "content": "It is 4 degrees there."}]
    other = [{"role": "assistant", "content": "I cannot know that."}]
    calls = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    shared = {"tools": [TOOL]}
    return [
        {"prompt": asked, "chosen": calls, "rejected": other} | shared,
        {"prompt": answered, "chosen": said, "rejected": other} | shared,
        {"prompt": [{"role": "user", "content": "Hi?"}], "chosen": said, "rejected": other}
        | {"tools": ""},
    ]


def test_tool_calls_are_kept_shown_and_trained_on(tiny_cfg, tmp_path):
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = SHOWS_TOOLS
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, tool_rows()), max_length=None)
    pairs, report = check_preferences(cfg, tokenizer)
    assert report.findings == []
    shown = [templated(pair, tokenizer) for pair in pairs["train"]]
    assert shown[0]["chosen"].startswith("<call>get_weather city=Oslo</call>")
    assert "<call>get_weather city=Oslo</call>" in shown[1]["prompt"]
    assert "tool\n4 degrees" in shown[1]["prompt"]
    assert ['"name": "get_weather"' in row["prompt"] for row in shown] == [True, True, False]
    assert "tool_calls" not in pairs["train"][2]["chosen"][0]
    trained = trl_rows(pairs["train"], tokenizer, tmp_path)
    assert trained == tokenize_pairs(pairs["train"].to_list(), tokenizer)


def test_tool_calls_that_the_template_leaves_out_are_bad_rows(tiny_cfg, tmp_path):
    cfg = tiny_cfg(dataset_name=pairs_in(tmp_path, tool_rows()), max_length=None)
    pairs, report = check_preferences(cfg, tokenizer_of("chatml"))
    assert [(f.where, f.kind) for f in report.bad()] == [
        ("train.jsonl:1", "template"), ("train.jsonl:2", "template")
    ]  # fmt: skip
    assert "chosen's tool call 'get_weather'" in report.bad()[0].detail
    assert {f.kind for f in report.findings} == {"template", "tools_unseen"}
    assert len(pairs["train"]) == 1


def test_as_many_are_held_out_as_tell_a_share_and_a_fifth_at_most():
    assert [held_out_count("auto", n) for n in (2, 20, 300, 485, 10_000)] == [1, 4, 60, 97, 97]
    assert held_out_count(0.1, 300) == 30
    assert "±0.10 (95%)" in held_out_text(97) and "would take" not in held_out_text(97)
    assert "±0.13 (95%); ±0.10 would take 97" in held_out_text(60)
    assert "±0.50 (95%)" in held_out_text(1)  # a share has no more room


@pytest.mark.parametrize(("share", "held"), [("auto", 60), (0.1, 30), (0.999, 299)])
def test_prompts_are_held_out_and_one_is_left_to_train_on(share, held, tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", many(300))
    cfg = tiny_cfg(dataset_name=str(path), test_split_size=share)
    pairs, report = check_preferences(cfg, load_tokenizer(cfg.model.model_name_or_path))
    assert (len(pairs["train"]), len(pairs["test"])) == (300 - held, held)
    text = report_text(report)
    assert f"train: {300 - held} rows, {300 - held} usable pairs (format: explicit)" in text
    assert f"{held} held-out prompts tell an accuracy near one half within" in text


def test_no_bad_row_is_held_out(tiny_cfg, tiny_llama3, tmp_path):
    """Rows without room at max_length are found after the texts: once one was all the held out."""
    long = [explicit("p" * 200 + f" {i}?", "Yes.", "No.") for i in range(30)]
    path = write_jsonl(tmp_path / "p.jsonl", [*long, *many(4)])
    tokenizer = load_tokenizer(str(tiny_llama3))
    for seed in range(3):
        cfg = tiny_cfg(dataset_name=str(path), seed=seed)
        pairs = load_preferences(cfg, tokenizer)
        assert {k: len(v) for k, v in pairs.items()} == {"train": 3, "test": 1}


def test_the_error_about_a_split_counts_that_split_alone(tiny_cfg, tmp_path):
    bad = [explicit(f"{i}?", "Same.", "Same.") for i in range(3)]
    folder = pairs_in(tmp_path, [*many(2), *bad], [explicit("A?", "", "No.")])
    with pytest.raises(
        DataError, match=r"of test is a usable pair; 1 × an em.*first: test.jsonl:1"
    ):
        pairs_of(tiny_cfg(dataset_name=folder))


WRONG = {
    "one.jsonl": (json.dumps(many(1)[0]).encode(), "it takes two at least"),
    "same.jsonl": (json.dumps(explicit("A?", "b.", "b.")).encode(), "none of the 1 rows"),
    "text.jsonl": (b"just text\n", "can be read; text.jsonl:1: not JSON"),
    "images.jsonl": (
        b"\n".join(json.dumps(r | {"images": ["cat.png"]}).encode() for r in many(4)),
        "none of the 4 rows",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_trainer_refuses_the_preflight_refuses(name, tiny_cfg, tmp_path):
    content, told = WRONG[name]
    (tmp_path / name).write_bytes(content)
    cfg = tiny_cfg(dataset_name=str(tmp_path / name), use_cpu=True)
    with pytest.raises(DataError) as refused:
        pairs_of(cfg)
    assert told in str(refused.value)
    ((line,), _) = local_data(cfg)
    assert line.status == FAIL and told in line.finding


def test_the_preflight_counts_the_pairs_that_the_trainer_takes(tiny_cfg, tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", many(20))
    cfg = tiny_cfg(dataset_name=str(path), use_cpu=True, max_length="auto")
    ((line,), _) = local_data(cfg)
    assert line.status == OK
    assert "16 pairs to train on, 4 held out, max_length about 64" in line.finding
    assert cfg.length_is_open and cfg.dpo.max_length == 64
    write_jsonl(path, [*many(20), explicit("Why?", "So.", "So.")])
    for mode, status in (("drop", WARN), ("error", FAIL)):
        ((line,), _) = local_data(tiny_cfg(dataset_name=str(path), use_cpu=True, on_bad_rows=mode))
        assert line.status == status and "1 bad row" in line.finding


RIVERS = "Which of the many rivers of Europe is the very longest one, tell"
REMARKS = {
    "entities": explicit("One?", "Tom &amp; Jerry.", "No."),
    "json_text": explicit('[{"role": "user", "content": "Three?"}]', "Yes.", "No."),
    "echo": explicit("Who was the first to land?", "Who was the first to land? He.", "No."),
    "scores": explicit("Five?", "Yes.", "No.") | {"score_chosen": 1.0, "score_rejected": 4.5},
    "near_leak": explicit(f"{RIVERS} me", "A.", "B."),
}  # fmt: skip


def test_each_remark_on_wording_is_made_of_its_row_and_no_other(tiny_cfg, tmp_path):
    held = explicit(RIVERS, "A.", "C.")
    folder = pairs_in(tmp_path, [*REMARKS.values(), *many(3)], [held])
    pairs, report = check_preferences(tiny_cfg(dataset_name=folder))
    assert {f.where: f.kind for f in report.findings} == {
        f"train.jsonl:{n}": kind for n, kind in enumerate(REMARKS, start=1)
    }
    assert report.bad() == [] and len(pairs["train"]) == len(REMARKS) + 3
    require_pairs(pairs, report)
