"""Taking sets of samples until the question is decided, without paying for the looks in wrong answers.

The sets are judged after 6, 12, 24, … of them, and when the time is up. A look may err with half of what the looks
before it have left of ``ERROR``, the last one with all of it. However many looks there are, together they err with no
more than ``ERROR`` (the sum of the chances, whatever the looks have in common): a run is not "measured until it
passes".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from engines.latency.report import Verdict

ERROR = 0.05  # of each of the two one-sided tests, over all looks together
FIRST_LOOK = 6  # sets: fewer can't exclude anything at half of ERROR

Set = TypeVar("Set")


class Judged(Protocol):
    """What a look results in."""

    @property
    def verdict(self) -> Verdict:
        """Undecided: go on, if there is time."""
        ...


Result = TypeVar("Result", bound=Judged)


def until_decided(
    take: Callable[[int], Set], judge: Callable[[Sequence[Set], float], Result], is_over: Callable[[int], bool]
) -> Result:
    """``take`` one set after the other, until ``judge(sets, error)`` has decided or ``is_over`` after so many sets.

    At least ``FIRST_LOOK`` sets are taken, whatever they cost.
    """
    sets: list[Set] = []
    looks = 0
    while True:
        sets.append(take(len(sets)))
        last = len(sets) >= FIRST_LOOK and is_over(len(sets))
        if last or _is_look(len(sets)):
            judged = judge(sets, _error(looks, last))
            if last or judged.verdict != "undecided":
                return judged
            looks += 1


def _is_look(sets: int) -> bool:
    times, rest = divmod(sets, FIRST_LOOK)
    return rest == 0 and times.bit_count() == 1


def _error(look: int, last: bool) -> float:
    return ERROR * 0.5 ** (look if last else look + 1)
