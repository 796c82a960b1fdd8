"""The judge that made the default pairs: it checks answers against the text that holds them."""

from __future__ import annotations

import inspect

from scripts.pairs import grounded
from scripts.pairs.judges import Preference
from scripts.pairs.text import repeated_ngram_share


class Checker:
    """Correctness first, then brevity, for questions on a passage (`data/passages.jsonl`).

    Chosen is an answer that the checker calls exact (right, nothing wrong or made up beside it), in
    one finished sentence of at most 30 tokens that repeats nothing; among these the one whose words
    the text bears out best, then the shortest. A rejected answer fails for one reason at a time,
    and each kind makes at most one pair (`wrong` at most two):

    - `wrong`: finished, of much the same length (half to twice), and not right; the most plausible
      first. Length tells nothing here.
    - `beside`: it has the right answer, and something wrong or made up beside it.
    - `rambling`: the answer to the plain question, at least 1.5 times as long.
    - `declined`: it says that the text does not tell, and the text does.
    - `invented`: the text does not tell, and the answer does not say so.

    A question to which no answer qualifies has no pair.
    """

    name, workers = "checker", 1

    @property
    def settings(self) -> dict:
        """The judge is its code and the checker's: after any change of it, all is judged anew."""
        code = inspect.getsource(Checker) + inspect.getsource(grounded)
        return {"judge": self.name, "code": code}

    def __call__(self, prompt: dict, answers: list[dict]) -> list[Preference]:
        seen = [
            a
            | {"checked": grounded.check(a["text"], prompt["passage"], prompt)}
            | {"borne": grounded.share_known(a["text"], prompt["passage"], prompt["question"])}
            for a in {a["text"]: a for a in answers}.values()
        ]
        good = [
            a
            for a in seen
            if a["finished"] and a["checked"].exact and a["checked"].sentences == 1
            and a["tokens"] <= 30 and (a["borne"] >= 0.75 or a["checked"].declined)
            and not repeated_ngram_share(a["text"].lower().split())
        ]  # fmt: skip
        if not good:
            return []
        brief = [(a["text"][-1] != ".", a["tokens"]) for a in good]
        if prompt["answerable"]:
            brief = [(-round(a["borne"], 1), *rest) for a, rest in zip(good, brief, strict=True)]
        chosen = good[brief.index(min(brief))]
        return [
            Preference(kind, chosen, rejected, {})
            for kind, rejected in self._rejected(prompt, chosen, seen)
        ]

    def _rejected(self, prompt: dict, chosen: dict, seen: list[dict]) -> list[tuple[str, dict]]:
        size = chosen["tokens"]
        off = [a for a in seen if a["finished"] and not a["checked"].right]
        plain = [a for a in seen if a["style"] == "plain"]
        if not prompt["answerable"]:
            worse = [a for a in plain if not a["checked"].right] or off
            return [("invented", a) for a in worse[:1]]
        declined = [a for a in off if a["checked"].declined]
        wrong = [a for a in off if a not in declined and size / 2 <= a["tokens"] <= 2 * size]
        wrong.sort(key=lambda a: (-a["borne"], abs(a["tokens"] - size)))
        beside = [
            a
            for a in seen
            if a["finished"] and a["checked"].mentioned and not a["checked"].exact
            and a["style"] != "plain"
        ]  # fmt: skip
        beside.sort(key=lambda a: -a["tokens"])
        rambling = [a for a in plain if a["tokens"] >= 1.5 * size][:1]
        return [
            *(("wrong", a) for a in wrong[:2]),
            *(("declined", a) for a in declined[:1]),
            *(("beside", a) for a in beside[:1]),
            *(("rambling", a) for a in rambling),
        ]
