"""Files that serve the tuned model with Ollama, vLLM and NVIDIA NIM, and a check of any server.

    python -m scripts.export serve-files --config outputs/<run>/config.yaml
    python -m scripts.serve check --url http://localhost:8000/v1 --config outputs/<run>/config.yaml

The first writes `serve/` into the run folder; its README has the commands. The second asks a server
(anything with OpenAI's API) the held-out questions and compares its replies with the run's own.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the libraries load, so that --help is answered at once
    from scripts.cli import start

    start("serve")

import argparse
import json
import re
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import requests
from jinja2 import Template
from transformers import GenerationConfig, PreTrainedTokenizerBase

from scripts.adapter import copy_config, trained_folder
from scripts.base import RecipeError
from scripts.config import Config, config_from_args
from scripts.data import load_preferences
from scripts.gguf import conversations
from scripts.model import load_tokenizer, resolve_model
from scripts.pairs.judges import CONNECT, FIRST, Endpoint
from scripts.pairs.provenance import write_rows
from scripts.pairs.tokens import end_tokens
from scripts.probes import Probe, main_probe
from scripts.proof import kept_replies, reply_measures, require_merged
from scripts.tables import MEASURES

# https://docs.vllm.ai/en/latest/api/vllm/config/lora, MaxLoRARanks
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
README = Path(__file__).with_name("serve_readme.md")
PREFERRED = ("q8_0", "f16", "bf16", "q6_k", "q5_k_m", "q4_k_m", "f32")  # GGUF files, for Ollama


class ServingError(RecipeError):
    """The model cannot be served so, or a server does not do what it should."""


# The files


@dataclass
class Turns:
    """What a chat template writes before and after the text of each role, and to begin a reply."""

    around: dict[str, tuple[str, str]]
    reply: str
    system: str | None  # the system prompt of conversations that have none

    def go_template(self) -> str:
        """Ollama's TEMPLATE, in Go's text/template.

        https://github.com/ollama/ollama/blob/main/docs/template.md
        """
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        )
        return f"{{{{ range .Messages }}}}{{{{ {cases}{{{{ end }}}}{{{{ end }}}}{self.reply}"

    def prompt(self, messages: list[dict]) -> str:
        """What Ollama makes of a conversation: the Modelfile's SYSTEM goes first if it has none."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return "".join(m["content"].join(self.around[m["role"]]) for m in messages) + self.reply


def template_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict], reply=True) -> str:
    """The prompt as text, without a begin-of-text that the tokenizer adds to any text itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds and tokenizer.bos_token else text


def read_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Find out what the chat template writes around each role's text, by asking it.

    Raises:
        ServingError: it writes something else than the same marks around every text.
    """

    def parts(*roles: str, reply: bool = False) -> list[str]:
        """What stands before, between and after the texts of `roles`."""
        messages = [{"role": role, "content": f"a\u241eA{i}."} for i, role in enumerate(roles)]
        found = re.split(r"a\u241eA\d\.", template_text(tokenizer, messages, reply))
        if len(found) != len(roles) + 1:
            raise ServingError("the chat template changes or leaves out the text of a message")
        return found

    try:
        alone, user_end = parts("user")
        reply = parts("user", reply=True)[-1].removeprefix(user_end)
        start, to_user, to_assistant, to_again, _ = parts("system", "user", "assistant", "user")
        assistant_end = parts("user", "assistant")[-1]
    except ServingError:
        raise
    except Exception as error:  # a template raises what it likes
        raise ServingError(f"the chat template refuses a plain conversation: {error}") from error
    user = to_again.removeprefix(assistant_end)
    system_end = to_user.removesuffix(user)
    around = {
        "system": (start, system_end),
        "user": (user, user_end),
        "assistant": (to_assistant.removeprefix(user_end), assistant_end),
    }
    default = None
    if alone != user:
        default = alone.removesuffix(user).removeprefix(start).removesuffix(system_end)
    if any("{{" in text or '"""' in text for text in (reply, *sum(around.values(), ()))):
        raise ServingError('the chat template writes {{ or """, which a Modelfile cannot hold')
    return Turns(around, reply, default)


def write_serving(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, name: str | None = None,
    system: str | None = None,
) -> tuple[Path, list[str]]:  # fmt: skip
    """Write `serve/` into the run folder: Modelfile, the adapter for vLLM and NIM, README.

    Returns the folder, and remarks on what differs there.

    Raises:
        RecipeError: nothing is merged yet, or a Modelfile cannot hold the chat template.
    """
    merged, run, name = require_merged(cfg), cfg.run_dir, name or cfg.run_dir.name
    turns, remarks, folder = read_turns(tokenizer), [], run / "serve"
    talks = conversations(tokenizer).items()
    if other := [n for n, talk in talks if turns.prompt(talk) != template_text(tokenizer, talk)]:
        remarks.append(f"Ollama's prompt differs from the chat template's for: {', '.join(other)}")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "ollama").mkdir(parents=True)
    files = (run / "gguf" / f"{run.name}-{kind}.gguf" for kind in PREFERRED)
    source = next((file for file in files if file.is_file()), merged)
    (folder / "ollama" / "Modelfile").write_text(
        modelfile(cfg, tokenizer, turns, f"../../{source.relative_to(run)}", system), "utf-8"
    )
    base, rank = cfg.model.model_name_or_path, None
    if cfg.model.use_peft:
        rank = next((rank for rank in VLLM_RANKS if rank >= cfg.model.lora_r), cfg.model.lora_r)
        source, target = trained_folder(cfg), folder / "loras" / name
        target.mkdir(parents=True)
        shutil.copyfile(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        copy_config(source / "adapter_config.json", target / "adapter_config.json", base)
    text = Template(README.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        name=name, quoted=shlex.quote(name), dtype=cfg.recipe.merge_dtype, rank=rank,
        base=shlex.quote(base), revision=cfg.model.model_revision,
        lora=shlex.quote(f"{name}=loras/{name}"), config=run / "config.yaml",
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder, remarks


def modelfile(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, turns: Turns, source: str, system: str | None
) -> str:
    """Ollama's Modelfile (https://github.com/ollama/ollama/blob/main/docs/modelfile.md).

    Decoding is greedy and without a penalty on repetition, as in the evaluation.
    """
    system = turns.system if system is None else system
    generation = GenerationConfig.from_pretrained(cfg.run_dir / "merged")
    stops = tokenizer.convert_ids_to_tokens(sorted(end_tokens(tokenizer, generation)))
    length = max((cfg.dpo.max_length or 2048) + cfg.recipe.max_new_tokens, 2048)
    lines = [f"FROM {source}", f'TEMPLATE """{turns.go_template()}"""']
    lines += [f'SYSTEM """{system}"""'] if system else []
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0",
              f"PARAMETER num_ctx {length}"]  # fmt: skip
    return "\n".join(lines) + "\n"


# The check


class Server(Endpoint):
    """An OpenAI-compatible server of the tuned model; a busy one is asked again, as judges are."""

    who = "server"
    more: dict = {}  # noqa: RUF012 - of each request, beside what OpenAI's API has; set, not changed

    def only_model(self) -> str:
        """The name of the one model that the server lists.

        Raises:
            ServingError: it does not answer, or does not list exactly one.
        """
        where = self.url.removesuffix("/chat/completions") + "/models"
        try:
            response = self.session.get(where, timeout=(CONNECT, FIRST))
            (model,) = response.json()["data"]
            return model["id"]
        except (ValueError, LookupError, TypeError):
            raise ServingError(f"{where} does not list one model; name it: --model ...") from None
        except requests.RequestException as error:
            raise ServingError(f"the server at {self.url} does not answer: {error}") from None

    def reply(self, messages: list[dict], max_new_tokens: int) -> str:
        """The greedy reply to a conversation.

        Raises:
            RecipeError: the server is not there, stays busy, refuses, or answers something else.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0} | self.more
        answer = self.ask(body | {"max_tokens": max_new_tokens})
        if not answer or not isinstance(answer["message"]["content"], str):
            raise ServingError(f"{self.url} gave no chat completion; is it OpenAI's API?")
        return answer["message"]["content"].strip()


def served_replies(
    server: Server, cfg: Config, probe: Probe, questions: int | None
) -> pd.DataFrame:
    """The server's replies to `questions` of the held-out prompts (None: all), beside the run's.

    Returns a row a prompt: `prompt`, `kept`, `served`, `same`. Its index is the place in `probe`.
    """
    frame = pd.Series(kept_replies(cfg, probe, questions), name="kept").to_frame()
    asked = [probe.prompts[i] for i in frame.index]
    frame.insert(0, "prompt", [prompt[-1]["content"] for prompt in asked])
    with ThreadPoolExecutor(server.workers) as pool:
        frame["served"] = list(
            pool.map(lambda prompt: server.reply(prompt, cfg.recipe.max_new_tokens), asked)
        )
    frame["same"] = frame["kept"] == frame["served"]
    return frame


def agreement(
    frame: pd.DataFrame, probe: Probe, tokenizer: PreTrainedTokenizerBase, shown: int = 3
) -> str:
    """How many replies agree, the measures of both, and the first replies that differ."""
    columns, kept, same = {}, frame["kept"].to_dict(), frame["same"]
    for who in ("kept", "served"):
        texts = frame[who].tolist()
        lengths = map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])
        columns[who] = reply_measures(probe, kept, texts, lengths)
    table = pd.DataFrame(columns).rename(index={**MEASURES, "same": "the run's own replies"})
    lines = [f"{same.sum()} of {len(frame)} replies are the run's own, word by word"]
    lines.append(table.round(3).to_string())
    for row in frame[~same].head(shown).itertuples():
        lines.append(f"\n{row.prompt[-200:]}\n  run:    {row.kept!r}\n  server: {row.served!r}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args, may_lack_gpu=True)
    server = Server(args.url, args.model or "", timeout=args.timeout, workers=args.workers)
    server.model, server.more = args.model or server.only_model(), args.body
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    frame = served_replies(server, cfg, probe, args.questions)
    out = cfg.run_dir / "served.jsonl"
    write_rows(out, frame.to_dict("records"))
    print(f"{server.model} at {server.url}\n{agreement(frame, probe, tokenizer)}\n\nall: {out}")
    if frame["same"].mean() < args.least_same:
        raise ServingError(f"fewer than {args.least_same:g} of the replies are the run's own")
