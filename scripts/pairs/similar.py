"""Texts that are nearly the same, found with datasketch's MinHash (ekzhu.com/datasketch)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice

SHARE = 0.8  # of the runs of three words, from which on two texts count as nearly the same
WORDS = 8  # in fewer, one other word is another text
PERMUTATIONS = 64  # the estimate of the share is then right within 0.05, as a rule
CHUNK = 2000  # texts hashed at a time
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")


def near(texts: Iterable[str], others: Iterable[str] | None = None) -> Iterator[tuple[int, int]]:
    """The texts that are nearly one of `others`, or without these an earlier one of their own.

    Yields (index of the text, index of the first such). Of many near copies each is told of the
    first, so that a file of copies takes no longer than one without.
    """
    from datasketch import MinHashLSH  # which loads scipy: a second that most commands need not

    # The index misses one in ten at its threshold, so it looks lower, and the estimate decides.
    known = MinHashLSH(threshold=SHARE - 0.2, num_perm=PERMUTATIONS)
    kept = {}

    def keep(index: int, hashed) -> None:
        known.insert(index, hashed, check_duplication=False)
        kept[index] = hashed

    for index, hashed in _hashed(others or ()):
        keep(index, hashed)
    for index, hashed in _hashed(texts):
        alike = [i for i in known.query(hashed) if hashed.jaccard(kept[i]) >= SHARE]
        if alike:
            yield index, min(alike)
        elif others is None:
            keep(index, hashed)


def _hashed(texts: Iterable[str]) -> Iterator[tuple[int, object]]:
    """The MinHash of each text that is long enough, with its index."""
    from datasketch import MinHash

    numbered = enumerate(texts)
    while some := list(islice(numbered, CHUNK)):
        runs = [(index, _runs(text)) for index, text in some]
        runs = [(index, found) for index, found in runs if found]
        hashes = MinHash.bulk([found for _, found in runs], num_perm=PERMUTATIONS)
        yield from zip((index for index, _ in runs), hashes, strict=True)


def _runs(text: str) -> set[bytes]:
    """The runs of three words of a text (of three characters, where words have no spaces)."""
    words = WORD.findall(text.casefold())
    if len(words) < WORDS:
        return set()
    return {" ".join(words[i : i + 3]).encode("utf-8", "replace") for i in range(len(words) - 2)}
