"""Base and tuned side by side: who answers, what is kept, in terminal, notebook and browser."""

import io
import json
import shutil
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import get_peft_config

from scripts import chat as chatting
from scripts import data
from scripts.base import RecipeError
from scripts.chat import (
    BOTH_BAD,
    SKIP,
    Chat,
    ChatError,
    Choices,
    Models,
    Talk,
    Turn,
    load_models,
    open_chat,
    require_gradio,
)
from scripts.cli import parse
from scripts.data import load_preferences
from scripts.model import load_tokenizer
from scripts.pairs.generation import Reply, generate_replies

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip


@pytest.fixture
def finished(tiny_cfg):
    """The config of a tiny run whose adapter changes what the model says."""
    cfg = tiny_cfg()
    model = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path)
    model = get_peft_model(model, get_peft_config(cfg.model))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=1.0)
    model.save_pretrained(cfg.run_dir / "adapter")
    cfg.save(cfg.run_dir / "config.yaml")
    return cfg


@pytest.fixture
def chat(finished, tmp_path) -> Chat:
    return Chat(load_models(finished), Choices(tmp_path / "choices.jsonl"))


def reply(text: str) -> Reply:
    return Reply(text, [1, 2], True, [1])


def turn(question: str, *, base="A long tale.", tuned="Yes.", before=(), left=True) -> Turn:
    prompt = [*before, {"role": "user", "content": question}]
    return Turn(prompt, reply(base), reply(tuned), tuned_left=left)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(cfg, choices: Path) -> None:
    config = ["check", "--config", str(cfg.run_dir / "config.yaml")]
    data.main(parse("data", [*config, "--set", f"dataset_name={choices}"]))


# --- who answers


def test_with_the_adapter_off_the_base_answers_and_with_it_on_the_tuned_model(finished, chat):
    prompt = [{"role": "user", "content": "Why?"}]
    base, tuned = chat.models.answers(prompt)
    plain = AutoModelForCausalLM.from_pretrained(finished.model.model_name_or_path)
    tokenizer = load_tokenizer(finished.model.model_name_or_path)
    options = {"max_new_tokens": 6, "batch_size": 1, "label": None}
    assert generate_replies(plain, tokenizer, [prompt], **options)[0].ids == base.ids
    assert base.ids != tuned.ids
    again = chat.models.answers(prompt)
    assert [one.ids for one in again] == [base.ids, tuned.ids]  # the adapter is on again


def test_a_run_without_an_adapter_has_two_models(tiny_cfg, tmp_path):
    cfg = tiny_cfg(use_peft=False)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path)
    model.lm_head.weight.data = model.lm_head.weight.data.roll(7, 0)
    model.save_pretrained(cfg.run_dir / "model")
    base, tuned = load_models(cfg).answers([{"role": "user", "content": "Why?"}])
    assert base.ids != tuned.ids


def test_one_generation_at_a_time(chat, monkeypatch):
    inside, most = [], []

    def counted(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        try:
            return generate_replies(*args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(chatting, "generate_replies", counted)
    prompt = [{"role": "user", "content": "Why?"}]
    alone = chat.models.answers(prompt)
    got = []
    threads = [
        threading.Thread(target=lambda: got.append(chat.models.answers(prompt))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    # Nobody got the answer of a model whose adapter another had switched.
    assert [[r.ids for r in pair] for pair in got] == [[r.ids for r in alone]] * 4


def test_a_run_that_has_not_trained_is_told(tiny_cfg):
    with pytest.raises(RecipeError, match=r"no adapter in .*; train first"):
        load_models(tiny_cfg())


# --- what is kept


def test_choices_are_pairs_that_a_run_can_train_on(finished, tmp_path, capsys):
    """With system prompt and earlier turns; better, worse, both bad and skipped."""
    path = tmp_path / "choices.jsonl"
    choices = Choices(path)
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Yes."},
    ]
    choices.keep(turn("Why is the sky blue?"), "tuned")
    choices.keep(turn("And the sea?", before=before), "base")
    choices.keep(turn("What is a prime number?"), BOTH_BAD)
    choices.keep(turn("Who wrote Hamlet?"), SKIP)
    choices.keep(turn("How many days has a week?", tuned="Seven."), "tuned")
    kept = rows(path)
    assert [row["chosen_from"] for row in kept] == ["tuned", "base", "tuned"]
    assert kept[1]["prompt"] == [*before, {"role": "user", "content": "And the sea?"}]
    assert kept[1]["chosen"][0]["content"] == "A long tale."
    (neither,) = rows(choices.neither)
    assert neither["prompt"][-1]["content"] == "What is a prime number?"
    check(finished, path)
    assert "bad rows" not in capsys.readouterr().out
    cfg = replace(finished, script=replace(finished.script, dataset_name=str(path)))
    pairs = load_preferences(cfg, load_tokenizer(finished.model.model_name_or_path))
    prompts = [row["prompt"] for split in pairs.values() for row in split]
    assert len(prompts) == 3 and kept[1]["prompt"] in prompts


def test_a_later_choice_between_the_same_answers_takes_the_earlier_ones_place(tmp_path):
    choices = Choices(tmp_path / "choices.jsonl")
    one, other = turn("Why?"), turn("Who?")
    for verdict in ("tuned", "base"):
        choices.keep(one, verdict)
        choices.keep(other, "tuned")
    assert [row["chosen_from"] for row in rows(choices.path)] == ["base", "tuned"]
    choices.keep(one, BOTH_BAD)
    assert [row["prompt"][0]["content"] for row in rows(choices.path)] == ["Who?"]
    assert choices.tally() == "tuned preferred 1 times, base 0, both bad 1"
    choices.keep(one, SKIP)
    assert rows(choices.neither) == []


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_answer_makes_no_pair(finished, tmp_path, text):
    """It can't be trained on; that the reader disliked it is kept beside."""
    choices = Choices(tmp_path / "choices.jsonl")
    choices.keep(turn("Why?", base=text), "tuned")
    assert not choices.path.exists()
    assert rows(choices.neither)[0]["verdict"] == "tuned"


def test_a_damaged_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "choices.jsonl"
    path.write_text('{"key": "1"\n')
    with pytest.raises(RecipeError, match=r"choices\.jsonl:1 is damaged"):
        Choices(path).tally()


# --- a conversation


class Parrots(Models):
    """Two models that say what they were asked, one of them twice."""

    def __init__(self) -> None:
        self.seen = []

    def answers(self, prompt: list[dict]) -> tuple[Reply, Reply]:
        self.seen.append(prompt)
        text = prompt[-1]["content"]
        return reply(text if text == "same" else f"{text} {text}"), reply(text)


@pytest.fixture
def parrots(tmp_path) -> Chat:
    return Chat(Parrots(), Choices(tmp_path / "choices.jsonl"))


def test_the_better_answer_goes_on_in_the_conversation(parrots):
    talk = Talk()
    first = parrots.ask(talk, " one ", "Be brief.")
    parrots.choose(talk, "left" if first.tuned_left else "right")
    second = parrots.ask(talk, "two", "Be brief.")
    assert [m["content"] for m in second.prompt] == ["Be brief.", "one", "one", "two"]
    parrots.choose(talk, BOTH_BAD)  # the question is taken back
    third = parrots.ask(talk, "three", "Be brief.")
    assert [m["content"] for m in third.prompt] == ["Be brief.", "one", "one", "three"]
    parrots.choose(talk, "right" if third.tuned_left else "left")  # the base's
    fourth = parrots.ask(talk, "four", "Another.")  # another system prompt, another conversation
    assert [m["content"] for m in fourth.prompt] == ["Another.", "four"]
    chosen = [
        (row["chosen_from"], row["chosen"][0]["content"]) for row in rows(parrots.choices.path)
    ]
    assert chosen == [("tuned", "one"), ("base", "three three")]


def test_equal_answers_need_no_choice(parrots):
    talk = Talk()
    assert parrots.ask(talk, "same").same and talk.turn is None
    assert [m["content"] for m in talk.messages] == ["same", "same"]
    with pytest.raises(ChatError, match="nothing to choose"):
        parrots.choose(talk, "left")
    assert not parrots.choices.path.exists()


def test_a_turn_waits_for_its_choice_and_empty_questions_are_none(parrots):
    talk = Talk()
    with pytest.raises(ChatError, match="ask something"):
        parrots.ask(talk, "  ")
    parrots.ask(talk, "one")
    with pytest.raises(ChatError, match="choose between"):
        parrots.ask(talk, "two")


def test_the_sides_are_drawn_and_named_afterwards(parrots):
    lefts = set()
    for number in range(40):
        talk = Talk()
        asked = parrots.ask(talk, f"question {number}")
        assert parrots.labels(asked) == ("A", "B")
        assert asked.sides[0] is (asked.tuned if asked.tuned_left else asked.base)
        lefts.add(asked.tuned_left)
        said = parrots.choose(talk, "left")
        assert said.startswith(f"A was the {asked.whose(True)} model")
    assert lefts == {True, False}
    eyes = Chat(parrots.models, parrots.choices, blind=False)
    assert eyes.labels(turn("?", left=True)) == ("A (tuned)", "B (base)")


# --- terminal and notebook


def test_the_terminal_asks_and_keeps(finished, monkeypatch, capsys):
    lines = [
        "/system Be brief.",
        "Why?",
        "a",
        "",
        "And why?",
        "?",
        "b",
        "/new",
        "Who?",
        "x",
        "How?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    config = str(finished.run_dir / "config.yaml")
    chatting.main(parse("chat", ["--config", config]))
    path = finished.run_dir / "choices.jsonl"
    first, second = rows(path)
    assert [m["role"] for m in first["prompt"]] == ["system", "user"]
    assert [m["content"] for m in second["prompt"]] == [
        "Be brief.", "Why?", first["chosen"][0]["content"], "And why?",
    ]  # fmt: skip
    assert len(rows(path.with_name("choices.neither.jsonl"))) == 1
    out = capsys.readouterr()
    assert "A was the" in out.out and "python -m scripts.data check" in out.err
    check(finished, path)


def test_a_headless_notebook_skips_the_chat_with_one_line(finished, capsys):
    assert open_chat(finished) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "headless" in line and "python -m scripts.chat --config" in line


def test_without_gradio_the_notebook_says_how_in_one_line(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(chatting, "someone_is_there", lambda: True)
    assert open_chat(finished) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "%pip install -r requirements-chat.txt" in line
    with pytest.raises(ChatError, match=r"needs gradio: pip install -r requirements-chat\.txt"):
        chatting.main(parse("chat", ["--config", str(finished.run_dir / "config.yaml"), "--web"]))


# --- in a browser


@pytest.mark.parametrize("fault", ["port", "proxy"])
def test_a_page_that_cannot_be_served_is_one_line(parrots, monkeypatch, fault):
    pytest.importorskip("gradio", reason="pip install -r requirements-chat.txt")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if fault == "proxy":
            taken.close()
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
                monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
            for name in ("no_proxy", "NO_PROXY"):
                monkeypatch.delenv(name, raising=False)
        told = "no_proxy" if fault == "proxy" else f"at port {port}"
        with pytest.raises(ChatError, match=told):
            chatting.serve(parrots, port=port)


@pytest.fixture
def browser(tmp_path):
    """A page of a real Chromium, and the hosts that it asked for something."""
    try:
        require_gradio()
    except ChatError as error:
        pytest.skip(str(error))
    if CHROMIUM is None:
        pytest.skip("needs Chromium, and none is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS, headless=True,
            viewport={"width": 1400, "height": 1000},
        )  # fmt: skip
        page = context.pages[0]
        page.hosts = set()
        page.errors = []
        page.on("request", lambda request: page.hosts.add(urlparse(request.url).hostname))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        context.close()


@pytest.fixture
def address(chat):
    page = chatting.serve(chat)
    yield page.local_url
    page.close()


def ask(page, question: str) -> None:
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def answers(page) -> list[str]:
    """Both answers, once they are there."""
    page.locator("#choose-left:not([disabled])").wait_for(timeout=60_000)
    return [page.locator(f"#{side} textarea").input_value() for side in ("left", "right")]


def choose(page, name: str) -> str:
    page.locator(f"#choose-{name}").click()
    page.locator("#choose-left[disabled]").wait_for(timeout=20_000)
    return page.locator("#said").inner_text()


def test_a_reader_asks_chooses_and_goes_on_in_a_real_browser(
    browser, address, chat, finished, tmp_path
):
    """What is shown is what is kept, and what is kept can be trained on."""
    page = browser
    page.goto(address)
    page.locator("#system textarea, #system input").first.fill("Be brief.")
    # What is written is shown as it is, and fetches nothing.
    picture = "![a](https://example.org/a.png) <img src=https://example.org/b.png>"
    ask(page, f"Why is the sky blue? {picture}")
    left, right = answers(page)
    assert left and right and left != right
    assert page.locator("#ask").is_disabled()  # until the reader has chosen
    page.screenshot(path=tmp_path / "wide.png", full_page=True)
    said = choose(page, "left")
    (row,) = rows(chat.choices.path)
    assert [m["content"] for m in row["prompt"]] == [
        "Be brief.", f"Why is the sky blue? {picture}",
    ]  # fmt: skip
    assert left.removesuffix(" … (cut off)") == row["chosen"][0]["content"]
    assert right.removesuffix(" … (cut off)") == row["rejected"][0]["content"]
    assert f"A was the {row['chosen_from']} model" in said
    ask(page, "And the sea?")
    answers(page)
    assert f"blue? {picture}" in page.locator("#earlier textarea").input_value()
    page.set_viewport_size({"width": 800, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    for name in ("left", "right", "both-bad", "skip"):
        assert page.locator(f"#choose-{name}").is_visible()
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    choose(page, "right")
    assert [len(row["prompt"]) for row in rows(chat.choices.path)] == [2, 4]
    ask(page, "What do bees make?")
    answers(page)
    choose(page, "both-bad")
    ask(page, "Who wrote Hamlet?")
    answers(page)
    choose(page, "skip")
    assert len(rows(chat.choices.path)) == 2 and len(rows(chat.choices.neither)) == 1
    page.locator("#anew").click()
    page.locator("#earlier").wait_for(state="hidden", timeout=20_000)
    ask(page, " ")
    page.get_by_text("ask something first").wait_for(timeout=20_000)
    assert page.errors == []
    # Nothing leaves the machine: no font, script or analytics from elsewhere.
    assert page.hosts <= {"127.0.0.1", None}
    assert urlparse(address).hostname == "127.0.0.1"
    check(finished, chat.choices.path)
