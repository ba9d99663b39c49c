"""What a measurement says, with everything it rests on. Written as JSON, and read again to be compared.

Plain data: what other modules compute, present and draw.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from engines.latency.equivalence import Decision, Ratio
from lora.errors import LorafuseError
from lora.files.durable import flush
from lora.wording import printable

SCHEMA = 1

Verdict = Literal["equivalent", "slower", "undecided"]
Nanoseconds = Annotated[int, msgspec.Meta(gt=0, lt=2**62)]


@dataclass(frozen=True)
class Load:
    """What every arm is asked to do: ``batch`` rows of ``length`` tokens, after ``past`` tokens in a decoder's cache;
    then to generate ``tokens``.
    """

    batch: int
    length: int
    past: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        past = f" after {self.past}" if self.past else ""
        generated = f", then {self.tokens} tokens generated" if self.tokens else ""
        return f"batch {self.batch}, length {self.length}{past}{generated}"


@dataclass(frozen=True)
class Samples:
    """Every time taken, in ns: runs of shape (sets, rounds, arms); of each set and arm, opening the session and its
    first run.
    """

    runs: list[list[list[Nanoseconds]]]
    opening: list[list[Nanoseconds]]
    first: list[list[Nanoseconds]]


@dataclass(frozen=True)
class Reading:
    """One arm: times in ms (medians, but for ``p90`` and ``p99``), its ratios to the base, and what the median's ratio
    says.

    ``p99`` and its ratio are there where a set has rounds enough for it. ``rate`` is rows a second, at the median.
    """

    arm: str
    p50: float
    p90: float
    p99: float | None
    opening: float
    first: float
    rate: float
    ratio: Ratio
    ratio_p90: Ratio
    ratio_p99: Ratio | None
    decision: Decision


@dataclass(frozen=True)
class DeviceTimes:
    """What a run of an arm takes on the device, by its own clock: medians in ms of the copies there, the engine, and
    the copies back.
    """

    arm: str
    copies_there: float
    engine: float
    copies_back: float


@dataclass(frozen=True)
class Point:
    """One load: the verdict on the merged arm and the reason, the readings that it rests on, and the samples that they
    rest on.

    ``device`` is there where the engines run on one: beside the readings, which are the host's times from call to
    answer.
    """

    load: Load
    verdict: Verdict
    reason: str
    readings: tuple[Reading, ...]
    samples: Samples
    device: tuple[DeviceTimes, ...] = ()

    def reading(self, arm: str) -> Reading:
        """The reading of an arm. Raises KeyError where there is none."""
        return {reading.arm: reading for reading in self.readings}[arm]


@dataclass(frozen=True)
class Report:
    """All points of one run. ``digests`` are the graphs' by arm, ``left_out`` the arms that can't be had, with the
    reason.

    ``hashes`` are the SHA-256 of the base's weights, the merged model's file and the adapter; ``seed`` is that of the
    arms' turns. ``machine`` holds what does not change while it is measured; ``before`` and ``after`` what does (load,
    clocks, temperature).
    """

    subject: str
    verdict: Verdict
    margin: float
    points: tuple[Point, ...]
    digests: dict[str, str]
    left_out: dict[str, str]
    machine: dict[str, str]
    before: dict[str, str]
    after: dict[str, str]
    hashes: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    schema: int = SCHEMA

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms' names; the base comes first."""
        return tuple(reading.arm for reading in self.points[0].readings)


def overall(points: tuple[Point, ...]) -> Verdict:
    """Slower where any point is; equivalent where all are."""
    verdicts = {point.verdict for point in points}
    return "slower" if "slower" in verdicts else "undecided" if "undecided" in verdicts else "equivalent"


def check_writable(paths: Iterable[Path]) -> None:
    """Raises LorafuseError, before a long run, where a file could not be written after it."""
    for path in paths:
        with _beside(path):
            pass


def write_report(path: Path, report: Report) -> None:
    """Write JSON, atomically. Raises LorafuseError when the file can't be written."""
    write_text(path, msgspec.json.encode(report).decode() + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, which is there in full or not at all. Raises LorafuseError when it can't be written."""
    with _beside(path) as partial:
        partial.write_text(text, encoding="utf-8")
        flush(partial)
        partial.replace(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """An empty file in the folder of ``path``, to be written and renamed; gone at the end.

    An OSError becomes a LorafuseError.
    """
    partial = None
    try:
        if path.exists() and not path.is_file():  # a folder; or a device, which would be replaced by a file
            raise OSError(errno.EINVAL, "not a file")
        partial = path.with_name(f".{path.name}.partial")
        partial.touch()
        yield partial
    except OSError as error:
        raise LorafuseError(
            f"{path}: can't be written ({error.strerror}); choose a file in a folder that exists and is yours"
        ) from error
    finally:
        if partial is not None:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def read_report(path: Path) -> Report:
    """Read what ``write_report`` wrote. Raises LorafuseError when it is something else, or of a newer schema."""
    try:
        content = path.read_bytes()
        schema = msgspec.json.decode(content, type=_Schema).schema
        if schema != SCHEMA:
            raise LorafuseError(
                f"{path}: schema {schema}; this lorafuse reads {SCHEMA}; measure again, or read it with the lorafuse"
                " that wrote it"
            )
        report = msgspec.json.decode(content, type=Report)
    except OSError as error:
        raise LorafuseError(
            f"{path}: can't be read ({error.strerror}); give a report that 'lorafuse bench --out' wrote"
        ) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        said = printable(" ".join(str(error).split()))
        raise LorafuseError(
            f"{path}: not a latency report ({said}); give one that 'lorafuse bench --out' wrote"
        ) from error
    if not report.points or not all(point.readings for point in report.points):
        raise LorafuseError(f"{path}: holds no readings; measure again with 'lorafuse bench --out'")
    if not all(_is_whole(point, report.arms) for point in report.points):
        raise LorafuseError(
            f"{path}: holds samples that do not go with its arms; measure again with 'lorafuse bench --out'"
        )
    return report


class _Schema(msgspec.Struct):
    schema: int


def _is_whole(point: Point, arms: tuple[str, ...]) -> bool:
    """Whether there is a time of every arm in every round of every set."""
    runs, opening, first = point.samples.runs, point.samples.opening, point.samples.first
    sets, rounds = len(runs), len(runs[0]) if runs else 0
    return (
        tuple(reading.arm for reading in point.readings) == arms
        and rounds > 0
        and sets == len(opening) == len(first)
        and all(len(one) == rounds for one in runs)
        and all(len(times) == len(arms) for times in (*opening, *first, *(times for one in runs for times in one)))
    )
