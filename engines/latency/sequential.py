"""Taking sets of samples until the question is decided, without paying for the looks in wrong answers.

A look may come after every sixteenth of the budget. When a share t of the budget is spent, all looks so far may have
erred with ``SPENT`` · t³ together (the power family of Kim & DeMets 1987): most of the error is left for the end, where
there is most to see. Looks have their samples in common, so they need not share that sum out between them: what one of
them may err with follows from the joint distribution of them all, as Lan & DeMets 1983 put it. A run is not "measured
until it passes", however often it is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Protocol, TypeVar

import numpy as np

from lora.files.tensorfile import Array

ERROR = 0.05  # of each of the two one-sided tests, over all looks together: what is declared
# What is spent of it. The rest is for what the joint distribution leaves out: sets are not as even as shares of the
# budget, and how many rounds they have follows from those before.
SPENT = 0.8 * ERROR
LOOKS = 16  # at most, in a budget
LATE = 3.0  # the power of the spending: 1 spends evenly, and more spends later
FIRST_LOOK = 6  # sets: what is measured whatever it costs; they can exclude something at ERROR

# The looks' statistic is followed on a grid, in units of its standard deviation at the end of the budget.
STEP, ENDS = 0.005, 6.0

Set = TypeVar("Set")


class Judged(Protocol):
    """What a look results in."""

    @property
    def is_decided(self) -> bool:
        """Where it is not: go on, if there is time."""
        ...


Result = TypeVar("Result", bound=Judged)


def until_decided(
    take: Callable[[int], Set], judge: Callable[[Sequence[Set], float, float], Result], spent: Callable[[int], float]
) -> Result:
    """``take`` one set after the other, until ``judge(sets, error, share)`` has decided or the budget is spent.

    ``spent`` is the share of the budget that so many sets took; from 1 on there is nothing left. At least
    ``FIRST_LOOK`` sets are taken, whatever they cost.
    """
    sets: list[Set] = []
    shares: tuple[float, ...] = ()
    while True:
        sets.append(take(len(sets)))
        share = math.floor(min(1.0, spent(len(sets))) * LOOKS) / LOOKS
        if len(sets) < FIRST_LOOK or share <= max(shares, default=0.0):
            continue
        error = error_of((*shares, share))
        if 0.5 ** len(sets) > error:  # so few sets can't exclude anything with it: the error is kept for later
            continue
        shares = (*shares, share)
        judged = judge(sets, error, share)
        if judged.is_decided or share == 1:
            return judged


@cache
def error_of(shares: tuple[float, ...]) -> float:
    """What the last of the looks at ``shares`` of the budget may err with by itself, where each has spent all it could.

    The looks' statistics are normal, and grow in steps that are independent of one another. The density of those that
    have not stopped yet is carried from look to look (Armitage, McPherson & Rowe 1969).
    """
    grid = np.arange(-ENDS, ENDS + STEP / 2, STEP)
    going, before, spent = np.zeros(0), 0.0, 0.0
    bound = math.inf
    for share in shares:
        going = _later(going, grid, share - before) if before else _density(grid, share)
        may_spend = SPENT * share**LATE
        bound = _bound(going, grid, may_spend - spent)
        going = going * np.clip((bound - grid) / STEP + 0.5, 0, 1)  # a cell that the bound cuts counts by its part
        before, spent = share, may_spend
    return NormalDist().cdf(-bound / math.sqrt(shares[-1]))


def _density(grid: Array, variance: float) -> Array:
    density: Array = np.exp(-(grid**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return density


def _later(going: Array, grid: Array, variance: float) -> Array:
    """The density after a step of so large a variance."""
    later: Array = np.convolve(going, _density(grid, variance), mode="same") * STEP
    return later


def _bound(density: Array, grid: Array, tail: float) -> float:
    """Where so much lies beyond."""
    beyond = np.cumsum(density[::-1])[::-1] * STEP  # from half a step before each place on
    return float(np.interp(-tail, -beyond, grid - STEP / 2))
