"""The interval of a ratio and what it decides: against scipy's exact test, by its symmetries, and by how often it is
wrong.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.latency.equivalence import Ratio, paired_ratio, quantile_ratio
from engines.latency.sequential import ERROR
from lora.files.tensorfile import Array

MARGIN = 0.01
SETS, ROUNDS = 12, 20


def timings(random: np.random.Generator, offset: float, noise: float) -> Array:
    """Times of one engine, around 1 ms: each session has its own level, each round heavy-tailed noise."""
    level = np.exp(random.standard_t(3, (SETS, 1)) * offset)
    return 1e6 * level * (1 + noise * np.abs(random.standard_t(3, (SETS, ROUNDS))))


@pytest.mark.parametrize(
    ("sets", "error"),
    [(6, 0.05), (6, 0.025), (7, 0.05), (12, 0.05), (12, 0.0125), (24, 0.05), (24, 0.00625), (48, 0.05)],
)
def test_bounds_are_where_scipys_exact_test_begins_to_reject(sets: int, error: float):
    """Just outside the interval the one-sided test rejects at ``error``, just inside it does not."""
    logs = np.random.default_rng(sets).normal(0, 0.01, sets)
    ratio = paired_ratio(np.exp(logs)[:, None], np.ones((sets, 1)), error)
    for bound, alternative, outwards in ((ratio.low, "greater", -1), (ratio.high, "less", 1)):
        outside, inside = (
            scipy.stats.wilcoxon(
                logs - math.log(bound) - step * outwards * 1e-9, alternative=alternative, method="exact"
            ).pvalue
            for step in (1, -1)
        )
        assert outside <= error < inside


def test_too_few_sets_for_the_error_are_refused():
    with pytest.raises(ValueError, match=r"5 sets can't bound a ratio with an error of 0\.025"):
        paired_ratio(np.ones((5, 3)), np.ones((5, 3)), 0.025)


@pytest.mark.parametrize(("offset", "noise"), [(0.003, 0.005), (0.001, 0.01), (0.02, 0.01)])
def test_each_bound_excludes_the_truth_no_more_often_than_declared(offset: float, noise: float):
    random, runs = np.random.default_rng(0), 1000
    ratios = [
        paired_ratio(1.01 * timings(random, offset, noise), timings(random, offset, noise), ERROR) for _ in range(runs)
    ]
    most = scipy.stats.binom.ppf(0.9999, runs, ERROR) / runs
    assert sum(ratio.low > 1.01 for ratio in ratios) / runs <= most
    assert sum(ratio.high < 1.01 for ratio in ratios) / runs <= most


def test_a_round_that_an_arm_sat_out_counts_for_nothing():
    random = np.random.default_rng(0)
    times, base = timings(random, 0.003, 0.01), timings(random, 0.003, 0.01)
    gaps = times.copy()
    gaps[:, 1::2] = np.nan
    assert paired_ratio(gaps, base, ERROR) == paired_ratio(times[:, ::2], base[:, ::2], ERROR)
    assert quantile_ratio(gaps, base, 0.9, ERROR) == quantile_ratio(times[:, ::2], base, 0.9, ERROR)


def test_identical_times_have_a_ratio_of_exactly_one():
    times = timings(np.random.default_rng(0), 0.01, 0.05)
    assert paired_ratio(times, times, ERROR) == quantile_ratio(times, times, 0.9, ERROR) == Ratio(1.0, 1.0, 1.0, ERROR)


def test_a_quantiles_ratio_is_that_of_the_tail():
    """Half of the one engine's runs take ten times as long: its median may not, its ninetieth percentile does."""
    base = np.full((SETS, ROUNDS), 1e6)
    tailed = base * np.where(np.arange(ROUNDS) < 8, 10, 1)
    assert paired_ratio(tailed, base, ERROR).median == 1
    assert quantile_ratio(tailed, base, 0.9, ERROR).median == pytest.approx(10)


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
        (0.5, 0.6, "faster"),
        (0.98, 1 / 1.0101, "faster"),
        (0.98, 1 / 1.01, "inconclusive"),
        (0.5, 1.0, "inconclusive"),
        (math.nan, math.nan, "inconclusive"),
    ],
)
def test_decision_at_the_bounds_of_a_margin_of_one_per_cent(low: float, high: float, decision: str):
    assert Ratio((low + high) / 2, low, high, ERROR).decide(MARGIN) == decision


@pytest.mark.parametrize(("margin", "decision"), [(0.01, "slower"), (0.05, "inconclusive"), (0.10, "equivalent")])
def test_declared_margin_decides(margin: float, decision: str):
    assert Ratio(1.05, 1.04, 1.06, ERROR).decide(margin) == decision


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), offset=st.floats(0, 0.1), noise=st.floats(0, 0.5))
def test_swapping_the_arms_inverts_the_ratio(seed: int, offset: float, noise: float):
    random = np.random.default_rng(seed)
    one, other = timings(random, offset, noise), timings(random, offset, noise)
    forth, back = paired_ratio(one, other, ERROR), paired_ratio(other, one, ERROR)
    assert (forth.median, forth.low, forth.high) == pytest.approx((1 / back.median, 1 / back.high, 1 / back.low))
    assert forth.low <= forth.median <= forth.high


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_slows_both_arms_of_a_round_alike_cancels(seed: int):
    random = np.random.default_rng(seed)
    one, other, mood = (
        timings(random, 0.01, 0.01),
        timings(random, 0.01, 0.01),
        np.exp(random.normal(0, 1, (SETS, ROUNDS))),
    )
    calm, moody = paired_ratio(one, other, ERROR), paired_ratio(mood * one, mood * other, ERROR)
    assert (moody.median, moody.low, moody.high) == pytest.approx((calm.median, calm.low, calm.high))


def test_interval_widens_with_what_differs_between_sessions_and_with_certainty():
    random = np.random.default_rng(0)
    still, moving = (
        paired_ratio(timings(random, offset, 0.01), timings(random, offset, 0.01), ERROR) for offset in (0, 0.05)
    )
    assert moving.high - moving.low > 5 * (still.high - still.low)
    times, base = timings(random, 0.01, 0.01), timings(random, 0.01, 0.01)
    assert paired_ratio(times, base, 0.01).high > paired_ratio(times, base, 0.05).high
