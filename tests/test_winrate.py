"""The length-controlled win rate, on comparisons whose truth is known."""

import numpy as np
import pytest

from scripts.intervals import length_controlled


def drawn(theta: float, phi: float, shift: float, count: int = 4000) -> tuple:
    """Comparisons drawn from the model itself: wins, and both models' lengths."""
    random = np.random.default_rng(1)
    other = random.normal(100, 20, count)
    own = other + random.normal(shift, 15, count)
    x = np.tanh((own - other) / (own - other).std())
    wins = (random.random(count) < 1 / (1 + np.exp(-theta - phi * x))).astype(float)
    return wins, own, other, np.arange(count)


def test_a_preference_for_length_alone_is_taken_out():
    """A judge that only likes long answers: the longer model wins most, and is no better."""
    rates = length_controlled(*drawn(theta=0.0, phi=3.0, shift=15.0))
    assert rates["raw"]["mean"] > 0.7
    assert rates["length_controlled"]["low"] < 0.5 < rates["length_controlled"]["high"]


@pytest.mark.parametrize("phi", [0.0, 2.0, -2.0])
def test_what_is_better_at_equal_length_shows(phi):
    rates = length_controlled(*drawn(theta=1.0, phi=phi, shift=-10.0))
    truth = 1 / (1 + np.exp(-1.0))
    assert rates["length_controlled"]["mean"] == pytest.approx(truth, abs=0.05)
    assert 0.02 < rates["length_controlled"]["high"] - rates["length_controlled"]["low"] < 0.1


def test_winning_always_is_finite_and_ties_are_half():
    ones, lengths = np.ones(20), np.arange(20)
    rates = length_controlled(ones, lengths, lengths + 5, np.arange(20))
    assert rates["raw"]["mean"] == 1.0 and 0.9 < rates["length_controlled"]["mean"] < 1.0
    rates = length_controlled(ones / 2, lengths, lengths[::-1], np.arange(20))
    assert rates["length_controlled"]["mean"] == pytest.approx(0.5, abs=1e-6)


def test_intervals_draw_passages_and_not_questions():
    wins = np.repeat([1.0, 0.0], 50)
    lengths = np.tile(np.arange(10), 10)
    narrow = length_controlled(wins, lengths, lengths[::-1], np.arange(100))["raw"]
    wide = length_controlled(wins, lengths, lengths[::-1], np.repeat(np.arange(4), 25))["raw"]
    assert wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])
