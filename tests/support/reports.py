"""Reports made of simulated times, as real ones look."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.latency.report import Load, Point, Report, Samples, overall
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED, Look, judged

RATIOS = {BASE: 1.0, AGAIN: 1.0, MERGED: 1.0, UNMERGED: 1.04, "adapter-h": 1.03, "adapter-l": 1.025}


def point(
    ratios: Mapping[str, float] = RATIOS,
    sets: int = 12,
    rounds: int = 40,
    spread: float = 0.004,
    load: Load = Load(1, 128),
    seed: int = 0,
    cpu: bool = False,
) -> Point:
    """Around 5 ms; sessions that differ by ``spread``, runs with a heavy tail. With ``cpu``, that clock saw the same,
    and decides.
    """
    random = np.random.default_rng(seed)
    session = random.normal(0, spread, (sets, 1, len(ratios)))
    tail = np.abs(random.standard_t(2, (sets, rounds, len(ratios)))) * spread * 3
    runs = (5e6 * np.exp(session) * (1 + tail) * list(ratios.values())).astype(int)
    opening, first = (random.integers(low, 2 * low, (sets, len(ratios))) for low in (10**8, 10**7))
    samples = Samples(runs.tolist(), opening.tolist(), first.tolist(), runs.tolist() if cpu else [])
    return judged(load, tuple(ratios), samples, Look(margin=0.01, error=0.025, clock="cpu" if cpu else "wall"))


def report(*points: Point, subject: str = "movies", **changes: object) -> Report:
    """A report of the points, of a machine that is none."""
    points = points or (point(),)
    given = {
        "subject": subject,
        "verdict": overall(points),
        "margin": 0.01,
        "points": points,
        "digests": dict.fromkeys((BASE, AGAIN, MERGED), "0" * 64) | {UNMERGED: "1" * 64},
        "left_out": {},
        "machine": {"processor": "Some Processor", "cores": "2, of which 2 may be used"},
        "before": {"load average": "0.10"},
        "after": {"load average": "1.02"},
    }
    return Report(**{**given, **changes})  # type: ignore[arg-type]
