"""From samples to a verdict: controls first, then the merged arm; every figure of a reading."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from engines.latency.equivalence import Ratio
from engines.latency.report import Load, Samples
from engines.latency.sequential import ERROR
from engines.latency.verdict import AGAIN, BASE, MERGED, ROUNDS_FOR_P99, UNMERGED, Look, judge, judged, kept


def decisions(again: str, merged: str, unmerged: str | None) -> dict[str, str]:
    found = {BASE: "equivalent", AGAIN: again, MERGED: merged, UNMERGED: unmerged}
    return {name: decision for name, decision in found.items() if decision is not None}


@pytest.mark.parametrize(
    ("again", "merged", "unmerged"),
    list(
        itertools.product(
            ["slower", "faster", "inconclusive"], ["equivalent", "slower", "faster", "inconclusive"], ["slower", None]
        )
    ),
)
def test_noisy_null_control_leaves_it_undecided_whatever_merged_says(again: str, merged: str, unmerged: str | None):
    verdict, reason = judge(decisions(again, merged, unmerged), 0.01)
    assert verdict == "undecided"
    assert reason == "this machine is too noisy: the base against itself is not within 1.0% by the wall clock"


@pytest.mark.parametrize("merged", ["equivalent", "slower"])
@pytest.mark.parametrize(
    ("unmerged", "powerless"), [("slower", False), (None, False), ("equivalent", True), ("inconclusive", True)]
)
def test_decided_merged_arm_is_the_verdict_and_missing_power_is_said(
    merged: str, unmerged: str | None, powerless: bool
):
    verdict, reason = judge(decisions("equivalent", merged, unmerged), 0.01)
    assert verdict == merged
    assert ("no power shown" in reason) == powerless


@pytest.mark.parametrize("unmerged", ["slower", "equivalent", "inconclusive", None])
def test_inconclusive_merged_arm_is_undecided_and_asks_for_a_larger_budget(unmerged: str | None):
    verdict, reason = judge(decisions("equivalent", "inconclusive", unmerged), 0.01)
    assert verdict == "undecided"
    assert reason == "the interval of merged against base crosses the margin of 1.0% by the wall clock"


def test_merged_arm_that_is_faster_is_not_trusted():
    verdict, reason = judge(decisions("equivalent", "faster", "slower"), 0.01)
    assert verdict == "undecided"
    assert "merging does not explain" in reason


def samples(rounds: int, slow: float = 1.0) -> Samples:
    """Six sets of three arms; the last takes ``slow`` times as long as the others, which take the same."""
    random = np.random.default_rng(0)
    runs = np.repeat(1e6 * np.exp(random.normal(0, 0.1, (6, rounds, 1))), 3, axis=2) * [1, 1, slow]
    opening, first = np.full((6, 3), 3_000_000), np.full((6, 3), 2_000_000)
    return Samples(runs.astype(int).tolist(), opening.tolist(), first.tolist())


def test_every_figure_of_a_reading_is_the_samples_own():
    taken = samples(ROUNDS_FOR_P99, slow=1.5)
    point = judged(Load(4, 8), (BASE, AGAIN, MERGED), taken, Look(0.01, ERROR))
    times = np.array(taken.runs)[:, :, 2]
    merged = point.reading(MERGED)
    assert (merged.p50, merged.p90, merged.p99) == (
        np.median(times) / 1e6,
        np.quantile(times, 0.9) / 1e6,
        np.quantile(times, 0.99) / 1e6,
    )
    assert (merged.opening, merged.first, merged.rate) == (3.0, 2.0, 4000 / merged.p50)
    for ratio in (merged.ratio, merged.ratio_p90, merged.ratio_p99):
        assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5), rel=1e-4)
    assert merged.decision == "slower"
    assert point.reading(BASE).ratio == Ratio(1.0, 1.0, 1.0, ERROR)
    assert (point.verdict, point.samples) == ("slower", taken)


def test_sets_of_few_rounds_have_no_p99():
    merged = judged(Load(1, 8), (BASE, AGAIN, MERGED), samples(ROUNDS_FOR_P99 - 1), Look(0.01, ERROR)).reading(MERGED)
    assert merged.p99 is merged.ratio_p99 is None


def test_the_reason_names_the_clock():
    assert judge(decisions("equivalent", "slower", None), 0.01, "cpu")[1].endswith("unadapted base by CPU time")


EQUIVALENT, SLOWER, OPEN = (Ratio(1.0, low, high, 0.01) for low, high in ((0.995, 1.005), (1.02, 1.03), (0.98, 1.02)))


@pytest.mark.parametrize(
    ("arm", "earlier", "stands"),
    [
        (MERGED, EQUIVALENT, True),
        (MERGED, SLOWER, True),
        (MERGED, OPEN, False),
        (MERGED, None, False),
        (AGAIN, EQUIVALENT, True),
        (AGAIN, SLOWER, False),  # a null control that failed may still pass
    ],
)
def test_what_an_earlier_look_decided_stands(arm: str, earlier: Ratio | None, stands: bool):
    now = Ratio(1.0, 0.97, 1.03, 0.02)
    assert kept(arm, earlier, now, 0.01) is (earlier if stands else now)


def test_the_interval_that_decided_is_kept_with_the_sets_it_was_of():
    first = judged(Load(1, 8), (BASE, AGAIN, MERGED), samples(20, slow=1.5), Look(0.01, ERROR))
    later = samples(20)
    twice = replace(later, runs=later.runs * 2, opening=later.opening * 2, first=later.first * 2)
    then = judged(Load(1, 8), (BASE, AGAIN, MERGED), twice, Look(0.01, ERROR, earlier=first))
    assert (then.reading(MERGED).ratio, then.reading(MERGED).sets) == (first.reading(MERGED).ratio, 6)
    assert then.reading(MERGED).p50 != first.reading(MERGED).p50
    assert then.verdict == first.verdict == "slower"


def test_each_clock_keeps_its_own_readings_and_word():
    """By the wall clock merged takes half as long again; by CPU time it does not."""
    both = replace(samples(20, slow=1.5), cpu=samples(20).runs)
    by_wall, by_cpu = (
        judged(Load(1, 8), (BASE, AGAIN, MERGED), both, Look(0.01, ERROR, clock)) for clock in ("wall", "cpu")
    )
    assert (by_wall.clock, by_wall.verdict, by_cpu.clock, by_cpu.verdict) == ("wall", "slower", "cpu", "equivalent")
    for point in (by_wall, by_cpu):
        assert point.reading(MERGED).ratio.median == pytest.approx(1.5, rel=1e-4)
        assert point.reading(MERGED, "cpu").ratio.median == 1
        assert [(said.clock, said.verdict) for said in point.said] == [("wall", "slower"), ("cpu", "equivalent")]


def test_sets_may_have_more_rounds_than_others():
    few, many = samples(5, slow=1.5), samples(30, slow=1.5)
    mixed = replace(few, runs=few.runs[:3] + many.runs[:3])
    merged = judged(Load(1, 8), (BASE, AGAIN, MERGED), mixed, Look(0.01, ERROR)).reading(MERGED)
    assert merged.ratio.median == pytest.approx(1.5, rel=1e-4)
    assert merged.p50 == np.median([times[2] for one in mixed.runs for times in one]) / 1e6
    assert mixed.shape == "6 sets of 5–30 rounds"
    assert few.shape == "6 sets of 5 rounds"
