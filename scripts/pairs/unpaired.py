"""Pairs out of unpaired (KTO) data, where a row is one answer with a label, good or bad.

TRL's `unpair_preference_dataset` goes the other way. DPO needs a better and a worse answer to the
same prompt, so rows with equal prompts are put together.
"""

from __future__ import annotations

import json
from collections import defaultdict

from scripts.pairs.files import DataError, Row
from scripts.pairs.formats import judged
from scripts.pairs.messages import BadRow


def pair_up(rows: list[Row]) -> list[Row]:
    """`rows` with pairs in place of single answers.

    The rule: of the rows with the same prompt (all of its messages, outer white space aside, and
    the system message), the first good answer goes with the first bad one, the second with the
    second, in the order of the file. A pair stands where its earlier row does, and has that row's
    other columns. Rows without a partner stay as they are, and the checks report them.

    Raises:
        DataError: no prompt has a good and a bad answer.
    """
    waiting: dict[tuple[str, bool], list[int]] = defaultdict(list)
    paired: dict[int, Row] = {}
    unread = []
    for index, (where, row, problem) in enumerate(rows):
        bare = row and {k: v for k, v in row.items() if k not in ("chosen", "rejected")}
        paired[index] = (where, bare, problem)
        try:
            prompt, answer, good = judged(bare or {})
        except BadRow as error:  # reported when the row is read
            unread.append(f"; {where}, which cannot be read: {error}")
            continue
        texts = [(m["role"], m["content"].strip()) for m in prompt]
        key = json.dumps([str(bare.get("system") or "").strip(), texts])
        bare |= {"prompt": prompt, "chosen" if good else "rejected": answer}
        if not waiting[key, not good]:
            waiting[key, good].append(index)
            continue
        first = waiting[key, not good].pop(0)
        del paired[index]
        paired[first][1].update({"chosen" if good else "rejected": answer})
    pairs = len(rows) - len(paired)
    print(
        f"Unpaired (KTO) data: {len(rows)} rows give {pairs} pairs. To each prompt the first good "
        "answer goes with the first bad one, the second with the second, and so on."
    )
    if rows and not pairs:
        raise DataError(
            f"the data is unpaired (KTO): one answer a row, and none of the {len(rows)} rows has a "
            "partner, a row with the same prompt and the other label. DPO needs both; sample "
            "further answers with `python -m scripts.data build`, or train with TRL's KTOTrainer"
            + "".join(unread[:1])
        )
    return list(paired.values())
