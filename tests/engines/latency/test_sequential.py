"""When the sets are judged, and with what error; and that looking often does not make wrong answers likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.latency.sequential import ERROR, FIRST_LOOK, LOOKS, SPENT, error_of, until_decided


@dataclass(frozen=True)
class Look:
    """What a look at so many sets saw."""

    sets: int
    error: float
    share: float
    is_decided: bool


def looks(over_at: int, decided_at: int | None = None) -> list[Look]:
    """The looks at numbered sets that take the same time, when it is up after so many."""
    seen: list[Look] = []

    def judge(sets: Sequence[int], error: float, share: float) -> Look:
        assert list(sets) == list(range(len(sets)))
        seen.append(Look(len(sets), error, share, decided_at is not None and len(sets) >= decided_at))
        return seen[-1]

    assert until_decided(lambda number: number, judge, lambda sets: sets / max(over_at, 1)) is seen[-1]
    return seen


def test_looks_come_at_sixteenths_of_the_budget_from_when_a_set_can_exclude_something():
    seen = looks(over_at=32)
    assert [look.sets for look in seen] == list(range(10, 33, 2))
    assert all(0.5**look.sets <= look.error for look in seen)
    assert error_of((8 / 32,)) < 0.5**8  # one sixteenth earlier, nothing could have been said


def test_most_of_the_error_is_left_for_the_end():
    errors = [look.error for look in looks(over_at=64)]
    assert all(early < late for early, late in pairwise(errors))
    assert errors[0] < 0.002 < 0.5 * SPENT < errors[-1] < SPENT


def test_the_least_number_of_sets_is_taken_on_no_time_and_may_err_with_everything():
    assert looks(over_at=0) == [Look(FIRST_LOOK, pytest.approx(SPENT, abs=1e-4), 1.0, False)]


def test_a_decision_ends_it_at_the_next_look():
    assert [look.sets for look in looks(over_at=64, decided_at=25)][-1] == 28


def test_one_look_alone_may_err_with_what_is_spent_by_then():
    for share in (0.25, 0.5, 1.0):
        assert error_of((share,)) == pytest.approx(SPENT * share**3, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(chosen=st.sets(st.integers(4, LOOKS), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_looks_at_a_sum_that_grows_by_chance_err_together_with_what_is_spent(chosen: set[int], seed: int):
    """Whichever sixteenths are looked at: the statistic of no difference, drawn 100,000 times."""
    shares = tuple(number / LOOKS for number in sorted(chosen))
    random = np.random.default_rng(seed)
    steps = np.diff(shares, prepend=0.0) ** 0.5
    sums = np.cumsum(random.standard_normal((100_000, len(shares))) * steps, axis=1)
    bounds = [-NormalDist().inv_cdf(error_of(shares[: index + 1])) for index in range(len(shares))]
    wrong = (sums / np.sqrt(shares) > bounds).any(axis=1).mean()
    assert wrong == pytest.approx(SPENT * shares[-1] ** 3, abs=0.003)  # over four standard deviations


@settings(max_examples=25, deadline=None)
@given(over_at=st.integers(0, 300))
def test_every_run_ends_with_a_look_at_all_sets(over_at: int):
    seen = looks(over_at)
    assert (seen[-1].sets, seen[-1].share) == (max(over_at, FIRST_LOOK), 1.0)
    assert all(0 < look.error <= ERROR for look in seen)
