"""Under which terms a tuned model may be given on: its base model's, and what they ask for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from scripts.base import RecipeError
from scripts.hub import patiently

LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# Bases whose licence is known without asking the hub, by the beginning of their name.
KNOWN = {"SmolLM2-": "apache-2.0"}
LLAMA3_VOCABULARY = 128_256


class LicenceError(RecipeError):
    """What the base model's licence asks for is not there."""


@dataclass(frozen=True)
class Terms:
    """A licence by the hub's identifier, and what it asks of a model that is made from its model:
    how its name begins, a line to show, a notice to send along, and a copy of the licence."""

    licence: str
    prefix: str = ""
    line: str = ""
    notice: str = ""
    page: str = ""

    @property
    def wants_copy(self) -> bool:
        """Whether a copy of the licence must go along."""
        return bool(self.notice)


def _llama(version: str, name: str, line: str, prefix: str, page: str) -> Terms:
    notice = (
        f"{name} is licensed under the {name} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved."
    )
    return Terms(f"llama{version}", prefix, line, notice, page)


# Section 1.b of each: https://llama.meta.com/llama3/license/ and https://www.llama.com/llama3_1/license/
LLAMA = {
    "3": _llama("3", "Meta Llama 3", "Built with Meta Llama 3", "Llama-3",
                "https://llama.meta.com/llama3/license/"),
    **{
        f"3.{n}": _llama(f"3.{n}", f"Llama 3.{n}", "Built with Llama", "Llama",
                         f"https://www.llama.com/llama3_{n}/license/")
        for n in (1, 2, 3)
    },
}  # fmt: skip


def terms_of(base: str, *, given: str | None = None, folder: Path | None = None) -> Terms:
    """The terms of a model that was made from `base`.

    By the base's name; else by a Llama 3 vocabulary in the model's `folder`; else as the hub has
    it. `given` is the identifier that the user names, which settles all but a Llama's terms.

    Raises:
        LicenceError: the licence is not known and the hub cannot be asked.
    """
    version = _llama_version(base) or (_llama_of(given) if given else None)
    if version is None and given is None and folder is not None and _has_llama3_words(folder):
        version = "3"
    if version:
        return LLAMA[version]
    if given:
        return Terms(given)
    short = base.rstrip("/").split("/")[-1]
    for beginning, licence in KNOWN.items():
        if short.startswith(beginning):
            return Terms(licence)
    return Terms(_asked(base))


def _llama_version(name: str) -> str | None:
    """3, 3.1, 3.2 or 3.3 of a name such as `Meta-Llama-3.1-8B`; None of any other."""
    found = re.search(r"llama[-_ ]?(3(?:[._][123](?!\d))?)(?![\d.])", name, re.IGNORECASE)
    return found[1].replace("_", ".") if found else None


def _llama_of(licence: str) -> str | None:
    return licence.removeprefix("llama") if licence.removeprefix("llama") in LLAMA else None


def _has_llama3_words(folder: Path) -> bool:
    try:
        values = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return values.get("model_type") == "llama" and values.get("vocab_size") == LLAMA3_VOCABULARY


def _asked(base: str) -> str:
    """The licence of `base` as its card on the hub has it."""
    reason = "it is no name of the hub's"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        try:
            card = patiently(lambda: HfApi().model_info(base, timeout=20)).card_data
            if card and isinstance(card.get("license"), str):
                return card["license"]
            reason = "its card on the hub names none"
        except Exception as error:  # the errors of the hub, httpx and sockets share no nearer base
            reason = " ".join(str(error).split())[:120] or type(error).__name__
    raise LicenceError(
        f"the licence of the base model {base} is not known ({reason}): give it with --licence, "
        "by the hub's identifier (https://huggingface.co/docs/hub/repositories-licenses)"
    )


def licence_text(base: str, given: Path | None = None) -> Path:
    """A file with the text of the base model's licence: `given`, or the base's own.

    Raises:
        LicenceError: it is not there and cannot be had.
    """
    if given is not None:
        if not given.is_file():
            raise LicenceError(f"--licence-file: there is no file {given}")
        return given
    if (folder := Path(base).expanduser()).is_dir():
        for name in LICENCE_FILES:
            if (folder / name).is_file():
                return folder / name
        reason = f"{folder} has none of {', '.join(LICENCE_FILES)}"
    else:
        try:
            return Path(patiently(lambda: HfApi().hf_hub_download(base, "LICENSE")))
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:120] or type(error).__name__
    raise LicenceError(
        f"the licence of {base} asks for a copy of itself to go along, and there is none "
        f"({reason}): give one with --licence-file"
    )
