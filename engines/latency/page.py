"""The report as one page for people: self-contained, so that it can be attached to a release; no request leaves it.

Marks are SVG stretched to the width there is; words are HTML beside them, so that they keep their size on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.latency.report import Point, Reading, Report
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from lora.files.tensorfile import Array

BINS = 60
SHOWN = 0.995  # of all times: a long tail would squash the rest
ROLES = {
    BASE: "what all are compared with",
    AGAIN: "null control",
    MERGED: "the question",
    UNMERGED: "positive control",
}


@dataclass(frozen=True)
class Scale:
    """From a value to a share of the width in per cent."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """A value beyond an end lies on it."""
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 3)


@dataclass(frozen=True)
class Mark:
    """A place on an axis, in per cent of its width, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class RatioRow:
    """An arm's ratio to the base: the interval and its middle, and a dot for each set, in per cent of the width."""

    reading: Reading
    role: str
    low: float
    middle: float
    high: float
    dots: tuple[float, ...]
    says: str


@dataclass(frozen=True)
class TimesRow:
    """An arm's times: bars of (left, height), both in per cent; the median's place; how many samples lie beyond the
    axis.
    """

    arm: str
    bars: tuple[tuple[float, float], ...]
    median: float
    beyond: int
    says: str


@dataclass(frozen=True)
class Charts:
    """All that is drawn of one load; ``one`` is where the base's own time lies, ``band`` where the margin begins and
    ends.
    """

    point: Point
    one: float
    band: tuple[float, float]
    ratio_axis: tuple[Mark, ...]
    ratios: tuple[RatioRow, ...]
    times_axis: tuple[Mark, ...]
    times: tuple[TimesRow, ...]
    bar_width: float
    sets: int
    rounds: int


def page(report: Report) -> str:
    """The report as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("engines.latency", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        report=report,
        charts=[_charts(point, report.margin) for point in report.points],
        graph=_graph(report.digests),
        machine=_machine(report),
        roles=ROLES,
    )


def _charts(point: Point, margin: float) -> Charts:
    runs = np.array(point.samples.runs, float)
    scale, times_scale = _ratio_scale(point, margin), _times_scale(runs)
    return Charts(
        point=point,
        one=scale(1.0),
        band=(scale(1 / (1 + margin)), scale(1 + margin)),
        ratio_axis=_marks([1 / (1 + margin), 1 + margin, *_ticks(scale)], scale, _per_cent),
        ratios=tuple(_ratio_row(point, runs, index, scale) for index in range(1, runs.shape[2])),
        times_axis=_marks(_ticks(times_scale), times_scale, lambda time: f"{time:.4g} ms"),
        times=tuple(
            _times_row(reading.arm, runs[:, :, index], times_scale) for index, reading in enumerate(point.readings)
        ),
        bar_width=100 / BINS,
        sets=runs.shape[0],
        rounds=runs.shape[1],
    )


def _ratio_scale(point: Point, margin: float) -> Scale:
    """Wide enough for the margin and every interval, with some air."""
    lows, highs = ([getattr(reading.ratio, end) for reading in point.readings] for end in ("low", "high"))
    low, high = min(1 / (1 + margin), *lows), max(1 + margin, *highs)
    air = 0.12 * (high - low)
    return Scale(low - air, high + air)


def _times_scale(runs: Array) -> Scale:
    low, high = float(runs.min()) / 1e6, float(np.quantile(runs, SHOWN)) / 1e6
    return Scale(low, high if high > low else low * 1.01 + 1e-6)


def _ratio_row(point: Point, runs: Array, index: int, scale: Scale) -> RatioRow:
    reading = point.readings[index]
    ratio = reading.ratio
    sets = np.exp(np.median(np.log(runs[:, :, index] / runs[:, :, 0]), axis=1))
    says = (
        f"{reading.arm}: {ratio.median:.4f} of the base's time, between {ratio.low:.4f} and {ratio.high:.4f}:"
        f" {reading.decision}"
    )
    places = tuple(scale(one) for one in sets.tolist())
    return RatioRow(
        reading, ROLES.get(reading.arm, ""), scale(ratio.low), scale(ratio.median), scale(ratio.high), places, says
    )


def _times_row(arm: str, times: Array, scale: Scale) -> TimesRow:
    milliseconds = times.ravel() / 1e6
    counts, edges = np.histogram(milliseconds[milliseconds <= scale.high], BINS, (scale.low, scale.high))
    tallest = max(1, int(counts.max()))
    bars = tuple(
        (scale(edge), round(100 * count / tallest, 2))
        for edge, count in zip(edges.tolist(), counts.tolist(), strict=False)
        if count
    )
    beyond, median = int((milliseconds > scale.high).sum()), float(np.median(milliseconds))
    says = f"{arm}: {len(milliseconds)} times with a median of {median:.3f} ms, {beyond} of them beyond the axis"
    return TimesRow(arm, bars, scale(median), beyond, says)


def _ticks(scale: Scale) -> list[float]:
    """Three or four round numbers within the scale."""
    span = scale.high - scale.low
    step = 10.0 ** np.floor(np.log10(span / 2))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 4)
    return [
        float(round(number * step, 12))
        for number in range(int(np.ceil(scale.low / step)), int(np.floor(scale.high / step)) + 1)
    ]


def _marks(values: Sequence[float], scale: Scale, label: Callable[[float], str]) -> tuple[Mark, ...]:
    """The values that have room, the earlier ones first: no two labels closer than a phone can set them apart."""
    marks: list[Mark] = []
    for value in values:
        at = scale(value)
        if 3 <= at <= 97 and all(abs(at - other.at) >= 17 for other in marks):
            marks.append(Mark(at, label(value)))
    return tuple(sorted(marks, key=lambda mark: mark.at))


def _per_cent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.3g} %".replace("-", "−") if ratio != 1 else "base"


def _graph(digests: dict[str, str]) -> str:
    """What the digests prove, in words."""
    if MERGED not in digests or BASE not in digests:
        return "The graphs of base and merged were not compared."
    if digests[MERGED] == digests[BASE]:
        return (
            "Merged and unadapted graph are the same: the same nodes, edges and shapes, by their digest. Only weights"
            " differ."
        )
    return (
        "MERGED AND UNADAPTED GRAPH DIFFER: they do not compute the same nodes, and this is no proof that merging costs"
        " nothing."
    )


def _machine(report: Report) -> list[tuple[str, str]]:
    changing = [
        (name, f"{value} before, {report.after.get(name, 'unknown')} after") for name, value in report.before.items()
    ]
    return [*report.machine.items(), *changing]
