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
import json
import os
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from scripts.adapter import refuse_other_base, require_adapter
from scripts.base import RecipeError, one_line, write_whole
from scripts.config import Config, config_from_args
from scripts.hub import someone_is_there
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.pairs.generation import Reply, generate_replies
from scripts.pairs.messages import Messages
from scripts.pairs.provenance import digest, read_jsonl
from scripts.quiet import quiet

if TYPE_CHECKING:
    import gradio

GRADIO = "pip install -r requirements-chat.txt"
LEFT, RIGHT, NEITHER = "left", "right", "neither"


class ChatError(RecipeError):
    """There is nothing to chat with, or no way to."""


@dataclass
class Turn:
    """A question with all that came before it, and both answers, the tuned one left or right."""

    prompt: Messages
    base: Reply
    tuned: Reply
    tuned_left: bool

    @property
    def sides(self) -> tuple[Reply, Reply]:
        """The answers as they are shown, left and right."""
        return (self.tuned, self.base) if self.tuned_left else (self.base, self.tuned)

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
        """Have both models answer `question` after `messages`, greedy as in the evaluation.

        Raises:
            ChatError: nothing was asked.
        """
        if not question.strip():
            raise ChatError("ask something first")
        prompt = [*messages, {"role": "user", "content": question.strip()}]
        with use_adapter(self.tuned, None) if self.base is None else nullcontext():
            base = self._reply(self.base or self.tuned, prompt)
        return Turn(prompt, base, self._reply(self.tuned, prompt), random.random() < 0.5)

    def _reply(self, model: PreTrainedModel, prompt: Messages) -> Reply:
        length = self.cfg.recipe.max_new_tokens
        return generate_replies(
            model, self.tokenizer, [prompt], max_new_tokens=length, batch_size=1, label=None
        )[0]

    def choose(self, turn: Turn, side: str) -> tuple[Messages, str]:
        """Keep the choice `left` or `right`; `neither` takes the question back.

        Returns:
            The conversation, which goes on with the better answer, and what became of the choice.

        Raises:
            RecipeError: the file of choices is damaged.
        """
        better = "tuned" if (side == LEFT) == turn.tuned_left else "base"
        messages, kept = turn.prompt[:-1], ""
        if side != NEITHER:
            text = (turn.tuned if better == "tuned" else turn.base).text
            messages = [*turn.prompt, {"role": "assistant", "content": text}]
            kept = keep_choice(self.path, turn, better)
        names = ("tuned", "base") if turn.tuned_left else ("base", "tuned")
        return messages, f"A was the {names[0]} model, B the {names[1]} one. {kept}".strip()


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
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    chosen = [row["chosen_from"] for row in rows]
    return f"So far: tuned preferred {chosen.count('tuned')} times, base {chosen.count('base')}."


def load_chat(cfg: Config) -> Chat:
    """The run's model with its adapter; of a run without one, the base and the tuned model.

    Raises:
        RecipeError: the run has not trained yet, its choices are damaged, or its model could not be
            loaded.
    """
    trained = require_adapter(cfg)
    read_jsonl(cfg.run_dir / "choices.jsonl", "key", "prompt", "chosen_from")
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


# In a browser


def web_page(chat: Chat, system: str = "") -> gradio.Blocks:
    """The chat as a page of Gradio's: a question, two answers, three buttons."""
    # Read as gradio is imported: nothing is reported to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    verdicts = {LEFT: "A is better", RIGHT: "B is better", NEITHER: "Neither"}

    def show(messages: Messages, turn: Turn | None, words: str, question=None) -> list:
        """New values of `outputs`; while a turn waits for a choice, nothing can be asked."""
        left, right = map(_shown, turn.sides) if turn else ("", "")
        told = [m for m in messages if m["role"] != "system"]
        earlier = "\n\n".join(f"{one['role']}: {one['content']}" for one in told)
        waits = turn is not None and not turn.same
        return [
            messages, turn if waits else None, gr.update(value=earlier, visible=bool(told)),
            left, right, words, gr.update() if question is None else question,
            gr.update(interactive=not waits), *[gr.update(interactive=waits)] * len(verdicts),
        ]  # fmt: skip

    def ask(messages: Messages, system: str, question: str) -> list:
        if not messages and system.strip():
            messages = [{"role": "system", "content": system.strip()}]
        try:
            turn = chat.ask(messages, question)
        except RecipeError as error:
            return show(messages, None, str(error))
        if not turn.same:
            return show(messages, turn, "Which one is better?")
        messages = [*turn.prompt, {"role": "assistant", "content": turn.base.text}]
        return show(messages, turn, "Both say the same.", question="")

    def choose(messages: Messages, turn: Turn, side: str) -> list:
        try:
            messages, words = chat.choose(turn, side)
        except RecipeError as error:
            return show(messages, turn, str(error))
        return show(messages, None, words, question=None if side == NEITHER else "")

    with gr.Blocks(title="Base and tuned", analytics_enabled=False) as page:
        gr.Markdown(
            "## Base and tuned, side by side\nYou learn which answer is whose after you choose. "
            f"Choices go to `{chat.path}`; nothing leaves this machine."
        )
        messages, turn = gr.State([]), gr.State(None)
        prompt = gr.Textbox(system, label="System prompt", lines=1, elem_id="system",
                            info="Counts from the next new conversation.")  # fmt: skip
        # Plain text: a Chatbot would fetch a picture that a model's answer names.
        earlier = gr.Textbox(label="So far", lines=6, max_lines=12, interactive=False,
                             visible=False, elem_id="earlier")  # fmt: skip
        question = gr.Textbox(label="Your question", lines=2, max_lines=12, elem_id="question")
        send = gr.Button("Ask both", variant="primary", elem_id="ask")
        with gr.Row():
            answers = [
                gr.Textbox(label=label, lines=8, max_lines=24, interactive=False, elem_id=name)
                for label, name in (("A", LEFT), ("B", RIGHT))
            ]
        with gr.Row():
            buttons = [
                gr.Button(text, interactive=False, elem_id=f"choose-{name}", min_width=120)
                for name, text in verdicts.items()
            ]
        words = gr.Markdown(elem_id="said")
        anew = gr.Button("New conversation", size="sm", elem_id="anew")
        outputs = [messages, turn, earlier, *answers, words, question, send, *buttons]
        # One at a time, whoever asks: an adapter is switched off and on.
        one = {"concurrency_limit": 1, "concurrency_id": "chat", "api_visibility": "private"}
        send.click(ask, [messages, prompt, question], outputs, **one)
        for name, button in zip(verdicts, buttons, strict=True):
            button.click(lambda m, t, side=name: choose(m, t, side), [messages, turn], outputs,
                         **one)  # fmt: skip
        anew.click(lambda: show([], None, "", question=""), None, outputs, **one)
    return page


def serve_page(chat: Chat, *, port: int | None = None, system: str = "") -> gradio.Blocks:
    """Serve the page to this machine alone, without waiting; its address is `local_url`.

    Raises:
        ChatError: the port is taken, or a proxy keeps the page from answering.
    """
    page = web_page(chat, system)
    import gradio as gr

    # The system's own fonts: gradio fetches its default ones from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        page.launch(
            share=False, server_name="127.0.0.1", server_port=port, inbrowser=False, quiet=True,
            prevent_thread_lock=True, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, theme=theme, height=820,
        )  # fmt: skip
    except OSError as error:
        raise ChatError(f"no page can be served at port {port or 7860}: {error}") from None
    except Exception as error:  # gradio asks its own page, and a proxy may stand between
        page.close()
        raise ChatError(
            f"the page does not answer ({one_line(error, 150)}): with a proxy set, export "
            "no_proxy=localhost,127.0.0.1"
        ) from None
    return page


def open_chat(cfg: Config) -> gradio.Blocks | None:
    """The page from a notebook's cell; `close()` of what is returned ends it.

    A headless run, or one without gradio, gets one line that says what to do instead.
    """
    if not someone_is_there():
        config = cfg.run_dir / "config.yaml"
        print(f"Nobody is here to chat (headless): python -m scripts.chat --config {config}")
    elif find_spec("gradio") is None:
        print(f"The chat needs gradio: in a cell, %{GRADIO} (130 MB), then run this one again")
    else:
        page = serve_page(load_chat(cfg))
        print(f"{page.local_url} (on this machine only); chat.close() ends it")
        return page
    return None


# In the terminal

HELP = (
    "Ask something; then a or b for the better answer, Enter for neither.\n"
    "/new begins another conversation, /quit ends."
)
LETTERS = {"a": LEFT, "A": LEFT, "b": RIGHT, "B": RIGHT, "": NEITHER}


def converse(chat: Chat, system: str = "") -> None:
    """The chat in a terminal, from standard input until its end or /quit."""
    print(HELP)
    begin = [{"role": "system", "content": system.strip()}] if system.strip() else []
    messages = begin
    while (line := _asked("\n> ")) not in (None, "/quit"):
        if line == "/new":
            messages = begin
        elif line:
            turn = chat.ask(messages, line)
            if turn.same:
                print(f"\nBoth: {_shown(turn.base)}")
                messages = [*turn.prompt, {"role": "assistant", "content": turn.base.text}]
                continue
            for label, reply in zip("AB", turn.sides, strict=True):
                print(f"\n{label}: {_shown(reply)}")
            while (letter := _asked("\nbetter? [a/b/Enter] ")) not in (None, *LETTERS):
                pass
            if letter is None:
                return
            messages, words = chat.choose(turn, LETTERS[letter])
            print(words)


def _asked(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except EOFError:
        return None


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    quiet()
    if args.web and find_spec("gradio") is None:
        raise ChatError(f"the chat in a browser needs gradio: {GRADIO} (about 130 MB)")
    chat = load_chat(cfg)
    if args.web:
        page = serve_page(chat, port=args.port, system=args.system or "")
        print(f"{page.local_url} (on this machine only); Ctrl-C ends it", flush=True)
        page.block_thread()
    else:
        converse(chat, args.system or "")
    if chat.path.is_file():
        print(f"\n{chat.path}: python -m scripts.data check --config {args.config} "
              f"--set dataset_name={chat.path}", file=sys.stderr)  # fmt: skip
