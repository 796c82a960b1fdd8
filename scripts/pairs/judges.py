"""Judges: given one prompt and the answers sampled to it, say which of them make a pair.

A judge is a callable `(prompt, answers) -> [Preference]`; ties give no pair. `prompt` has
`messages` and perhaps `facts`; an answer has `text`, `tokens`, `finished` and `style`. A judge has
a `name`, `settings` (all that its verdicts depend on, prompt and answers aside), and `workers`: how
many prompts it can be asked about at a time.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import re
from itertools import pairwise
from typing import NamedTuple

import requests
import torch
from requests.adapters import HTTPAdapter
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from urllib3.util import Retry

from scripts.base import RecipeError, one_line
from scripts.pairs.provenance import weights_state
from scripts.pairs.text import fact_recall, repeated_ngram_share
from scripts.pairs.tokens import tokenize_conversations


class JudgeError(RecipeError):
    """The judge cannot be used; what is judged so far is kept, and the same command goes on."""


class Preference(NamedTuple):
    """One pair: its kind, the two answers, and what the judge said of them."""

    kind: str
    chosen: dict
    rejected: dict
    verdict: dict


class Rule:
    """The rule that made the default data: it prefers short, finished answers with all key facts.

    An answer is good if it is finished within 80 tokens, ends with a full stop or the like, is one
    paragraph, repeats (next to) nothing, and mentions as many key facts as any of the answers does,
    at least one where the prompt has any. Chosen is the longest good one: the limit of 80 tokens
    makes it brief enough, and the very shortest answer often says next to nothing.

    - `concise`: rejected is the longest answer to the plain question, at least 1.5 times as long.
    - `content`: rejected is a finished answer of much the same length (0.67 to 1.5 times) that
      mentions fewer of the facts. It keeps "short" from being all there is to learn.
    """

    name, workers = "rule", 1

    @property
    def settings(self) -> dict:
        """The rule is its code: after any change of it, prompts are judged anew."""
        return {"judge": self.name, "code": inspect.getsource(Rule)}

    def __call__(self, prompt: dict, answers: list[dict]) -> list[Preference]:
        answers = [
            a
            | {
                "recall": fact_recall(a["text"], prompt.get("facts") or []),
                "repeats": repeated_ngram_share(a["text"].lower().split()),
            }
            for a in answers
        ]
        best = max(a["recall"] for a in answers)
        good = [
            a
            for a in answers
            if a["finished"] and a["tokens"] <= 80 and a["recall"] == best > 0
            if a["repeats"] < 0.05 and a["text"][-1:] in tuple(".!?") and "\n\n" not in a["text"]
        ]
        if not good:
            return []
        chosen = max(good, key=lambda a: a["tokens"])
        size = chosen["tokens"]
        wordy = [a for a in answers if a["style"] == "plain" and a["tokens"] >= 1.5 * size]
        empty = [
            a
            for a in answers
            if a["finished"] and a["recall"] < best and size / 1.5 <= a["tokens"] <= 1.5 * size
        ]
        pairs = []
        if wordy:
            pairs.append(("concise", max(wordy, key=lambda a: a["tokens"])))
        if empty:
            nearest = min(empty, key=lambda a: (a["recall"], abs(a["tokens"] - size)))
            pairs.append(("content", nearest))
        return [
            Preference(
                kind, chosen, rejected,
                {"chosen_recall": best, "rejected_recall": rejected["recall"]},
            )
            for kind, rejected in pairs
        ]  # fmt: skip


class RewardModel:
    """A reward model from the hub or a folder: one score for a whole conversation.

    Chosen is the finished answer of the highest score, rejected the one of the lowest. If their
    scores are `least_gap` apart or less, that is a tie.
    https://huggingface.co/docs/transformers/model_doc/auto#transformers.AutoModelForSequenceClassification
    """

    def __init__(self, path: str, device: str | torch.device = "cpu", least_gap: float = 0.0):
        self.name, self.workers = f"reward:{path}", 1
        self.path, self.least_gap = path, least_gap
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch.float32 if str(device) == "cpu" else torch.bfloat16,
                use_safetensors=True,
            ).to(device)
        except (OSError, ValueError) as error:
            raise JudgeError(f"cannot load the reward model {path}: {one_line(error)}") from error
        if self.tokenizer.chat_template is None:
            raise JudgeError(f"the reward model {path} has no chat template")
        if self.model.config.num_labels != 1:
            raise JudgeError(
                f"{path} gives {self.model.config.num_labels} numbers, a reward model gives one"
            )
        # With a pad token, transformers reads the score at the last token that is not one. Where
        # the end of turn pads too, that is the token before it. With none, it is the last token.
        self.model.config.get_text_config().pad_token_id = None
        self.model.eval()

    @property
    def settings(self) -> dict:
        """Name, weights and number format of the model, and `least_gap`."""
        settings = {"judge": self.name, "weights": weights_state(self.path)}
        return settings | {"dtype": str(self.model.dtype), "least_gap": self.least_gap}

    @torch.no_grad()
    def scores(self, prompt: dict, texts: list[str]) -> list[float]:
        """The rewards of `texts` as answers to `prompt`, read at the last token of each talk.

        One at a time, without padding: no pad token can then be taken for the end of turn.
        """
        talks = [[*prompt["messages"], {"role": "assistant", "content": text}] for text in texts]
        return [
            self.model(torch.tensor([ids], device=self.model.device)).logits[0, 0].item()
            for ids in tokenize_conversations(talks, self.tokenizer)
        ]

    def __call__(self, prompt: dict, answers: list[dict]) -> list[Preference]:
        scores = self.scores(prompt, [a["text"] for a in answers])
        scored = sorted(zip(scores, range(len(answers)), strict=True))
        finished = [(score, i) for score, i in scored if answers[i]["finished"]]
        if not finished or finished[-1][0] - scored[0][0] <= self.least_gap:
            return []
        (high, best), (low, worst) = finished[-1], scored[0]
        verdict = {"chosen_score": high, "rejected_score": low}
        return [Preference("reward", answers[best], answers[worst], verdict)]


QUESTION = """Which answer to the conversation is better: more accurate, more concise and more to \
the point? Length in itself is no merit.

{conversation}

### Answer A
{a}

### Answer B
{b}

Reply with JSON only: {{"winner": "A"}}, {{"winner": "B"}} or {{"winner": "tie"}}."""


CONNECT = 3.0  # seconds; what does not take a connection by then is not there
FIRST = 10.0  # seconds for any first answer at all


class Endpoint:
    """An OpenAI-compatible chat endpoint, asked about two answers at a time, in both orders.

    A judge tends to prefer the answer it reads first; only a winner that is the same in both orders
    counts, anything else is a tie. Of the finished answers, `pairs` disjoint pairs are drawn,
    always the same for a prompt. A busy or failing server (429, 5xx, no answer in time) is asked
    again, later each time or when it says so; one that cannot be reached, twice within seconds; a
    reply that names no winner, up to three times.
    """

    who = "judge"  # as messages call it

    def __init__(self, url: str, model: str, *, pairs: int = 1, timeout: float = 60.0,
                 retries: int = 6, backoff: float = 1.0, workers: int = 8) -> None:  # fmt: skip
        self.name, self.workers = f"endpoint:{model}", workers
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.pairs, self.timeout = model, pairs, timeout
        retry = Retry(
            retries, connect=min(retries, 2), backoff_factor=backoff,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None, respect_retry_after_header=True, raise_on_status=False,
        )  # fmt: skip
        self.session = requests.Session()  # shared by the workers, which only send
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=retry))
        key = os.environ.get("OPENAI_API_KEY", "").strip()  # of a file, its newline
        if not (key.isascii() and key.isprintable()):  # which requests would show in its error
            raise JudgeError("OPENAI_API_KEY holds a character that no key has; copy it again")
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def probe(self) -> None:
        """Raise a `JudgeError` within 15 seconds if nothing answers at the address.

        Any answer will do, as not every server lists its models.
        """
        models = self.url.removesuffix("/chat/completions") + "/models"
        try:
            requests.get(models, headers=self.session.headers, timeout=(CONNECT, FIRST))
        except requests.RequestException as error:
            raise JudgeError(f"the {self.who} at {self.url} does not answer: {error}") from None

    @property
    def settings(self) -> dict:
        """The model's name, the question and the number of pairs; not the URL, which is where the
        same model happens to be served."""
        return {"judge": self.name, "pairs": self.pairs, "question": QUESTION, "temperature": 0}

    def __call__(self, prompt: dict, answers: list[dict]) -> list[Preference]:
        distinct = list({a["text"]: a for a in answers if a["finished"] and a["text"]}.values())
        random.Random(f"{prompt['id']}").shuffle(distinct)
        preferences = []
        for one, two in list(pairwise(distinct))[::2][: self.pairs]:
            forth = self.winner(prompt, one["text"], two["text"])
            back = self.winner(prompt, two["text"], one["text"])
            if (forth, back) in (("A", "B"), ("B", "A")):
                chosen, rejected = (one, two) if forth == "A" else (two, one)
                verdict = {"judged": f"{forth}{back}"}
                preferences.append(Preference("judged", chosen, rejected, verdict))
        return preferences

    def winner(self, prompt: dict, a: str, b: str) -> str:
        """ "A", "B" or "tie"; "unclear" if three replies in a row named none of them."""
        conversation = "\n\n".join(f"[{m['role']}] {m['content']}" for m in prompt["messages"])
        asked = QUESTION.format(conversation=conversation, a=a, b=b)
        body = {"model": self.model, "temperature": 0, "max_tokens": 512}
        body["messages"] = [{"role": "user", "content": asked}]
        for _ in range(3):
            answer = self.ask(body)
            said = str(answer["message"]["content"]) if answer else ""
            if verdicts := re.findall(r'"winner"\s*:\s*"(A|B|tie)"', said):
                return verdicts[-1]
        return "unclear"

    def ask(self, body: dict) -> dict | None:
        """The first choice of the chat completion `body`, with its `message`.

        None if the connection broke in the middle, or the answer is no chat completion.

        Raises:
            JudgeError: the endpoint cannot be reached, or refuses.
        """
        where = f"the {self.who} at {self.url}"
        try:
            response = self.session.post(self.url, json=body, timeout=(CONNECT, self.timeout))
        except requests.exceptions.ChunkedEncodingError:
            return None
        except requests.RequestException as error:
            raise JudgeError(f"{where} does not answer: {error}") from None
        if response.status_code != 200:
            fix = " (set OPENAI_API_KEY)" if response.status_code in (401, 403) else ""
            raise JudgeError(f"{where} said {response.status_code}{fix}: {response.text[:200]}")
        try:
            answer = response.json()["choices"][0]
            return answer if "content" in answer["message"] else None
        except (json.JSONDecodeError, LookupError, TypeError):
            return None
