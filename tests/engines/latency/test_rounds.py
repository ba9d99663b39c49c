"""How many rounds a set is worth: the optimum of known variances, and what keeps a rough estimate in bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.latency.rounds import FEWEST_SETS, LEAST_ROUNDS, Costs, Summary, best_rounds, summary, variances

COSTS = Costs(opening=20.0, round=1.0)
LONG = 1e6


def sets_of(within: float, between: float, rounds: int, sets: int = 200) -> list[Summary]:
    """Sets of two arms whose sessions and rounds differ by such standard deviations."""
    random = np.random.default_rng(0)
    return [summary(random.normal(0, between, (1, 2)) + random.normal(0, within, (rounds, 2))) for _ in range(sets)]


def test_both_variances_are_found_again():
    within, between = variances(sets_of(0.02, 0.006, 40))
    assert within == pytest.approx(math.pi / 2 * 0.02**2, rel=0.1)
    assert between == pytest.approx(0.006**2, rel=0.25)


def test_rounds_are_those_that_tell_the_most_in_a_given_time():
    """Of all numbers of rounds, none has a smaller variance a second, by the very variances that were planted."""
    chosen = best_rounds(sets_of(0.02, 0.006, 40), COSTS, LONG)
    variance = {
        rounds: (0.006**2 + math.pi / 2 * 0.02**2 / rounds) * (COSTS.opening + rounds) for rounds in range(1, 200)
    }
    best = min(variance, key=lambda rounds: variance[rounds])
    assert variance[chosen] == pytest.approx(variance[best], rel=0.02)


def test_sessions_that_do_not_differ_get_as_many_rounds_as_leave_the_budget_its_fewest_sets():
    budget = FEWEST_SETS * (COSTS.opening + 100)
    alike = [Summary(60, np.zeros(2), np.full(2, 0.01))] * 12
    assert variances(alike) == (pytest.approx(0.01), 0)
    assert best_rounds(alike, COSTS, budget) == 100


def test_before_variances_can_be_told_rounds_take_as_long_as_opening():
    assert best_rounds([], COSTS, LONG) == best_rounds(sets_of(0.1, 0, 20, sets=3), COSTS, LONG) == 20


def test_rounds_at_most_double_and_are_never_fewer_than_the_least():
    assert best_rounds(sets_of(0.1, 0.0, 12, sets=4), COSTS, LONG) <= 24
    assert best_rounds(sets_of(0.001, 0.5, 20), COSTS, LONG) == LEAST_ROUNDS
    assert best_rounds([], Costs(opening=1.0, round=1.0), 0.0) == LEAST_ROUNDS


def test_sessions_that_take_long_to_open_are_timed_for_as_long():
    alike = [Summary(60, np.zeros(2), np.full(2, 0.01))] * 12
    assert best_rounds(alike, COSTS, FEWEST_SETS * COSTS.opening / 2) == 20


def test_outliers_do_not_move_the_variances():
    calm = sets_of(0.02, 0.006, 40)
    random = np.random.default_rng(0)
    wild = [summary(np.where(random.random((40, 2)) < 0.03, 5.0, random.normal(0, 0.02, (40, 2)))) for _ in range(200)]
    assert variances(wild)[0] == pytest.approx(variances(calm)[0], rel=0.2)


@settings(max_examples=50, deadline=None)
@given(rounds=st.lists(st.integers(1, 30), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_any_sets_give_a_number_of_rounds(rounds: list[int], seed: int):
    random = np.random.default_rng(seed)
    sets = [summary(random.normal(0, 0.1, (number, 2))) for number in rounds]
    assert best_rounds(sets, COSTS, 2000) >= LEAST_ROUNDS
    for one, number in zip(sets, rounds, strict=True):
        assert one.rounds == number
        assert (one.within >= 0).all()


def test_a_sets_median_is_numpys():
    ratios = np.random.default_rng(1).normal(0, 1, (8, 3))
    np.testing.assert_allclose(summary(ratios).medians, np.median(ratios, axis=0))
    np.testing.assert_allclose(summary(ratios[:7]).medians, np.median(ratios[:7], axis=0))
