"""Questions about given texts: the file that holds them, and how one is put to a model."""

from __future__ import annotations

from pathlib import Path

from scripts.base import RecipeError
from scripts.pairs.files import read_file
from scripts.pairs.messages import Messages

KEYS = ("question", "answerable", "accept", "wrong")


def read_questions(path: Path, split: str, level: str | None = None) -> list[dict]:
    """The questions of one `split` of a file such as `data/passages.jsonl`, one row each.

    A row has `id`, `passage_id`, `passage` and the question's own `question`, `answerable`,
    `accept` and `wrong`; data/README.md says what they hold. `level` keeps passages of that level.

    Raises:
        RecipeError: the file is not there, a line is not such a passage, or nothing is left.
    """
    rows = []
    for where, passage, problem in read_file(path):
        try:
            if passage is None:
                raise ValueError(problem)
            if passage["split"] == split and level in (None, passage.get("level")):
                rows += questions_of(passage)
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"questions: {where} is no passage with questions ({type(error).__name__}: {error})"
                "; data/README.md has the form"
            ) from None
    if not rows:
        kind = f"{level} passages" if level else "passages"
        raise RecipeError(f"questions: {path} has no {kind} of the split `{split}`")
    return rows


def questions_of(passage: dict) -> list[dict]:
    """The questions of one line of such a file.

    Raises:
        KeyError, TypeError: it is no passage with questions.
    """
    about = {key: passage[key] for key in ("passage", "split", "level") if key in passage}
    return [
        {"id": f"{passage['id']}-{i}", "passage_id": passage["id"]}
        | about
        | {key: question[key] for key in KEYS}
        for i, question in enumerate(passage["questions"])
    ]


def ask(row: dict) -> Messages:
    """A question put to a model as a user would: the text, and the question below it."""
    return [{"role": "user", "content": f"{row['passage']}\n\n{row['question']}"}]
