"""Sampling and judging can be stopped and resumed, and every pair says where it comes from."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from conftest import EOT, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from scripts import data
from scripts.base import ROOT, InputError, RecipeError
from scripts.cli import parse
from scripts.model import load_tokenizer
from scripts.pairs.build import as_row, judge_answers, read_prompts
from scripts.pairs.judges import JudgeError, Preference
from scripts.pairs.provenance import keep_settings, read_jsonl
from scripts.pairs.sampling import (
    Sampler,
    parse_styles,
    sample_answers,
    sampler_class,
    styled,
    takes_system,
)

PROMPTS = [
    {"id": f"p{i}", "messages": [{"role": "user", "content": "Why? " * (i + 1)}]} for i in range(3)
]
STYLES = {"plain": 4, "brief": 2, "accurate": 2}


@pytest.fixture
def sample(tiny_llama3):
    sampler = Sampler("tiny", str(tiny_llama3), "main", "float32", torch.device("cpu"), 4, 0.7, 0.9)

    def run(path):
        return sample_answers(sampler, PROMPTS, path, styles=STYLES, batch_size=5, seed=0)

    return run


def test_every_prompt_is_asked_in_every_style_and_a_stopped_run_goes_on(sample, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    rows = sample(whole)
    asked = {(p["id"], style): times for p in PROMPTS for style, times in STYLES.items()}
    assert Counter((row["id"], row["style"]) for row in rows) == asked
    assert all(row["finished"] or row["tokens"] == 4 for row in rows)
    assert len({row["text"] for row in rows}) > 3  # sampled, not the same greedy reply again
    lines = whole.read_bytes().split(b"\n")
    cut.write_bytes(b"".join(line + b"\n" for line in lines[:2]) + lines[2][:99])
    assert sample(cut) == rows  # the half batch is sampled again, the whole ones are not
    assert cut.read_bytes() == whole.read_bytes()
    assert sample(cut) == rows  # all there: nothing to do


def test_requests_to_be_brief_are_put_around_the_prompt():
    why = [{"role": "user", "content": "Why?"}]
    assert styled(why, "plain") == why
    assert styled(why, "brief")[0]["content"].startswith("Why? Answer in one")
    assert [m["role"] for m in styled(why, "accurate")] == ["system", "user"]
    own = [{"role": "system", "content": "Mine."}, *why]
    assert styled(own, "accurate") == own  # a prompt's own system message is not replaced


GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>model<|end_header_id|>{% endif %}"
)
DEAF = GEMMA_LIKE.replace("{{ raise_exception('System role not supported') }}", "").replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
)


def test_a_template_without_a_place_for_a_system_message_is_noticed(tiny_llama3):
    tokenizer = load_tokenizer(str(tiny_llama3))
    assert takes_system(tokenizer)
    for template in (GEMMA_LIKE, DEAF):
        tokenizer.chat_template = template
        assert not takes_system(tokenizer)
    why = [{"role": "user", "content": "Why?"}]
    (message,) = styled(why, "accurate", system=False)
    assert message["role"] == "user"
    assert re.fullmatch(r"Answer in one .* sentences\.\n\nWhy\?", message["content"])


def test_such_a_model_is_sampled_in_every_style_and_a_prompt_it_refuses_is_named(
    command, babbler, tmp_path
):
    model = shutil.copytree(babbler, tmp_path / "gemma-like")
    (model / "chat_template.jinja").write_text(GEMMA_LIKE)
    done = command(WHYS, "--samples", "plain=1,brief=1,accurate=1", model=model)
    assert done[-2:] == ["sampled 9/9 answers", "judged 3/3 prompts"]
    own = {"prompt": [{"role": "system", "content": "S."}, {"role": "user", "content": "Why?"}]}
    with pytest.raises(RecipeError, match=r"refuses prompt 'prompt-00001': System role not"):
        command([WHYS[0], own], model=model)


class Counting:
    """Prefers the first answer; fails at the prompt numbered `fails`."""

    name, workers = "counting", 1

    def __init__(self, fails=None):
        self.settings = {"judge": self.name}
        self.asked, self.fails = [], fails

    def __call__(self, prompt, answers):
        self.asked.append(prompt["id"])
        if len(self.asked) == self.fails:
            raise JudgeError("gone")
        return [Preference("first", answers[0], answers[1], {"verdict": "AB"})]


def answers_to(prompts):
    return [
        {"id": p["id"], "style": "plain", "text": f"{p['id']} {n}", "tokens": 3, "finished": True}
        for p in prompts
        for n in range(2)
    ]


def test_judging_goes_on_where_it_stopped(tmp_path):
    path, answers = tmp_path / "judged.jsonl", answers_to(PROMPTS)
    with pytest.raises(JudgeError):
        judge_answers(Counting(fails=2), PROMPTS, answers, path)
    assert [row["id"] for row in read_jsonl(path)] == ["p0"]  # what was paid for is kept
    second = Counting()
    pairs = judge_answers(second, PROMPTS, answers, path)
    assert second.asked == ["p1", "p2"]
    assert pairs == judge_answers(Counting(), PROMPTS, answers, tmp_path / "whole.jsonl")
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert [pair["chosen_sample"] for pair in pairs] == [0, 0, 0]  # of the prompt's own answers


def test_a_pair_keeps_the_prompts_own_fields_and_how_it_came_about():
    one, two = (answer | {"sample": n} for n, answer in enumerate(answers_to(PROMPTS[:1])))
    prompt = PROMPTS[0] | {"facts": [["why"]], "split": "train", "prompt": "Why?"}
    row = as_row(prompt, Preference("kind", one, two, {"verdict": "AB"}))
    assert row["prompt"] == PROMPTS[0]["messages"]
    assert row["chosen"] == [{"role": "assistant", "content": "p0 0"}]
    assert (row["id"], row["facts"], row["verdict"]) == ("p0", [["why"]], "AB")
    assert (row["chosen_sample"], row["rejected_sample"]) == (0, 1)
    assert "split" not in row and "messages" not in row


@pytest.fixture(scope="module")
def babbler(tiny_llama3, tmp_path_factory):
    """A folder with the tiny model, made to say a few letters and then to end its turn."""
    folder = tmp_path_factory.mktemp("babbler")
    model = LlamaForCausalLM.from_pretrained(tiny_llama3)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 100.0  # outweighs all else in every state
        model.lm_head.weight[:, 0] = -3.0
        model.lm_head.weight[[EOT, *range(65, 70)], 0] = 3.0
    model.save_pretrained(folder)
    load_tokenizer(str(tiny_llama3)).save_pretrained(folder)
    return folder


@pytest.fixture
def command(babbler, reward_folder, tmp_path, capsys):
    """Calls `data build` over prompts.jsonl in `tmp_path`, by default with a judge that knows no
    tie; returns what it printed of its work."""

    def call(prompts=None, *more, judge="reward", model=babbler) -> list[str]:
        path = tmp_path / "prompts.jsonl"
        if prompts is not None:
            write_jsonl(path, prompts)
        arguments = ["build", "--prompts", str(path), "--out", str(tmp_path / "out")]
        arguments += ["--max-new-tokens", "20", "--samples", "plain=2", "--batch-size", "2"]
        arguments += ["--judge", judge, "--judge-model", str(reward_folder), "--least-gap", "-1"]
        data.main(parse("data", [*arguments, "--set", f"model_name_or_path={model}", *more]))
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith(("sampled", "judged"))]

    return call


WHYS = [{"prompt": f"Why {i}?", "split": "test" if i == 2 else "train"} for i in range(3)]


def files(folder) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_the_command_makes_a_folder_that_loads_and_a_second_call_changes_nothing(command, tmp_path):
    assert command(WHYS)[-2:] == ["sampled 6/6 answers", "judged 3/3 prompts"]
    made = files(tmp_path / "out")
    assert {"train.jsonl", "test.jsonl", ".build/samples.jsonl", ".build/judged.jsonl"} < set(made)
    assert command() == []
    assert made == files(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"started with other settings \(seed was 0, is 1\)"):
        command(None, "--seed", "1")


def sampled_for(out, name: str) -> list[dict]:
    batches = read_jsonl(out / ".build" / "samples.jsonl")
    return [row for batch in batches for row in batch["answers"] if row["id"] == name]


def test_an_edited_prompt_alone_is_sampled_and_judged_anew(command, tmp_path):
    out = tmp_path / "out"
    command(WHYS)
    before = {row["id"]: row for row in read_jsonl(out / "train.jsonl")}
    edited = [WHYS[0], WHYS[1] | {"prompt": "How then?"}, WHYS[2]]
    assert command(edited) == ["sampled 6/6 answers", "judged 3/3 prompts"]
    after = {row["id"]: row for row in read_jsonl(out / "train.jsonl")}
    assert after["prompt-00000"] == before["prompt-00000"]
    row = after["prompt-00001"]
    assert row["prompt"][0]["content"] == "How then?"
    old, new = (sampled_for(out, "prompt-00001")[part] for part in (slice(2), slice(2, 4)))
    assert [a["text"] for a in old] != [a["text"] for a in new]
    paired = {row[side][0]["content"] for side in ("chosen", "rejected")}
    assert paired == {a["text"] for a in new}
    assert len(sampled_for(out, "prompt-00000")) == 2  # no more than before
    assert command(WHYS) == []  # put back: both states are known
    assert {row["id"]: row for row in read_jsonl(out / "train.jsonl")} == before


def test_edited_facts_need_a_new_verdict_and_no_new_answers(command, tmp_path):
    out = tmp_path / "out"
    command(WHYS)
    samples = (out / ".build" / "samples.jsonl").read_bytes()
    edited = [WHYS[0] | {"facts": [["so"]]}, *WHYS[1:]]
    assert command(edited) == ["judged 3/3 prompts"]  # the last of three is the one
    assert (out / ".build" / "samples.jsonl").read_bytes() == samples
    facts = {row["id"]: row.get("facts") for row in read_jsonl(out / "train.jsonl")}
    assert facts == {"prompt-00000": [["so"]], "prompt-00001": None}
    moved = [row | {"split": "test"} for row in edited]
    assert command(moved) == []  # another split is no reason to judge again
    assert not (out / "train.jsonl").exists()
    assert len(read_jsonl(out / "test.jsonl")) == 3


def test_another_judge_judges_the_same_answers(command, reward_folder, tmp_path):
    out = tmp_path / "out"
    command(WHYS)
    made = files(out)
    assert {row["judge"] for row in read_jsonl(out / "train.jsonl")} == {f"reward:{reward_folder}"}
    assert command(None, "--least-gap", "1e9") == ["judged 3/3 prompts"]
    assert read_jsonl(out / "train.jsonl") == []  # to this judge, all are ties
    assert command(None, judge="rule") == ["judged 3/3 prompts"]
    assert {row["judge"] for row in read_jsonl(out / "train.jsonl")} <= {"rule"}
    assert (out / ".build" / "samples.jsonl").read_bytes() == made[".build/samples.jsonl"]
    assert command() == []  # the first judge's verdicts are still there
    assert (out / "train.jsonl").read_bytes() == made["train.jsonl"]


def test_another_model_is_refused_also_one_trained_on_in_the_same_folder(
    command, babbler, tiny_llama3, tmp_path
):
    model = shutil.copytree(babbler, tmp_path / "model")
    command(WHYS, model=model)
    made = files(tmp_path / "out")
    with pytest.raises(RecipeError, match=r"model was '.*', is '.*'.*; use another --out"):
        command(None, model=tiny_llama3)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] + 0.1 * torch.ones_like(weights[name])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"\(weights was '.*', is '.*'\); use another --out"):
        command(None, model=model)
    assert files(tmp_path / "out") == made


def test_settings_are_kept_for_the_next_call(tmp_path):
    keep_settings(tmp_path / "w", {"seed": 0})
    keep_settings(tmp_path / "w", {"seed": 0})
    with pytest.raises(RecipeError, match="seed was 0, is 2"):
        keep_settings(tmp_path / "w", {"seed": 2})
    (tmp_path / "w" / "settings.json").write_text('{"seed"')
    with pytest.raises(RecipeError, match=r"settings\.json is damaged"):
        keep_settings(tmp_path / "w", {"seed": 0})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"question": "Why?"}, "prompts.jsonl:1: prompt is missing"),
        ({"prompt": 3}, "prompts.jsonl:1: prompt is not text but int"),
        ({"prompt": "Why?", "split": "val"}, "split is 'val', not train or test"),
        ({"prompt": [{"role": "assistant", "content": "Hm."}]}, "does not end with the user's"),
        ({"prompt": "Why?", "id": ["a"]}, "prompts.jsonl:1: the id is not text but list"),
        ({"prompt": "Why?", "facts": ["so"]}, "facts is not a list of lists of text"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, told, tmp_path):
    with pytest.raises(RecipeError, match=told):
        read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [line]))


def test_ids_are_unique_and_files_are_there_and_hold_prompts(tmp_path):
    with pytest.raises(RecipeError, match="has no prompts: write one a line"):
        read_prompts(write_jsonl(tmp_path / "empty.jsonl", []))
    with pytest.raises(RecipeError, match="no prompts at"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(RecipeError, match=r"prompts.jsonl:2: the id 'a' is used twice"):
        read_prompts(write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Why?"}] * 2))


def test_options_that_make_no_sense_are_refused():
    assert parse_styles("plain=4,brief=2") == {"plain": 4, "brief": 2}
    for text in ("rude=1", "plain=-1", "plain=\u00b2", "plain"):
        with pytest.raises(RecipeError, match=f"'{text}'"):
            parse_styles(text)
    with pytest.raises(RecipeError, match="vLLM is not installed"):
        sampler_class("vllm")
    assert sampler_class("auto") is Sampler


def test_too_few_samples_for_a_pair_are_refused(command, tmp_path):
    with pytest.raises(InputError, match="--samples"):
        command(WHYS, "--samples", "plain=1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [b'{"answers": [{"id": "p', b"\xff\xfe", b"3"])
def test_a_damaged_line_in_the_middle_is_named(damage, sample, tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = sample(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + b"".join(lines[2:]))
    with pytest.raises(RecipeError, match=r"samples\.jsonl:2 is damaged; delete that line"):
        sample(path)
    path.write_bytes(lines[0] + b"".join(lines[2:]))
    assert len(sample(path)) == len(rows)  # as the message says


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal; what runs in the background of a script begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_command_and_no_verdict_is_lost(interruptible, babbler, loopback, tmp_path):
    lock, held = threading.Lock(), threading.Event()
    asked, answered = [], Counter()  # prompts in the order of their first question; answers to each

    def answer(path, body):
        if not path.endswith("/chat/completions"):
            return 200, {}, b"{}"
        prompt = re.search(rb"Why \d+\?", body).group()
        with lock:
            asked.extend({prompt} - {*asked})
        if prompt not in asked[:5]:
            held.wait(60)
        content = json.dumps({"choices": [{"message": {"content": '{"winner": "tie"}'}}]})
        with lock:
            answered[prompt] += 1
        return 200, {}, content.encode()

    prompts = [{"prompt": f"Why {i}?"} for i in range(20)]
    arguments = [
        "--prompts", str(write_jsonl(tmp_path / "many.jsonl", prompts)), "--out",
        str(tmp_path / "many"), "--max-new-tokens", "20", "--samples", "plain=4", "--judge",
        "endpoint", "--judge-model", "judge", "--judge-url", loopback(answer), "--set",
        f"model_name_or_path={babbler}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.data", "build", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    written = tmp_path / "many" / ".build" / "judged.jsonl"

    def judged() -> set[int]:
        return {int(row["id"].split("-")[1]) for row in read_jsonl(written)}

    def answered_in_both_orders() -> set[int]:
        return {int(p.split()[1][:-1]) for p, times in answered.items() if times == 2}

    # Five prompts have their verdict; three and more wait for their answer.
    while process.poll() is None and not (
        len(asked) >= 8 and len(whole := answered_in_both_orders()) == 5 and judged() >= whole
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)  # three questions are held for a minute
    held.set()
    last = told.strip().splitlines()[-1]
    assert last.startswith("stopped: what was sampled and judged is kept in"), told
    assert "Traceback" not in told
    assert process.returncode in (-signal.SIGINT, 130)
    assert judged() >= whole
