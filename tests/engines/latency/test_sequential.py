"""When the sets are judged, and with what error; and that looking often does not make wrong answers likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.latency.report import Verdict
from engines.latency.sequential import ERROR, FIRST_LOOK, until_decided


@dataclass(frozen=True)
class Look:
    """What a look at so many sets saw."""

    sets: int
    error: float
    verdict: Verdict


def looks(over_at: int, decided_at: int | None = None) -> list[Look]:
    """The looks at numbered sets, when the time is up after so many."""
    seen: list[Look] = []

    def judge(sets: Sequence[int], error: float) -> Look:
        assert list(sets) == list(range(len(sets)))
        seen.append(
            Look(len(sets), error, "equivalent" if decided_at is not None and len(sets) >= decided_at else "undecided")
        )
        return seen[-1]

    assert until_decided(lambda number: number, judge, lambda sets: sets >= over_at) is seen[-1]
    return seen


def test_looks_come_after_6_12_and_24_sets_and_halve_what_they_may_err():
    assert [(look.sets, look.error) for look in looks(over_at=40)] == [
        (6, ERROR / 2),
        (12, ERROR / 4),
        (24, ERROR / 8),
        (40, ERROR / 8),
    ]


def test_the_least_number_of_sets_is_taken_on_no_time_and_may_err_with_everything():
    assert looks(over_at=0) == [Look(FIRST_LOOK, ERROR, "undecided")]


def test_a_decision_ends_it_at_the_next_look():
    assert [look.sets for look in looks(over_at=1000, decided_at=7)] == [6, 12]


@given(over_at=st.integers(0, 500))
def test_all_looks_together_may_err_with_what_was_declared(over_at: int):
    seen = looks(over_at)
    assert sum(look.error for look in seen) == pytest.approx(ERROR)
    assert all(look.error > 0 for look in seen)
    assert seen[-1].sets == max(over_at, FIRST_LOOK)


def test_looking_often_at_nothing_finds_something_no_more_often_than_declared():
    """Uniform p values of a true null hypothesis, one anew for each look: the worst case, looks that have nothing in
    common.
    """
    random = np.random.default_rng(0)

    @dataclass(frozen=True)
    class Chance:
        verdict: Verdict

    def wrong() -> bool:
        return (
            until_decided(
                int,
                lambda sets, error: Chance("slower" if random.random() < error else "undecided"),
                lambda sets: sets >= 96,
            ).verdict
            == "slower"
        )

    assert sum(wrong() for _ in range(4000)) / 4000 <= 0.06  # 99.9th percentile of the binomial at 5 %
