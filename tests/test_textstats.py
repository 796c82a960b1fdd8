"""The two measures of text: repetition and key facts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.pairs.text import fact_recall, repeated_ngram_share


def test_repetition_by_hand():
    assert repeated_ngram_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_ngram_share([1, 2, 3]) == 0.0
    # five 4-grams of one token repeated, one of them distinct
    assert repeated_ngram_share([7] * 8) == pytest.approx(4 / 5)


@given(st.lists(st.integers(0, 3), min_size=4, max_size=40))
def test_repetition_is_a_share_and_nearly_half_of_a_reply_that_is_said_twice(tokens):
    """All 4-grams of the first time stand there again; only those across the seam are new."""
    assert 0 <= repeated_ngram_share(tokens) < 1
    once = len(tokens) - 3
    assert repeated_ngram_share(tokens + tokens) >= once / (2 * once + 3) - 1e-9


@pytest.mark.parametrize(
    ("text", "facts", "recall"),
    [
        ("The capital is Paris.", [["Paris"]], 1.0),
        ("the capital is PARIS", [["paris"]], 1.0),
        ("A nice day.", [["ice"]], 0.0),  # not inside a word
        ("It rotates.", [["rotat"]], 1.0),  # a stem
        ("About 1206 bones", [["206"]], 0.0),
        ("Exactly 206 bones", [["206"]], 1.0),
        ("2060 bones", [["206"]], 0.0),
        ("Plants need light.", [["sun", "light"], ["water"]], 0.5),
        ("", [["anything"]], 0.0),
        ("No facts are asked for.", [], 1.0),
    ],
)
def test_fact_recall(text, facts, recall):
    assert fact_recall(text, facts) == recall
