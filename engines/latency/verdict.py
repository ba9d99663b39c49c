"""From samples to a verdict: every arm's ratio to the base, the controls, and what may be said.

Controls decide whether the harness may speak. The base against itself must come out equivalent, or the machine is too
noisy. The unmerged adapter ought to come out slower, or no power was shown at this load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engines.latency.equivalence import Decision, Ratio, paired_ratio, quantile_ratio
from engines.latency.report import Load, Point, Reading, Samples, Verdict
from lora.files.tensorfile import Array

BASE, AGAIN, MERGED, UNMERGED = "base", "base again", "merged", "unmerged"
ROUNDS_FOR_P99 = 100  # in a set: fewer have no hundredth


def judged(load: Load, arms: Sequence[str], samples: Samples, margin: float, error: float) -> Point:
    """The point that the samples make, each test at ``error``. The first arm is the base."""
    readings = tuple(_reading(load, name, index, samples, margin, error) for index, name in enumerate(arms))
    verdict, reason = judge({reading.arm: reading.decision for reading in readings}, margin)
    return Point(load, verdict, reason, readings, samples)


def judge(decisions: Mapping[str, Decision], margin: float) -> tuple[Verdict, str]:
    """The verdict on the merged arm, and the reason, from what each arm's interval says."""
    if decisions[AGAIN] != "equivalent":
        return "undecided", f"this machine is too noisy: the base against itself is not within {margin:.1%}"
    power = (
        ""
        if decisions.get(UNMERGED, "slower") == "slower"
        else "; no power shown: the unmerged adapter is not measurably slower here"
    )
    match decisions[MERGED]:
        case "equivalent":
            return "equivalent", f"merged is within {margin:.1%} of the unadapted base{power}"
        case "slower":
            return "slower", f"merged is more than {margin:.1%} slower than the unadapted base{power}"
        case "faster":
            return (
                "undecided",
                (
                    f"merged is more than {margin:.1%} faster than the unadapted base, which merging does not explain;"
                    " measure again"
                ),
            )
    return (
        "undecided",
        f"the interval of merged against base crosses the margin of {margin:.1%}; give it a larger budget",
    )


def _reading(load: Load, name: str, index: int, samples: Samples, margin: float, error: float) -> Reading:
    runs = np.array(samples.runs)
    times, base = runs[:, :, index], runs[:, :, 0]
    ratio = paired_ratio(times, base, error) if index else Ratio(1.0, 1.0, 1.0, error)
    has_p99 = times.shape[1] >= ROUNDS_FOR_P99
    p50 = _ms(np.median(times))
    return Reading(
        arm=name,
        p50=p50,
        p90=_ms(np.quantile(times, 0.9)),
        p99=_ms(np.quantile(times, 0.99)) if has_p99 else None,
        opening=_ms(np.median(np.array(samples.opening)[:, index])),
        first=_ms(np.median(np.array(samples.first)[:, index])),
        rate=load.batch / p50 * 1e3,
        ratio=ratio,
        ratio_p90=quantile_ratio(times, base, 0.9, error),
        ratio_p99=quantile_ratio(times, base, 0.99, error) if has_p99 else None,
        decision=ratio.decide(margin) if index else "equivalent",
    )


def _ms(nanoseconds: Array | np.floating) -> float:
    return float(nanoseconds) / 1e6
