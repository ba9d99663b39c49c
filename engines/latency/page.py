"""The report as one page for people: self-contained, so that it can be attached to a release; no request leaves it.

Marks are SVG stretched to the width there is; words are HTML beside them, so that they keep their size on a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from engines.latency import words
from engines.latency.clocks import NAMES, Clock
from engines.latency.equivalence import Ratio, paired_medians
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
class Ruler:
    """What ratios are drawn against: where the base's own time lies, where the margin begins and ends, and the axis."""

    scale: Scale
    one: float
    band: tuple[float, float]
    axis: tuple[Mark, ...]


@dataclass(frozen=True)
class RatioRow:
    """An arm's ratio to the base by one clock: the interval and its middle, and a dot for each set, in per cent of the
    width.
    """

    reading: Reading
    clock: Clock
    role: str
    low: float
    middle: float
    high: float
    dots: tuple[float, ...]
    says: str


@dataclass(frozen=True)
class TimesRow:
    """An arm's times by one clock: bars of (left, height), both in per cent; the median's place, and in ms; how many
    samples lie beyond the axis.
    """

    arm: str
    clock: Clock
    p50: float
    bars: tuple[tuple[float, float], ...]
    median: float
    beyond: int
    says: str


@dataclass(frozen=True)
class Charts:
    """All that is drawn of one load: the merged arm by the clock that decides, closely, and a row for each arm and
    clock.
    """

    point: Point
    clocks: tuple[Clock, ...]
    close: Ruler
    answer: RatioRow
    ruler: Ruler
    ratios: tuple[RatioRow, ...]
    times_axis: tuple[Mark, ...]
    times: tuple[TimesRow, ...]
    bar_width: float


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
        machine=_machine(report),
        words=words,
        names=NAMES,
    )


def _charts(point: Point, margin: float) -> Charts:
    clocks: tuple[Clock, ...] = ("wall", "cpu") if point.by_cpu else ("wall",)
    times = {clock: _times(point, clock) for clock in clocks}
    merged = [reading.arm for reading in point.readings].index(MERGED)
    close = _ruler([point.reading(MERGED, point.clock).ratio], margin)
    ruler = _ruler([reading.ratio for reading in (*point.readings, *point.by_cpu)], margin)
    times_scale, arms = _times_scale(times.values()), range(len(point.readings))
    return Charts(
        point=point,
        clocks=clocks,
        close=close,
        answer=_ratio_row(point, point.clock, times[point.clock], merged, close.scale),
        ruler=ruler,
        ratios=tuple(_ratio_row(point, clock, times[clock], arm, ruler.scale) for arm in arms[1:] for clock in clocks),
        times_axis=_marks(_ticks(times_scale), times_scale, lambda time: f"{time:.4g} ms"),
        times=tuple(_times_row(point, clock, times[clock], arm, times_scale) for arm in arms for clock in clocks),
        bar_width=100 / BINS,
    )


def _times(point: Point, clock: Clock) -> list[Array]:
    """Of each set, the times in ms by a clock, shape (rounds, arms); NaN where an arm sat a round out."""
    return [one / 1e6 for one in point.samples.times(clock)]


def _ruler(ratios: Iterable[Ratio], margin: float) -> Ruler:
    """Wide enough for the margin and every interval, with some air."""
    found = list(ratios)
    low = min(1 / (1 + margin), *(ratio.low for ratio in found))
    high = max(1 + margin, *(ratio.high for ratio in found))
    air = 0.12 * (high - low)
    scale = Scale(low - air, high + air)
    axis = _marks([1 / (1 + margin), 1 + margin, *_ticks(scale)], scale, _per_cent)
    return Ruler(scale, scale(1.0), (scale(1 / (1 + margin)), scale(1 + margin)), axis)


def _times_scale(by_clock: Iterable[list[Array]]) -> Scale:
    every = [np.concatenate(sets) for sets in by_clock]
    low = min(float(np.nanmin(times)) for times in every)
    high = max(float(np.nanquantile(times, SHOWN)) for times in every)
    return Scale(low, high if high > low else low * 1.01 + 1e-6)


def _ratio_row(point: Point, clock: Clock, times: list[Array], index: int, scale: Scale) -> RatioRow:
    reading = point.by(clock)[index]
    ratio = reading.ratio
    medians = paired_medians([one[:, index] for one in times], [one[:, 0] for one in times])
    sets = [float(np.exp(median)) for median in medians]
    says = (
        f"{reading.arm} by {NAMES[clock]}: {ratio.median:.4f} of the base's time, between {ratio.low:.4f} and"
        f" {ratio.high:.4f}: {reading.decision}"
    )
    return RatioRow(
        reading,
        clock,
        ROLES.get(reading.arm, ""),
        scale(ratio.low),
        scale(ratio.median),
        scale(ratio.high),
        tuple(map(scale, sets)),
        says,
    )


def _times_row(point: Point, clock: Clock, times: list[Array], index: int, scale: Scale) -> TimesRow:
    reading = point.by(clock)[index]
    every = np.concatenate(times)[:, index]
    every = every[~np.isnan(every)]
    counts, edges = np.histogram(every[every <= scale.high], BINS, (scale.low, scale.high))
    tallest = max(1, int(counts.max()))
    bars = tuple(
        (scale(edge), round(100 * count / tallest, 2))
        for edge, count in zip(edges.tolist(), counts.tolist(), strict=False)
        if count
    )
    beyond, median = int((every > scale.high).sum()), float(np.median(every))
    says = (
        f"{reading.arm} by {NAMES[clock]}: {len(every)} times with a median of {median:.3f} ms, {beyond} of them beyond"
        " the axis"
    )
    return TimesRow(reading.arm, clock, median, bars, scale(median), beyond, says)


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


def _machine(report: Report) -> list[tuple[str, str]]:
    changing = [
        (name, f"{value} before, {report.after.get(name, 'unknown')} after") for name, value in report.before.items()
    ]
    return [*report.machine.items(), *changing]
