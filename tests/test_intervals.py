"""Intervals, aims, and the length-controlled win rate, on data whose truth is known."""

import numpy as np
import pytest

from scripts.intervals import AIMS, MET, MISSED, TOO_FEW, bootstrap, length_controlled


def test_bootstrap_brackets_the_mean():
    values = np.random.default_rng(1).normal(10, 3, 200)
    figure = bootstrap(values)
    assert figure["low"] < figure["mean"] < figure["high"]
    # 1.96 standard errors either side, within what 10,000 draws scatter
    assert figure["high"] - figure["low"] == pytest.approx(3.92 * 3 / 200**0.5, rel=0.2)
    assert bootstrap(values) == figure  # no dice


def test_pairs_of_one_prompt_are_drawn_together():
    """Saying each value three times adds no information, so the interval must not narrow."""
    once = np.random.default_rng(2).normal(size=40)
    thrice = np.repeat(once, 3)
    names = [str(i) for i in np.repeat(np.random.default_rng(3).permutation(40), 3)]
    alone, clustered = bootstrap(once), bootstrap(thrice, prompts=names)
    assert clustered["mean"] == pytest.approx(alone["mean"])
    width = alone["high"] - alone["low"]
    assert clustered["high"] - clustered["low"] == pytest.approx(width, rel=0.05)
    assert clustered["prompts"] == 40
    as_if_independent = bootstrap(thrice)
    assert as_if_independent["high"] - as_if_independent["low"] < 0.7 * width


def test_a_share_of_a_sum():
    base, tuned = np.array([100, 10, 40]), np.array([50, 10, 20])
    figure = bootstrap(base - tuned, per=base)
    assert figure["mean"] == pytest.approx(1 - 80 / 150)
    assert (figure["low"], figure["high"]) == (0, 0.5)  # the same prompt three times


def test_degenerate_values_have_a_figure():
    assert bootstrap([3.0]) == {"mean": 3, "low": None, "high": None, "prompts": 1}
    assert bootstrap([1, 0], prompts=["a", "a"])["low"] is None
    assert bootstrap([2.0] * 50) == {"mean": 2, "low": 2, "high": 2, "prompts": 50}
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])


def test_little_data_meets_no_aim():
    """Four prompts, whatever they show: a loss, a gain, or nothing at all."""
    for values in ([-0.37, -0.9, 0.1, -0.3], [0.9, 0.8, 0.9, 1.0], [0.0] * 4, [1.0] * 4, [0.5]):
        assert {aim.verdict(bootstrap(values)) for aim in AIMS} == {TOO_FEW}


def test_a_margin_is_met_missed_or_open():
    facts = next(aim for aim in AIMS if aim.figure == "facts")
    noise = np.random.default_rng(4).normal(0, 0.1, 400)
    assert facts.verdict(bootstrap(noise)) == MET
    assert facts.verdict(bootstrap(noise - 0.37)) == MISSED
    assert facts.verdict(bootstrap(noise - 0.05)) == TOO_FEW
    wide = bootstrap(np.tile([-0.5, 0.5], 20))  # reaches above 0, and far below the margin
    assert wide["high"] > 0 and facts.verdict(wide) == TOO_FEW
    repeated = next(aim for aim in AIMS if aim.figure == "repeated")  # here more is worse
    assert repeated.verdict(bootstrap(noise - 0.37)) == MET
    assert repeated.verdict(bootstrap(noise + 0.37)) == MISSED


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


def test_what_is_better_at_equal_length_shows():
    rates = length_controlled(*drawn(theta=1.0, phi=-2.0, shift=-10.0))
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
