"""From samples to a verdict: every arm's ratio to the base, the controls, and what may be said.

Controls decide whether the harness may speak. The base against itself must come out equivalent, or the machine is too
noisy. The unmerged adapter ought to come out slower, or no power was shown at this load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.latency.clocks import NAMES, Clock, ClockChoice, deciding
from engines.latency.equivalence import Decision, Ratio, paired_ratio, quantile_ratio
from engines.latency.report import Load, Point, Reading, Said, Samples, Verdict
from lora.files.tensorfile import Array

BASE, AGAIN, MERGED, UNMERGED = "base", "base again", "merged", "unmerged"
ASKED = (AGAIN, MERGED)  # the arms that a verdict rests on
ROUNDS_FOR_P99 = 100  # in a set: fewer have no hundredth


@dataclass(frozen=True)
class Look:
    """How the samples so far are judged: each test at ``error``, after a ``share`` of the budget.

    ``earlier`` is what the look before saw: what was decided then stays so.
    """

    margin: float
    error: float
    clock: ClockChoice = "wall"
    share: float = 1.0
    earlier: Point | None = None


def judged(load: Load, arms: Sequence[str], samples: Samples, look: Look) -> Point:
    """The point that the samples make. The first arm is the base."""
    readings = {
        clock: tuple(_reading(load, name, index, clock, samples, look) for index, name in enumerate(arms))
        for clock in _clocks(samples)
    }
    ratios = {
        clock: {one.arm: _now(samples, clock, index, look) for index, one in enumerate(of) if one.arm in ASKED}
        for clock, of in readings.items()
    }
    said = tuple(_said(clock, of, look.margin) for clock, of in readings.items())
    clock = deciding(look.clock, ratios, look.margin, look.share)
    told = {of: _told(arms) for of, arms in readings.items()}
    decided = next(one for one in said if one.clock == clock)
    return Point(load, decided.verdict, decided.reason, told["wall"], samples, (), clock, told.get("cpu", ()), said)


def judge(decisions: Mapping[str, Decision], margin: float, clock: Clock = "wall") -> tuple[Verdict, str]:
    """The verdict on the merged arm, and the reason, from what each arm's interval says by one clock."""
    by = f"by {NAMES[clock]}"
    if decisions[AGAIN] != "equivalent":
        return "undecided", f"this machine is too noisy: the base against itself is not within {margin:.1%} {by}"
    power = (
        ""
        if decisions.get(UNMERGED, "slower") == "slower"
        else "; no power shown: the unmerged adapter is not measurably slower here"
    )
    match decisions[MERGED]:
        case "equivalent":
            return "equivalent", f"merged is within {margin:.1%} of the unadapted base {by}{power}"
        case "slower":
            return "slower", f"merged is more than {margin:.1%} slower than the unadapted base {by}{power}"
        case "faster":
            return (
                "undecided",
                (
                    f"merged is more than {margin:.1%} faster than the unadapted base {by}, which merging does not"
                    " explain; measure again"
                ),
            )
    return "undecided", f"the interval of merged against base crosses the margin of {margin:.1%} {by}"


def kept(arm: str, earlier: Ratio | None, now: Ratio, margin: float) -> Ratio:
    """What stands of an arm: the interval that decided it, or the present one where none has yet.

    All looks together err with what was declared, so a decision that one of them made needs no later one's leave. The
    null control passes in the same way; that it failed is never the last word.
    """
    if earlier is None:
        return now
    decision = earlier.decide(margin)
    stands = decision == "equivalent" if arm == AGAIN else decision != "inconclusive"
    return earlier if stands else now


def _clocks(samples: Samples) -> tuple[Clock, ...]:
    return ("wall", "cpu") if samples.cpu else ("wall",)


def _times(samples: Samples, clock: Clock, index: int) -> list[Array]:
    """An arm's times by one clock, in ns: of each set its rounds, NaN where the arm sat one out."""
    return [one[:, index] for one in samples.times(clock)]


def _now(samples: Samples, clock: Clock, index: int, look: Look) -> Ratio:
    return paired_ratio(_times(samples, clock, index), _times(samples, clock, 0), look.error)


def _reading(load: Load, name: str, index: int, clock: Clock, samples: Samples, look: Look) -> Reading:
    times, base = _times(samples, clock, index), _times(samples, clock, 0)
    ran, error = [one[~np.isnan(one)] for one in times], look.error
    every = np.concatenate(ran)
    has_p99 = min(map(len, ran)) >= ROUNDS_FOR_P99
    ratio, sets = Ratio(1.0, 1.0, 1.0, error), len(times)
    if index:
        ratio, sets = _kept(name, clock, paired_ratio(times, base, error), sets, look)
    p50 = _ms(np.median(every))
    return Reading(
        arm=name,
        p50=p50,
        p90=_ms(np.quantile(every, 0.9)),
        p99=_ms(np.quantile(every, 0.99)) if has_p99 else None,
        opening=_ms(np.median(np.array(samples.opening)[:, index])),
        first=_ms(np.median(np.array(samples.first)[:, index])),
        rate=load.batch / p50 * 1e3,
        ratio=ratio,
        ratio_p90=quantile_ratio(times, base, 0.9, error),
        ratio_p99=quantile_ratio(times, base, 0.99, error) if has_p99 else None,
        decision=ratio.decide(look.margin) if index else "equivalent",
        sets=sets,
    )


def _kept(name: str, clock: Clock, now: Ratio, sets: int, look: Look) -> tuple[Ratio, int]:
    """What stands of the arm, and after how many sets it was seen."""
    if look.earlier is None:
        return now, sets
    before = look.earlier.reading(name, clock)
    stands = kept(name, before.ratio, now, look.margin)
    return (stands, before.sets) if stands is before.ratio else (stands, sets)


def _said(clock: Clock, readings: Sequence[Reading], margin: float) -> Said:
    verdict, reason = judge({reading.arm: reading.ratio.decide(margin) for reading in readings}, margin, clock)
    return Said(clock, verdict, reason)


def _told(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    """The readings, without the word of any arm where the null control failed: only it has one then."""
    if next(reading for reading in readings if reading.arm == AGAIN).decision == "equivalent":
        return tuple(readings)
    return tuple(
        reading if reading.arm in (BASE, AGAIN) else replace(reading, decision="not said") for reading in readings
    )


def _ms(nanoseconds: Array | np.floating) -> float:
    return float(nanoseconds) / 1e6
