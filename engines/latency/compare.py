"""Two reports compared: the same arms at the same loads on two machines, or of two versions.

The two runs were not interleaved, so nothing is paired: an arm's ratio is the second report's set medians over the
first's, with the interval of the rank-sum test (Hodges & Lehmann 1963), which holds when sets of one run are like one
another. What the arm costs beside its own base can be compared across machines; times alone can be across versions on
one machine only.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from engines.latency.equivalence import Decision, Ratio, paired_medians
from engines.latency.report import Load, Point, Report
from engines.latency.sequential import ERROR
from lora.errors import LorafuseError
from lora.files.tensorfile import Array


@dataclass(frozen=True)
class Compared:
    """One arm at one load: how its time changed, and how its ratio to its own base changed (None: it is the base)."""

    load: Load
    arm: str
    before: float
    after: float
    time: Ratio
    cost: Ratio | None
    decision: Decision


def compare(first: Report, second: Report, margin: float) -> list[Compared]:
    """Every arm and load that both have.

    ``before`` and ``after`` are medians in ms. Raises LorafuseError where they share none, or hold too few sets.
    """
    earlier = {point.load: point for point in first.points}
    compared = [
        _compared(earlier[point.load], point, arm, margin)
        for point in second.points
        if point.load in earlier
        for arm in second.arms
        if arm in first.arms
    ]
    if not compared:
        raise LorafuseError("the reports have no load and arm in common; measure the same batch and length twice")
    return compared


def _compared(first: Point, second: Point, arm: str, margin: float) -> Compared:
    before, after = _levels(first, arm), _levels(second, arm)
    time = rank_sum(after, before, ERROR)
    is_base = arm == first.readings[0].arm
    cost = None if is_base else rank_sum(_costs(second, arm), _costs(first, arm), ERROR)
    return Compared(second.load, arm, first.reading(arm).p50, second.reading(arm).p50, time, cost, time.decide(margin))


def _levels(point: Point, arm: str) -> Array:
    """The logarithm of each set's median time."""
    index = _index(point, arm)
    return np.log([np.nanmedian(one[:, index]) for one in point.samples.times("wall")])


def _costs(point: Point, arm: str) -> Array:
    """The median of each set's paired log-ratios to the base."""
    index = _index(point, arm)
    times = point.samples.times("wall")
    return paired_medians([one[:, index] for one in times], [one[:, 0] for one in times])


def _index(point: Point, arm: str) -> int:
    return [reading.arm for reading in point.readings].index(arm)


def rank_sum(logs: Array, others: Array, error: float) -> Ratio:
    """The median of all differences, and those as far from the ends as ``error`` allows (by the rank sum's normal
    approximation).

    Raises LorafuseError where the sets are too few for ``error``.
    """
    differences = np.sort((logs[:, None] - others[None, :]).ravel())
    pairs = len(differences)
    spread = np.sqrt(pairs * (len(logs) + len(others) + 1) / 12)
    left_out = int(pairs / 2 + NormalDist().inv_cdf(error) * spread)
    if left_out < 1:
        raise LorafuseError(
            f"{len(logs)} and {len(others)} sets can't bound a ratio with an error of {error:.3g}; measure again, with"
            " a larger budget"
        )
    median, low, high = np.exp([np.median(differences), differences[left_out - 1], differences[-left_out]]).tolist()
    return Ratio(median, low, high, error)
