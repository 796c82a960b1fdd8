"""Base and tuned side by side: who answers, what is kept, in terminal, notebook and browser."""

import io
import json
import shutil
import socket
import sys
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
from scripts.chat import Chat, ChatError, Turn, keep_choice, load_chat
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
def chat(finished) -> Chat:
    return load_chat(finished)


def reply(text: str) -> Reply:
    return Reply(text, [1, 2], True, [1])


def turn(question: str, *, base="A long tale.", tuned="Yes.", before=()) -> Turn:
    prompt = [*before, {"role": "user", "content": question}]
    return Turn(prompt, reply(base), reply(tuned), tuned_is_a=True)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(cfg, choices: Path) -> None:
    config = ["check", "--config", str(cfg.run_dir / "config.yaml")]
    data.main(parse("data", [*config, "--set", f"dataset_name={choices}"]))


# --- who answers


def test_with_the_adapter_off_the_base_answers_and_with_it_on_the_tuned_model(finished, chat):
    asked = chat.ask([], " Why? ")
    assert asked.prompt == [{"role": "user", "content": "Why?"}]
    plain = AutoModelForCausalLM.from_pretrained(finished.model.model_name_or_path)
    options = {"max_new_tokens": 6, "batch_size": 1, "label": None}
    alone = generate_replies(plain, chat.tokenizer, [asked.prompt], **options)[0]
    assert alone.ids == asked.base.ids != asked.tuned.ids
    again = chat.ask([], "Why?")  # the adapter is on again
    assert (again.base.ids, again.tuned.ids) == (asked.base.ids, asked.tuned.ids)


def test_a_run_without_an_adapter_has_two_models(tiny_cfg):
    cfg = tiny_cfg(use_peft=False)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.model_name_or_path)
    model.lm_head.weight.data = model.lm_head.weight.data.roll(7, 0)
    model.save_pretrained(cfg.run_dir / "model")
    asked = load_chat(cfg).ask([], "Why?")
    assert asked.base.ids != asked.tuned.ids


# --- what is kept


def test_choices_are_pairs_that_a_run_can_train_on(finished, tmp_path, capsys):
    """With system prompt and earlier turns; and a later choice replaces the earlier one."""
    path = tmp_path / "choices.jsonl"
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Yes."},
    ]
    keep_choice(path, turn("Why is the sky blue?"), "base")
    keep_choice(path, turn("And the sea?", before=before), "base")
    said = keep_choice(path, turn("How many days has a week?", tuned="Seven."), "tuned")
    assert said == "So far: tuned preferred 1 times, base 2."
    said = keep_choice(path, turn("Why is the sky blue?"), "tuned")
    assert said == "So far: tuned preferred 2 times, base 1."
    kept = rows(path)
    assert [row["chosen_from"] for row in kept] == ["base", "tuned", "tuned"]
    assert kept[0]["prompt"] == [*before, {"role": "user", "content": "And the sea?"}]
    assert kept[0]["chosen"][0]["content"] == "A long tale."
    check(finished, path)
    assert "bad rows" not in capsys.readouterr().out
    cfg = replace(finished, script=replace(finished.script, dataset_name=str(path)))
    pairs = load_preferences(cfg, load_tokenizer(finished.model.model_name_or_path))
    prompts = [row["prompt"] for split in pairs.values() for row in split]
    assert len(prompts) == 3 and kept[0]["prompt"] in prompts


def test_an_empty_answer_makes_no_pair(tmp_path):
    said = keep_choice(tmp_path / "choices.jsonl", turn("Why?", base="  "), "tuned")
    assert "nothing kept" in said and not any(tmp_path.iterdir())


def test_a_damaged_file_is_told_with_its_line(tmp_path):
    (tmp_path / "choices.jsonl").write_text('{"key": "1"\n')
    with pytest.raises(RecipeError, match=r"choices\.jsonl:1 is damaged"):
        keep_choice(tmp_path / "choices.jsonl", turn("Why?"), "tuned")


# --- a conversation


class Parrots(Chat):
    """Two models that say what they were asked, one of them twice."""

    def __init__(self, path: Path) -> None:
        self.path, self.base, self.tuned = path, "base", None

    def _reply(self, model, prompt: list[dict]) -> Reply:
        text = prompt[-1]["content"]
        return reply(f"{text} {text}" if model == "base" and text != "same" else text)


@pytest.fixture
def parrots(tmp_path) -> Chat:
    return Parrots(tmp_path / "choices.jsonl")


def test_the_better_answer_goes_on_in_the_conversation(parrots):
    begin = [{"role": "system", "content": "Be brief."}]
    first = parrots.ask(begin, "one")
    messages, said = parrots.choose(first, "a" if first.tuned_is_a else "b")
    assert [m["content"] for m in messages] == ["Be brief.", "one", "one"]
    assert said.startswith(f"A was the {'tuned' if first.tuned_is_a else 'base'} model")
    second = parrots.ask(messages, "two")
    again, _ = parrots.choose(second, "")
    assert again == messages  # the question is taken back
    third = parrots.ask(again, "three")
    messages, _ = parrots.choose(third, "b" if third.tuned_is_a else "a")
    assert messages[-1]["content"] == "three three"  # the base's
    chosen = [(row["chosen_from"], row["chosen"][0]["content"]) for row in rows(parrots.path)]
    assert chosen == [("tuned", "one"), ("base", "three three")]
    same, said = parrots.choose(parrots.ask([], "same"), "a")
    assert (same[-1]["content"], said) == ("same", "Both say the same.")
    assert len(rows(parrots.path)) == 2


def test_which_answer_is_whose_is_drawn(parrots):
    asked = [parrots.ask([], "question") for _ in range(40)]
    assert {turn.tuned_is_a for turn in asked} == {True, False}
    assert all(turn.answers[0] is (turn.tuned if turn.tuned_is_a else turn.base) for turn in asked)


# --- in the terminal


def test_the_terminal_asks_and_keeps(finished, monkeypatch, capsys):
    lines = ["Why?", "a", "", "And why?", "?", "B", "/new", "Who?", "", "/quit", "How?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    config = str(finished.run_dir / "config.yaml")
    chatting.main(parse("chat", ["--config", config, "--system", "Be brief."]))
    path = finished.run_dir / "choices.jsonl"
    first, second = rows(path)
    assert [m["role"] for m in first["prompt"]] == ["system", "user"]
    assert [m["content"] for m in second["prompt"]] == [
        "Be brief.", "Why?", first["chosen"][0]["content"], "And why?",
    ]  # fmt: skip
    out = capsys.readouterr()
    assert "A was the" in out.out and "python -m scripts.data check" in out.err


def test_without_gradio_the_page_says_how_in_one_line(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ChatError, match=r"needs gradio .*pip install -r requirements-chat\.txt"):
        chatting.main(parse("chat", ["--config", str(finished.run_dir / "config.yaml"), "--web"]))


# --- in a browser


def test_a_page_that_cannot_be_served_is_one_line(parrots):
    pytest.importorskip("gradio", reason="pip install -r requirements-chat.txt")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ChatError, match=f"cannot be served .*{port}.*no_proxy"):
            chatting.serve_page(parrots, [], port)


@pytest.fixture
def browser(tmp_path):
    """A page of a real Chromium, and the hosts that it asked for something."""
    pytest.importorskip("gradio", reason="pip install -r requirements-chat.txt")
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
    page = chatting.serve_page(chat, [{"role": "system", "content": "Be brief."}])
    yield page.local_url
    page.close()


def ask(page, question: str) -> list[str]:
    """Ask both; their answers, once they are there."""
    page.locator("#question textarea").fill(question)
    page.locator("#ask").click()
    page.locator("#choose-a:not([disabled])").wait_for(timeout=60_000)
    return [page.locator(f"#{letter} textarea").input_value() for letter in "AB"]


def choose(page, letter: str) -> str:
    page.locator(f"#choose-{letter}").click()
    page.locator("#choose-a[disabled]").wait_for(timeout=20_000)
    return page.locator("#said").inner_text()


def test_a_reader_asks_chooses_and_goes_on_in_a_real_browser(
    browser, address, chat, finished, tmp_path
):
    """What is shown is what is kept, and what is kept can be trained on."""
    page = browser
    page.goto(address)
    # What is written is shown as it is, and fetches nothing.
    picture = "![a](https://example.org/a.png) <img src=https://example.org/b.png>"
    a, b = ask(page, f"Why is the sky blue? {picture}")
    assert a and b and a != b
    assert page.locator("#ask").is_disabled()  # until the reader has chosen
    assert f"blue? {picture}" in page.locator("#earlier textarea").input_value()
    page.screenshot(path=tmp_path / "wide.png", full_page=True)
    said = choose(page, "a")
    (row,) = rows(chat.path)
    assert [m["content"] for m in row["prompt"]] == [
        "Be brief.", f"Why is the sky blue? {picture}",
    ]  # fmt: skip
    assert a.removesuffix(" … (cut off)") == row["chosen"][0]["content"]
    assert b.removesuffix(" … (cut off)") == row["rejected"][0]["content"]
    assert f"A was the {row['chosen_from']} model" in said
    ask(page, "And the sea?")
    page.set_viewport_size({"width": 800, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    page.screenshot(path=tmp_path / "narrow.png", full_page=True)
    choose(page, "b")
    assert [len(row["prompt"]) for row in rows(chat.path)] == [2, 4]
    ask(page, "What do bees make?")
    choose(page, "")
    assert len(rows(chat.path)) == 2
    page.locator("#anew").click()
    ask(page, "Who?")
    choose(page, "a")
    assert len(rows(chat.path)[2]["prompt"]) == 2  # from the beginning
    page.locator("#ask").click()
    page.get_by_text("Ask something first").wait_for(timeout=20_000)
    assert page.errors == []
    # Nothing leaves the machine: no font, script or analytics from elsewhere.
    assert page.hosts <= {"127.0.0.1", None}
    assert urlparse(address).hostname == "127.0.0.1"
