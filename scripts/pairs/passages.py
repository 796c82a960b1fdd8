"""Questions about given texts: the file that holds them, and how one is put to a model."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.base import RecipeError
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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"questions: {path} cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        try:
            passage = json.loads(line)
            if passage["split"] != split or level not in (None, passage.get("level")):
                continue
            rows += questions_of(passage)
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(
                f"questions: line {number} of {path} is no passage with questions "
                f"({type(error).__name__}: {error}); data/README.md has the form"
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
