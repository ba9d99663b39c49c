"""From samples to a verdict: controls first, then the merged arm; every figure of a reading."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engines.latency.equivalence import Ratio
from engines.latency.report import Load, Samples
from engines.latency.sequential import ERROR
from engines.latency.verdict import AGAIN, BASE, MERGED, ROUNDS_FOR_P99, UNMERGED, judge, judged


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
    assert reason == "this machine is too noisy: the base against itself is not within 1.0%"


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
    assert "give it a larger budget" in reason


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
    point = judged(Load(4, 8), (BASE, AGAIN, MERGED), taken, 0.01, ERROR)
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
    merged = judged(Load(1, 8), (BASE, AGAIN, MERGED), samples(ROUNDS_FOR_P99 - 1), 0.01, ERROR).reading(MERGED)
    assert merged.p99 is merged.ratio_p99 is None
