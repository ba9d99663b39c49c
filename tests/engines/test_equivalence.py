"""The equivalence test, held against simulated engines whose true ratio is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.equivalence import Ratio, paired_ratio
from lora.tensorfile import Array

MARGIN = 0.01
RUNS = 300
SETS, ROUNDS = 6, 20  # the least that the harness decides on


def timings(random: np.random.Generator, offset: float, noise: float) -> Array:
    """Times of one engine, around 1 ms: each session has its own level, each round heavy-tailed noise that only slows."""
    level = np.exp(random.normal(0, offset, (SETS, 1)))
    return 1e6 * level * (1 + noise * np.abs(random.standard_t(3, (SETS, ROUNDS))))


def share(true_ratio: float, runs: int, offset: float, noise: float) -> dict[str, float]:
    """How often each decision is taken at a true ratio."""
    random = np.random.default_rng(0)
    decisions = [paired_ratio(true_ratio * timings(random, offset, noise), timings(random, offset, noise), seed).decide(MARGIN) for seed in range(runs)]
    return {decision: decisions.count(decision) / runs for decision in ("equivalent", "slower", "inconclusive")}


@pytest.mark.parametrize(("offset", "noise"), [(0.003, 0.005), (0.001, 0.01)])
def test_at_the_margin_either_wrong_certainty_is_rare(offset: float, noise: float):
    """Each of the two tests is at 5 %; resampling as few as six sessions makes that about 8 %.

    Slack: of 300 runs at 8 %, the 99.9th percentile of the binomial (40, that is 13.3 %).
    """
    most = scipy.stats.binom.ppf(0.999, RUNS, 0.08) / RUNS
    found = share(1 + MARGIN, RUNS, offset, noise)
    assert found["equivalent"] <= most
    assert found["slower"] <= most


def test_equal_engines_with_little_noise_are_mostly_equivalent():
    assert share(1.0, 60, offset=0.002, noise=0.005)["equivalent"] >= 0.95


def test_equal_engines_that_differ_from_session_to_session_are_not_called_slower():
    found = share(1.0, 60, offset=0.02, noise=0.01)
    assert found["slower"] <= 0.05
    assert found["inconclusive"] >= 0.8  # six sessions that differ by 2 % can't show 1 %


def test_three_margins_slower_is_never_equivalent_and_mostly_slower():
    found = share(1 + 3 * MARGIN, 60, offset=0.003, noise=0.005)
    assert found["equivalent"] == 0
    assert found["slower"] >= 0.95


def test_three_margins_faster_is_never_equivalent_and_never_slower():
    assert share(1 / (1 + 3 * MARGIN), 60, offset=0.003, noise=0.005) == {"equivalent": 0, "slower": 0, "inconclusive": 1}


def test_identical_times_have_a_ratio_of_exactly_one():
    times = timings(np.random.default_rng(0), 0.01, 0.05)
    assert paired_ratio(times, times, seed=0) == Ratio(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [
        (1.0, 1.0, "equivalent"),
        (0.9902, 1.0099, "equivalent"),
        (1 / 1.01, 1.0, "inconclusive"),
        (1.0, 1.01, "inconclusive"),
        (0.98, 1.02, "inconclusive"),
        (1.0, 1.5, "inconclusive"),
        (1.01, 1.02, "inconclusive"),
        (1.0101, 1.02, "slower"),
        (0.5, 0.6, "inconclusive"),
        (0.5, 1.0, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_decision_at_the_bounds_of_a_margin_of_one_per_cent(low: float, high: float, decision: str):
    assert Ratio((low + high) / 2, low, high).decide(MARGIN) == decision


@pytest.mark.parametrize(("margin", "decision"), [(0.01, "slower"), (0.05, "inconclusive"), (0.10, "equivalent")])
def test_declared_margin_decides(margin: float, decision: str):
    assert Ratio(1.05, 1.04, 1.06).decide(margin) == decision


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), offset=st.floats(0, 0.1), noise=st.floats(0, 0.5))
def test_swapping_the_arms_inverts_the_ratio(seed: int, offset: float, noise: float):
    random = np.random.default_rng(seed)
    one, other = timings(random, offset, noise), timings(random, offset, noise)
    forth, back = paired_ratio(one, other, seed), paired_ratio(other, one, seed)
    assert (forth.median, forth.low, forth.high) == pytest.approx((1 / back.median, 1 / back.high, 1 / back.low))
    assert forth.low <= forth.median <= forth.high


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_slows_both_arms_of_a_round_alike_cancels(seed: int):
    random = np.random.default_rng(seed)
    one, other, mood = timings(random, 0.01, 0.01), timings(random, 0.01, 0.01), np.exp(random.normal(0, 1, (SETS, ROUNDS)))
    calm, moody = paired_ratio(one, other, seed), paired_ratio(mood * one, mood * other, seed)
    assert (moody.median, moody.low, moody.high) == pytest.approx((calm.median, calm.low, calm.high))


def test_interval_widens_with_what_differs_between_sessions():
    random = np.random.default_rng(0)
    widths = [(lambda ratio: ratio.high - ratio.low)(paired_ratio(timings(random, offset, 0.01), timings(random, offset, 0.01), 0)) for offset in (0, 0.05)]
    assert widths[1] > 5 * widths[0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (6, 7)])
def test_any_number_of_sets_and_rounds_is_taken(shape: tuple[int, int]):
    ratio = paired_ratio(np.full(shape, 3_000), np.full(shape, 2_000), seed=0)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))


def test_same_seed_gives_the_same_interval():
    random = np.random.default_rng(0)
    one, other = timings(random, 0.01, 0.01), timings(random, 0.01, 0.01)
    assert paired_ratio(one, other, 7) == paired_ratio(one, other, 7) != paired_ratio(one, other, 8)
