"""How many rounds a set of sessions is worth: from what differs within sets and between them, and from what each costs.

The median of a set of n rounds varies by b + w / n, where b is the variance between sessions, which only new sessions
average out, and w that of rounds. A set takes o + n r seconds, to open and warm its sessions and to time n rounds. The
most is learned in a given time with n = √(o / r · w / b) (the optimum of two-stage sampling: Cochran, Sampling
Techniques, 1977, §10.6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora.files.tensorfile import Array

LEAST_ROUNDS, MOST_ROUNDS = 5, 1000
FEWEST_SETS = 16  # that a budget has room for: an interval over fewer is wide, whatever was timed within each
ENOUGH_TO_TELL = 4  # sets, from which variances can be estimated
DEVIATION = 1.4826  # of a normal distribution, over its median absolute deviation
OF_A_MEDIAN = math.pi / 2  # its variance over that of a mean, for a normal distribution's middle


@dataclass(frozen=True)
class Costs:
    """Seconds, or any other unit: to open and warm the sessions of a set, and of a round of all arms."""

    opening: float
    round: float


@dataclass(frozen=True)
class Summary:
    """A set's rounds, and of each arm the median of its paired log-ratios to the base and what they vary by."""

    rounds: int
    medians: Array
    within: Array


def summary(ratios: Array) -> Summary:
    """What is told by a set whose rounds' paired log-ratios have shape (rounds, arms)."""
    medians = _middle(ratios)
    deviation = DEVIATION * _middle(np.abs(ratios - medians))  # outliers do not move it
    return Summary(len(ratios), medians, OF_A_MEDIAN * deviation**2)


def best_rounds(sets: Sequence[Summary], costs: Costs, budget: float) -> int:
    """Rounds for the next set.

    Before the variances can be told, as many as take the time of opening; and never more than twice as many as in the
    longest set so far, for variances of few sets are rough. Where opening leaves too little of the budget for its
    fewest sets, timing may still take as long as that.
    """
    room = max(budget / FEWEST_SETS - costs.opening, costs.opening)
    most = min(MOST_ROUNDS, room / costs.round)
    wanted = costs.opening / costs.round
    if len(sets) >= ENOUGH_TO_TELL:
        within, between = variances(sets)
        wanted = math.sqrt(wanted * within / between) if between > 0 else MOST_ROUNDS
        most = min(most, 2 * max(one.rounds for one in sets))
    return int(max(LEAST_ROUNDS, min(wanted, most)))


def variances(sets: Sequence[Summary]) -> tuple[float, float]:
    """Of a round's share in a set's median, and between sets: means over the arms.

    A set's median moves by the first over its rounds; what the medians of sets differ by beyond that is between them.
    """
    medians, rounds = np.array([one.medians for one in sets]), np.array([one.rounds for one in sets])
    within = float(rounds @ np.array([one.within for one in sets]).mean(axis=1)) / int(rounds.sum())
    spread = DEVIATION * _middle(np.abs(medians - _middle(medians)))
    return within, max(0.0, float(spread @ spread) / len(spread) - within * float((1 / rounds).mean()))


def _middle(values: Array) -> Array:
    """The median along the first axis: numpy's own takes four times as long for so few values, and a set has many."""
    ordered = np.sort(values, axis=0)
    middle: Array = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return middle
