"""Ask base and tuned model side by side, and keep which answer you prefer.

    python -m scripts.chat --config outputs/<run>/config.yaml          # in the terminal
    python -m scripts.chat --config outputs/<run>/config.yaml --web    # in a browser, needs gradio

The model is the one that was trained and evaluated; with its adapter switched off it is the base.
What you prefer is a pair in `choices.jsonl` of the run folder, which `scripts.data` reads.
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("chat")  # before the libraries load, so that --help is answered at once

import argparse
import os
import random
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import use_adapter

from scripts.adapter import refuse_other_base, require_adapter
from scripts.base import RecipeError
from scripts.config import Config, config_from_args
from scripts.login import someone_is_there
from scripts.model import load_model, load_tokenizer, resolve_model
from scripts.pairs.generation import Reply, generate_replies
from scripts.pairs.provenance import digest, read_jsonl, write_whole
from scripts.quiet import quiet

if TYPE_CHECKING:
    import gradio

GRADIO = "pip install -r requirements-chat.txt"
BOTH_BAD, SKIP = "both bad", "skip"


class ChatError(RecipeError):
    """There is nothing to chat with, or no way to."""


@dataclass
class Turn:
    """A question with all that came before it, and both answers, the tuned one left or right."""

    prompt: list[dict]
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

    def whose(self, left: bool) -> str:
        """`base` or `tuned`, of the left or the right answer."""
        return "tuned" if left == self.tuned_left else "base"


@dataclass
class Talk:
    """One reader's conversation: what was said, and the turn that waits for a choice."""

    messages: list[dict] = field(default_factory=list)
    turn: Turn | None = None


class Models:
    """Base and tuned model of a finished run; they answer one at a time, whoever asks."""

    def __init__(
        self, cfg: Config, tuned: PreTrainedModel | PeftModel, base: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        self.cfg, self.tuned, self.base, self.tokenizer = cfg, tuned, base, tokenizer
        self.lock = threading.Lock()

    def answers(self, prompt: list[dict]) -> tuple[Reply, Reply]:
        """The replies of base and tuned model to a list of messages, greedy as in the
        evaluation."""
        with self.lock:
            off = use_adapter(self.tuned, None) if self.base is None else nullcontext()
            with off:
                base = self._reply(self.base or self.tuned, prompt)
            return base, self._reply(self.tuned, prompt)

    def _reply(self, model: PreTrainedModel, prompt: list[dict]) -> Reply:
        length = self.cfg.recipe.max_new_tokens
        return generate_replies(
            model, self.tokenizer, [prompt], max_new_tokens=length, batch_size=1, label=None
        )[0]


def load_models(cfg: Config) -> Models:
    """The run's model with its adapter; of a run without one, the base and the tuned model.

    Raises:
        RecipeError: the run has not trained yet, or its model cannot be had.
    """
    trained = require_adapter(cfg)
    path, where = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    print(where)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    model = load_model(cfg, path)
    if cfg.model.use_peft:
        refuse_other_base(trained, path)
        return Models(cfg, PeftModel.from_pretrained(model, trained).eval(), None, tokenizer)
    tuned = AutoModelForCausalLM.from_pretrained(
        trained, dtype=model.dtype, device_map={"": cfg.dpo.device}, use_safetensors=True
    )
    return Models(cfg, tuned.eval(), model.eval(), tokenizer)


class Choices:
    """What the reader preferred: pairs in `path`, and the rest beside it in `*.neither.jsonl`.

    The rest are answers both bad, and those one of which is empty, which cannot be trained on.
    Greedy answers to the same question are the same; a later choice between them takes the
    earlier one's place, so that no pair stands twice or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.neither = path, path.with_suffix(".neither.jsonl")
        self.lock = threading.Lock()

    def keep(self, turn: Turn, verdict: str) -> None:
        """Write a verdict down: `tuned`, `base`, `both bad` or `skip`, which is kept nowhere.

        Raises:
            RecipeError: the file is damaged.
        """
        answers = {"base": turn.base.text, "tuned": turn.tuned.text}
        key = digest([turn.prompt, answers])
        row = {"key": key, "prompt": turn.prompt}
        rows: dict[Path, dict | None] = {self.path: None, self.neither: None}
        if verdict in answers and all(text.strip() for text in answers.values()):
            other = "base" if verdict == "tuned" else "tuned"
            sides = {
                side: [{"role": "assistant", "content": answers[who]}]
                for side, who in (("chosen", verdict), ("rejected", other))
            }
            rows[self.path] = row | sides | {"chosen_from": verdict}
        elif verdict != SKIP:  # nothing to train on
            rows[self.neither] = row | answers | {"verdict": verdict}
        with self.lock:
            for path, new in rows.items():
                before = read_jsonl(path, "key", "prompt")
                after = [kept for kept in before if kept["key"] != key] + [new] * (new is not None)
                if after != before:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(path, after)

    def tally(self) -> str:
        """How often which was preferred."""
        chosen = [row["chosen_from"] for row in read_jsonl(self.path, "key", "chosen_from")]
        bad = [row["verdict"] for row in read_jsonl(self.neither, "key", "verdict")].count(BOTH_BAD)
        return (
            f"tuned preferred {chosen.count('tuned')} times, base {chosen.count('base')}, "
            f"both bad {bad}"
        )


class Chat:
    """The models, the choices, and what a turn does to a reader's `Talk`."""

    def __init__(self, models: Models, choices: Choices, blind: bool = True) -> None:
        self.models, self.choices, self.blind = models, choices, blind

    def ask(self, talk: Talk, question: str, system: str = "") -> Turn:
        """Have both models answer `question` after what was said; the turn waits for `choose`.

        A system prompt begins a conversation; another one begins another.

        Raises:
            ChatError: nothing was asked, or the turn before still waits.
        """
        if not question.strip():
            raise ChatError("ask something first")
        if talk.turn is not None:
            raise ChatError("choose between the two answers first, or skip")
        before = talk.messages[0] if talk.messages else {}
        had = before["content"] if before.get("role") == "system" else ""
        if talk.messages and system.strip() != had:
            talk.messages = []
        if system.strip() and not talk.messages:
            talk.messages = [{"role": "system", "content": system.strip()}]
        prompt = [*talk.messages, {"role": "user", "content": question.strip()}]
        base, tuned = self.models.answers(prompt)
        turn = Turn(prompt, base, tuned, tuned_left=random.random() < 0.5)
        if turn.same:
            talk.messages = [*prompt, {"role": "assistant", "content": base.text}]
        else:
            talk.turn = turn
        return turn

    def choose(self, talk: Talk, verdict: str) -> str:
        """Settle the turn that waits: `left`, `right`, `both bad` or `skip`. The better answer
        goes into the conversation; with neither, the question is taken back.

        Returns:
            What became of it, in a sentence.
        """
        turn = talk.turn
        if turn is None:
            raise ChatError("there is nothing to choose yet")
        whose = turn.whose(verdict == "left") if verdict in ("left", "right") else verdict
        self.choices.keep(turn, whose)
        talk.turn = None
        if whose in ("base", "tuned"):
            better = turn.tuned if whose == "tuned" else turn.base
            talk.messages = [*turn.prompt, {"role": "assistant", "content": better.text}]
        sides = f"A was the {turn.whose(True)} model, B the {turn.whose(False)} one"
        return f"{sides}. So far: {self.choices.tally()}."

    def labels(self, turn: Turn | None) -> tuple[str, str]:
        """What stands above the two answers."""
        if turn is None or self.blind:
            return "A", "B"
        return f"A ({turn.whose(True)})", f"B ({turn.whose(False)})"


def shown(reply: Reply) -> str:
    """An answer as the reader sees it."""
    return (reply.text or "(nothing)") + ("" if reply.finished else " … (cut off)")


def transcript(talk: Talk) -> str:
    """What was said so far, as text, the system prompt apart."""
    told = [one for one in talk.messages if one["role"] != "system"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in told)


def require_gradio() -> None:
    """Refuse early what needs gradio.

    Raises:
        ChatError: it is not installed; the line says how.
    """
    if find_spec("gradio") is None:
        raise ChatError(f"the chat in a browser needs gradio: {GRADIO} (about 130 MB)")


def web_page(chat: Chat, system: str = "") -> gradio.Blocks:
    """The chat as a page of Gradio's: a question, two answers, four buttons."""
    # Read as gradio is imported: nothing is to be reported to anyone.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import gradio as gr

    verdicts = {"left": "A is better", "right": "B is better", BOTH_BAD: "Both are bad",
                SKIP: "Skip"}  # fmt: skip

    def waiting(on: bool) -> list:
        return [gr.update(interactive=on) for _ in verdicts]

    def show(talk: Talk, turn: Turn | None, words: str, question=None) -> list:
        left, right = map(shown, turn.sides) if turn else ("", "")
        labels = chat.labels(turn)
        waits = talk.turn is not None
        return [
            talk, gr.update(value=transcript(talk), visible=bool(talk.messages)),
            gr.update(value=left, label=labels[0]), gr.update(value=right, label=labels[1]), words,
            gr.update() if question is None else question, gr.update(interactive=not waits),
            *waiting(waits),
        ]  # fmt: skip

    def ask(talk: Talk, system: str, question: str) -> list:
        try:
            turn = chat.ask(talk, question, system)
        except RecipeError as error:
            return show(talk, talk.turn, str(error))
        words = "Both say the same." if turn.same else "Which one is better?"
        return show(talk, turn, words, question="" if turn.same else None)

    def choose(talk: Talk, verdict: str) -> list:
        turn = talk.turn
        try:
            words = chat.choose(talk, verdict)
        except RecipeError as error:
            return show(talk, turn, str(error))
        taken = verdict in ("left", "right")
        return show(talk, None, words, question="" if taken else None)

    with gr.Blocks(title="Base and tuned", analytics_enabled=False) as page:
        gr.Markdown(
            "## Base and tuned, side by side\n"
            + "Which answer is whose is told after you choose. " * chat.blind
            + f"Choices go to `{chat.choices.path}`; nothing leaves this machine."
        )
        talk = gr.State(Talk())
        prompt = gr.Textbox(system, label="System prompt", lines=1, elem_id="system",
                            info="Another one begins another conversation.")  # fmt: skip
        # Plain text: a Chatbot would fetch a picture that a model's answer names.
        earlier = gr.Textbox(label="So far", lines=6, max_lines=12, interactive=False,
                             visible=False, elem_id="earlier")  # fmt: skip
        question = gr.Textbox(label="Your question", lines=2, max_lines=12, elem_id="question")
        send = gr.Button("Ask both", variant="primary", elem_id="ask")
        with gr.Row():
            answers = [
                gr.Textbox(label=label, lines=8, max_lines=24, interactive=False, elem_id=name)
                for label, name in (("A", "left"), ("B", "right"))
            ]
        with gr.Row():
            buttons = [
                gr.Button(text, interactive=False, elem_id=f"choose-{name.replace(' ', '-')}",
                          min_width=120)
                for name, text in verdicts.items()
            ]  # fmt: skip
        words = gr.Markdown(elem_id="said")
        anew = gr.Button("New conversation", size="sm", elem_id="anew")
        outputs = [talk, earlier, *answers, words, question, send, *buttons]
        private = {"api_visibility": "private"}
        one = {"concurrency_limit": 1, "concurrency_id": "models", **private}
        send.click(ask, [talk, prompt, question], outputs, **one)
        for name, button in zip(verdicts, buttons, strict=True):
            button.click(lambda talk, v=name: choose(talk, v), [talk], outputs, **private)
        anew.click(lambda: show(Talk(), None, "", question=""), None, outputs, **private)
    return page


def serve(chat: Chat, *, port: int | None = None, system: str = "") -> gradio.Blocks:
    """Serve the page to this machine alone, without waiting; its address is `local_url`.

    Raises:
        ChatError: the port is taken, or a proxy keeps the page from answering.
    """
    page = web_page(chat, system)
    import gradio as gr

    # Fonts of the system's own: gradio's default ones are fetched from Google.
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
            f"the page does not answer ({' '.join(str(error).split())[:150]}): with a proxy set, "
            "export no_proxy=localhost,127.0.0.1"
        ) from None
    return page


def open_chat(cfg: Config, *, blind: bool = True) -> gradio.Blocks | None:
    """The notebook's last cell: the page, where someone is there to use it.

    A headless run skips it with a line that says so. `close()` of what is returned ends it.
    """
    config = cfg.run_dir / "config.yaml"
    if not someone_is_there():
        print(f"Nobody is here to chat (headless): python -m scripts.chat --config {config}")
        return None
    try:
        require_gradio()
    except ChatError as error:
        print(f"{error}; in a cell, %{GRADIO}, then run this one again")
        return None
    page = serve(Chat(load_models(cfg), Choices(cfg.run_dir / "choices.jsonl"), blind))
    print(f"{page.local_url} (on this machine only); chat.close() ends it")
    return page


HELP = (
    "Ask something; then a or b for the better answer, x if both are bad, Enter to skip.\n"
    "/new begins another conversation, /system TEXT with a system prompt, /quit ends."
)
LETTERS = {"a": "left", "b": "right", "x": BOTH_BAD, "": SKIP}


def converse(chat: Chat, system: str = "") -> None:
    """The chat in a terminal, from standard input until its end or /quit."""
    print(HELP)
    talk = Talk()
    while (line := _asked("\n> ")) is not None and line.strip() != "/quit":
        command, _, rest = line.strip().partition(" ")
        if command in ("/new", "/system"):
            talk, system = Talk(), rest if command == "/system" else system
            continue
        if not line.strip():
            continue
        turn = chat.ask(talk, line, system)
        if turn.same:
            print(f"\nBoth: {shown(turn.base)}")
            continue
        for label, reply in zip(chat.labels(turn), turn.sides, strict=True):
            print(f"\n{label}: {shown(reply)}")
        while (letter := _asked("\nbetter? [a/b/x/Enter] ")) is not None:
            if letter.strip().lower() in LETTERS:
                break
        if letter is None:
            return
        print(chat.choose(talk, LETTERS[letter.strip().lower()]))


def _asked(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args)
    quiet()
    if args.web:
        require_gradio()
    choices = Choices(args.choices or cfg.run_dir / "choices.jsonl")
    choices.tally()  # a damaged file shows before the model is loaded
    chat = Chat(load_models(cfg), choices, blind=not args.open_eyed)
    if not args.web:
        converse(chat, args.system or "")
    else:
        page = serve(chat, port=args.port, system=args.system or "")
        print(f"{page.local_url} (on this machine only); Ctrl-C ends it", flush=True)
        page.block_thread()
    if choices.path.is_file():
        print(f"\n{choices.path}: python -m scripts.data check --config {args.config} "
              f"--set dataset_name={choices.path}", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    cli.command(main, ARGS)
