"""Ask base and tuned model side by side, and keep which answer you prefer.

    python -m scripts.chat --config outputs/<run>/config.yaml          # in the terminal
    python -m scripts.chat --config outputs/<run>/config.yaml --web    # in a browser, needs gradio

The model is the one that was trained and evaluated; with its adapter switched off it is the base.
Which answer is whose you learn after you choose. Each choice is a pair in `choices.jsonl` of the
run folder, which `scripts.data` reads and a run can train on.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("chat")

import argparse
import os
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from scripts.adapter import refuse_other_base, require_adapter
from scripts.base import RecipeError, one_line
from scripts.config import Config, config_from_args
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.pairs.generation import Reply, generate_replies
from scripts.pairs.messages import Messages
from scripts.pairs.provenance import digest, read_jsonl, write_rows
from scripts.quiet import quiet

if TYPE_CHECKING:
    import gradio


class ChatError(RecipeError):
    """The page in the browser cannot be served."""


@dataclass
class Turn:
    """A question with all that came before it, and both answers: A is the tuned one, or B."""

    prompt: Messages
    base: Reply
    tuned: Reply
    tuned_is_a: bool

    @property
    def answers(self) -> tuple[Reply, Reply]:
        """A and B, as they are shown."""
        return (self.tuned, self.base) if self.tuned_is_a else (self.base, self.tuned)

    @property
    def same(self) -> bool:
        """Whether there is nothing to choose."""
        return self.base.text == self.tuned.text


class Chat:
    """Base and tuned model of a run, and the file that takes the reader's choices."""

    def __init__(
        self, cfg: Config, tuned: PreTrainedModel | PeftModel, base: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        self.cfg, self.tuned, self.base, self.tokenizer = cfg, tuned, base, tokenizer
        self.path = cfg.run_dir / "choices.jsonl"

    def ask(self, messages: Messages, question: str) -> Turn:
        """Have both models answer `question` after `messages`, greedy as in the evaluation."""
        prompt = [*messages, {"role": "user", "content": question.strip()}]
        with use_adapter(self.tuned, None) if self.base is None else nullcontext():
            base = self._reply(self.base or self.tuned, prompt)
        return Turn(prompt, base, self._reply(self.tuned, prompt), random.random() < 0.5)

    def _reply(self, model: PreTrainedModel, prompt: Messages) -> Reply:
        length = self.cfg.recipe.max_new_tokens
        return generate_replies(
            model, self.tokenizer, [prompt], max_new_tokens=length, batch_size=1, label=None
        )[0]

    def choose(self, turn: Turn, letter: str) -> tuple[Messages, str]:
        """Keep the choice `a` or `b`; an empty one takes the question back.

        Returns:
            The conversation, which goes on with the better answer, and what became of the choice.
        """
        better = "tuned" if (letter == "a") == turn.tuned_is_a else "base"
        answer = turn.tuned if better == "tuned" else turn.base
        messages = [*turn.prompt, {"role": "assistant", "content": answer.text}]
        if turn.same:
            return messages, "Both say the same."
        names = ("tuned", "base") if turn.tuned_is_a else ("base", "tuned")
        words = f"A was the {names[0]} model, B the {names[1]} one."
        if not letter:
            return turn.prompt[:-1], words
        return messages, f"{words} {keep_choice(self.path, turn, better)}"


def keep_choice(path: Path, turn: Turn, better: str) -> str:
    """Write down that `better` (`base` or `tuned`) gave the better answer; returns the tally.

    The models answer greedily, so the same question has the same answers: a later choice between
    them replaces the earlier one, and no pair stands twice or contradicts itself.
    """
    answers = {"base": turn.base.text, "tuned": turn.tuned.text}
    if not all(text.strip() for text in answers.values()):
        return "One answer is empty: no pair to train on, nothing kept."
    worse = "base" if better == "tuned" else "tuned"
    row = {"key": digest([turn.prompt, answers]), "prompt": turn.prompt}
    for side, who in (("chosen", better), ("rejected", worse)):
        row[side] = [{"role": "assistant", "content": answers[who]}]
    row["chosen_from"] = better
    earlier = read_jsonl(path, "key", "prompt", "chosen_from")
    rows = [old for old in earlier if old["key"] != row["key"]] + [row]
    write_rows(path, rows)
    chosen = [row["chosen_from"] for row in rows]
    return f"So far: tuned preferred {chosen.count('tuned')} times, base {chosen.count('base')}."


def load_chat(cfg: Config) -> Chat:
    """The run's model with its adapter; of a run without one, the base and the tuned model.

    Raises:
        RecipeError: the run has not trained yet, or its model could not be loaded.
    """
    trained = require_adapter(cfg)
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    model = load_model(cfg, path)
    if cfg.model.use_peft:
        refuse_other_base(trained, path)
        return Chat(cfg, PeftModel.from_pretrained(model, trained).eval(), None, tokenizer)
    tuned = AutoModelForCausalLM.from_pretrained(
        trained, dtype=model.dtype, device_map={"": cfg.dpo.device}, use_safetensors=True
    )
    return Chat(cfg, tuned.eval(), model.eval(), tokenizer)


def _shown(reply: Reply) -> str:
    """An answer as the reader sees it."""
    return (reply.text or "(nothing)") + ("" if reply.finished else " … (cut off)")


def converse(chat: Chat, begin: Messages) -> None:
    """The chat in a terminal, from standard input until its end or /quit."""
    print("Ask something; then a or b for the better answer, Enter for neither.")
    print("/new begins another conversation, /quit ends.")
    messages = begin
    while (line := _asked("\n> ")) not in (None, "/quit"):
        if line == "/new":
            messages = begin
        elif line:
            turn, letter = chat.ask(messages, line), ""
            for name, reply in zip("AB", turn.answers, strict=True):
                print(f"\n{name}: {_shown(reply)}")
            if not turn.same:
                while (letter := _asked("\nbetter? [a/b/Enter] ")) not in (None, *"aAbB", ""):
                    pass
                if letter is None:
                    return
            messages, words = chat.choose(turn, letter.lower())
            print(words)


def _asked(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def serve_page(chat: Chat, begin: Messages, port: int | None = None) -> gradio.Blocks:
    """Serve the chat as a page to this machine alone, without waiting; its address is `local_url`.

    Raises:
        ChatError: the port is taken, or a proxy keeps the page from answering.
    """
    # Read as gradio is imported: nothing is reported to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    def show(messages: Messages, turn: Turn | None, words: str) -> list:
        """New values of `outputs`; while a turn waits for a choice, nothing can be asked."""
        told = [m for m in (turn.prompt if turn else messages) if m["role"] != "system"]
        earlier = "\n\n".join(f"{one['role']}: {one['content']}" for one in told)
        a, b = map(_shown, turn.answers) if turn else ("", "")
        buttons = [gr.update(interactive=turn is not None)] * 3
        return [messages, turn, earlier, a, b, words, gr.update(interactive=not turn), *buttons]

    def ask(messages: Messages, question: str) -> list:
        if not question.strip():
            return ["", *show(messages, None, "Ask something first.")]
        turn = chat.ask(messages, question)
        if turn.same:
            return ["", *choose(turn, "a")]
        return ["", *show(messages, turn, "Which one is better?")]

    def choose(turn: Turn, letter: str) -> list:
        messages, words = chat.choose(turn, letter)
        return show(messages, None, words)

    # Plain text everywhere: a Chatbot would fetch a picture that a model's answer names. The
    # system's own fonts: gradio fetches its default ones from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    with gr.Blocks(title="Base and tuned", analytics_enabled=False) as page:
        gr.Markdown(
            "## Base and tuned, side by side\nYou learn which answer is whose after you choose. "
            f"Choices go to `{chat.path}`; nothing leaves this machine."
        )
        messages, turn = gr.State(begin), gr.State(None)
        earlier = gr.Textbox(label="So far", lines=4, max_lines=12, interactive=False,
                             elem_id="earlier")  # fmt: skip
        question = gr.Textbox(label="Your question", lines=2, max_lines=12, elem_id="question")
        send = gr.Button("Ask both", variant="primary", elem_id="ask")
        with gr.Row():
            answers = [
                gr.Textbox(label=name, lines=8, max_lines=24, interactive=False, elem_id=name)
                for name in "AB"
            ]
        with gr.Row():
            choices = {"a": "A is better", "b": "B is better", "": "Neither"}
            buttons = [
                gr.Button(text, interactive=False, elem_id=f"choose-{letter}", min_width=120)
                for letter, text in choices.items()
            ]
        words = gr.Markdown(elem_id="said")
        anew = gr.Button("New conversation", size="sm", elem_id="anew")
        outputs = [messages, turn, earlier, *answers, words, send, *buttons]
        # One at a time, whoever asks: an adapter is switched off and on.
        one = {"concurrency_limit": 1, "concurrency_id": "chat", "api_visibility": "private"}
        send.click(ask, [messages, question], [question, *outputs], **one)
        for letter, button in zip(choices, buttons, strict=True):
            button.click(partial(choose, letter=letter), [turn], outputs, **one)
        anew.click(lambda: show(begin, None, ""), None, outputs, **one)
    try:
        page.launch(
            share=False, server_name="127.0.0.1", server_port=port, quiet=True, theme=theme,
            prevent_thread_lock=True,
        )  # fmt: skip
    except Exception as error:  # gradio asks its own page, and a proxy may stand between
        page.close()
        raise ChatError(
            f"the page cannot be served ({one_line(error, 150)}); if a proxy is set, export "
            "no_proxy=localhost,127.0.0.1"
        ) from None
    return page


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    quiet()
    if args.web and find_spec("gradio") is None:
        raise ChatError("--web needs gradio (130 MB): pip install -r requirements-chat.txt")
    chat = load_chat(cfg)
    begin = [{"role": "system", "content": args.system.strip()}] if args.system else []
    if args.web:
        page = serve_page(chat, begin, args.port)
        print(f"{page.local_url} (on this machine only); Ctrl-C ends it", flush=True)
        page.block_thread()
    else:
        converse(chat, begin)
    if chat.path.is_file():
        print(f"\n{chat.path}: python -m scripts.data check --config {args.config} "
              f"--set dataset_name={chat.path}", file=sys.stderr)  # fmt: skip
