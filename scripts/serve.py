"""Ask a server of the tuned model the held-out questions, and compare with the run's own replies.

    python -m scripts.serve check --url http://localhost:8000/v1 --config outputs/<run>/config.yaml

Any OpenAI-compatible server will do: vLLM, NIM, llama.cpp's, Ollama's (http://localhost:11434/v1).
"""

from __future__ import annotations

from scripts import cli

if __name__ == "__main__":
    ARGS = cli.parse("serve")  # before the libraries load, so that --help is answered at once

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import requests

from scripts.base import RecipeError
from scripts.config import Config, config_from_args
from scripts.data import load_preferences
from scripts.model import load_tokenizer, resolve_model
from scripts.pairs.judges import CONNECT, FIRST, Endpoint
from scripts.probes import Probe, drawn, main_probe
from scripts.shipping.forms import kept_replies, measured
from scripts.tables import MEASURES

TRIES = 3  # for an answer that is no chat completion


class ServerError(RecipeError):
    """The server does not do what it should."""


class Server(Endpoint):
    """An OpenAI-compatible server of the tuned model, asked as patiently as a judge."""

    who = "server"
    more: dict = {}  # noqa: RUF012 - of each request, beside what OpenAI's API has; set, not changed

    def only_model(self) -> str:
        """The name of the one model that the server lists.

        Raises:
            ServerError: it does not answer, or lists none or several.
        """
        where = self.url.removesuffix("/chat/completions") + "/models"
        try:
            response = self.session.get(where, timeout=(CONNECT, FIRST))
            names = [model["id"] for model in response.json()["data"]]
        except requests.exceptions.JSONDecodeError:
            raise ServerError(f"{where} lists no models; name one: --model ...") from None
        except requests.RequestException as error:
            raise ServerError(f"the server at {self.url} does not answer: {error}") from None
        except (LookupError, TypeError):
            raise ServerError(f"{where} lists no models; name one: --model ...") from None
        if len(names) != 1:
            raise ServerError(f"{where} lists {len(names)} models {names[:5]}; name one: --model")
        return names[0]

    def reply(self, messages: list[dict], max_new_tokens: int) -> str:
        """The greedy reply to a conversation.

        Raises:
            JudgeError: the server is not there, stays busy or refuses.
            ServerError: its answers are no chat completions, three times in a row.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0} | self.more
        body["max_tokens"] = max_new_tokens
        for _ in range(TRIES):
            answer = self.ask(body)
            if answer and isinstance(answer["message"]["content"], str):
                return answer["message"]["content"].strip()
        raise ServerError(f"what {self.url} answers is no chat completion; is it an OpenAI API?")


def check(server: Server, cfg: Config, probe: Probe, questions: int | None) -> pd.DataFrame:
    """The server's replies to `questions` of the held-out prompts (None: all), beside the run's.

    Returns a row a prompt: `at` (its place in `probe`), `prompt`, `kept`, `served`, `same`.
    """
    at = drawn(len(probe.prompts), questions, cfg.dpo.seed)
    kept = kept_replies(cfg, probe)
    with ThreadPoolExecutor(server.workers) as pool:
        asked = [pool.submit(server.reply, probe.prompts[i], cfg.recipe.max_new_tokens) for i in at]
        try:
            served = [one.result() for one in asked]
        except RecipeError:
            pool.shutdown(cancel_futures=True)  # the first failure tells; do not wait for the rest
            raise
    frame = pd.DataFrame({"at": at, "prompt": [probe.prompts[i][-1]["content"] for i in at]})
    frame["kept"], frame["served"] = [kept[i] for i in at], served
    frame["same"] = frame["kept"] == frame["served"]
    return frame


def report(frame: pd.DataFrame, probe: Probe, lengths: dict[str, list[int]], shown: int = 3) -> str:
    """Agreement, the measures of both, and the first replies that differ. `lengths` in tokens."""
    at = frame["at"].tolist()
    table = pd.DataFrame(
        {who: measured(probe, at, frame[who].tolist(), lengths[who]) for who in ("kept", "served")}
    ).rename(index=MEASURES)
    same = frame["same"]
    lines = [f"{same.sum()} of {len(frame)} replies are the run's own, word by word "
             f"({same.mean():.2f})", table.round(3).to_string()]  # fmt: skip
    for row in frame[~same].head(shown).itertuples():
        lines.append(f"\n{row.prompt[-200:]}\n  run:    {row.kept!r}\n  server: {row.served!r}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    cfg = config_from_args(args, may_lack_gpu=True)
    settings = {"timeout": args.timeout, "workers": args.workers}
    server = Server(args.url, args.model or "", **settings)
    server.model, server.more = args.model or server.only_model(), args.body
    path, _ = resolve_model(cfg.model.model_name_or_path, cfg.model.model_revision)
    tokenizer = load_tokenizer(path, cfg.model.model_revision)
    probe = main_probe(cfg, load_preferences(cfg, tokenizer)["test"])
    frame = check(server, cfg, probe, args.questions)
    lengths = {
        who: [
            len(ids) for ids in tokenizer(frame[who].tolist(), add_special_tokens=False).input_ids
        ]
        for who in ("kept", "served")
    }
    out = cfg.run_dir / "served.jsonl"
    rows = frame.drop(columns="at").to_dict("records")
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    print(f"{server.model} at {server.url}\n{report(frame, probe, lengths)}\n\nall of them: {out}")
    if frame["same"].mean() < args.least_same:
        raise ServerError(f"fewer than {args.least_same:g} of the replies are the run's own")


if __name__ == "__main__":
    cli.command(main, ARGS)
