"""What would help a verdict that was not reached: another clock, more time, or a quieter machine."""

from __future__ import annotations

import math

from engines.latency.clocks import Clock, half_width
from engines.latency.equivalence import Ratio
from engines.latency.report import Point
from engines.latency.verdict import ASKED

MORE = 4.0  # times the seconds already spent: more is no advice
CLEARLY_SOONER = 0.5


def advice(point: Point, margin: float, seconds: float) -> str:
    """What would help after so many ``seconds``; nothing where the verdict was reached."""
    if point.verdict != "undecided":
        return ""
    other: Clock = "wall" if point.clock == "cpu" else "cpu"
    if any(said.clock == other and said.verdict != "undecided" for said in point.said):
        return f"{_named(other)} decides here: --clock {other}"
    needed = {clock: _needed(point, clock, margin) * seconds for clock in ("wall", "cpu") if point.by(clock)}
    own, others = needed[point.clock], needed.get(other, math.inf)
    if others < CLEARLY_SOONER * own and others <= MORE * seconds:
        return f"{_named(other)} is steadier here: --clock {other} --seconds {_whole(seconds + others)}"
    if own <= MORE * seconds:
        return f"close to: about {_whole(own)} s more, --seconds {_whole(seconds + own)}"
    return "pin a core that nothing else uses: taskset --cpu-list 1 lorafuse bench …; or declare a larger --margin"


def _named(clock: Clock) -> str:
    return "CPU time" if clock == "cpu" else "the wall clock"


def _whole(seconds: float) -> int:
    """Rounded up to two digits: the estimate has no more."""
    digits = len(str(int(seconds)))
    unit = int("1".ljust(max(1, digits - 1), "0"))
    return math.ceil(seconds / unit) * unit


def _needed(point: Point, clock: Clock, margin: float) -> float:
    """How much more, as a multiple of what was spent, until the intervals that a verdict rests on would be decided.

    An interval shrinks with the square root of the time, around where its middle lies now.
    """
    return max(_more(point.reading(arm, clock).ratio, margin) for arm in ASKED)


def _more(ratio: Ratio, margin: float) -> float:
    if ratio.decide(margin) != "inconclusive":
        return 0.0
    room = abs(math.log1p(margin) - abs(math.log(ratio.median)))
    return math.inf if room == 0 else max(0.1, (half_width(ratio) / room) ** 2 - 1)
