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
import numpy as np

from engines.latency.clocks import Clock
from engines.latency.equivalence import Decision, Ratio
from lora.errors import LorafuseError
from lora.files.durable import flush
from lora.files.tensorfile import Array
from lora.wording import printable

SCHEMA = 2
READ = (1, 2)  # schema 1 knew no CPU time, and as many rounds in every set

Verdict = Literal["equivalent", "slower", "undecided"]
Word = Decision | Literal["not said"]  # of an arm; not said where the null control failed
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
    """Every time taken, in ns: runs of shape (sets, rounds, arms), whose rounds may be more in one set than in another;
    of each set and arm, opening the session and its first run. A run is null where its arm sat the round out.

    ``cpu`` is the calling thread's CPU time in the same runs; empty where that is not the engine's.
    """

    runs: list[list[list[Nanoseconds | None]]]
    opening: list[list[Nanoseconds]]
    first: list[list[Nanoseconds]]
    cpu: list[list[list[Nanoseconds | None]]] = field(default_factory=list)

    def times(self, clock: Clock) -> list[Array]:
        """Of each set, its runs by a clock, shape (rounds, arms); NaN where an arm sat a round out."""
        return [np.array(one, float) for one in (self.cpu if clock == "cpu" else self.runs)]

    @property
    def shape(self) -> str:
        """Sets and rounds, in words."""
        rounds = sorted({len(one) for one in self.runs})
        return f"{len(self.runs)} sets of {'–'.join(map(str, rounds[:: max(1, len(rounds) - 1)]))} rounds"


@dataclass(frozen=True)
class Reading:
    """One arm by one clock: times in ms (medians, but for ``p90`` and ``p99``), its ratios to the base, and what the
    median's ratio says.

    ``p99`` and its ratio are there where a set has rounds enough for it. ``rate`` is rows a second, at the median.
    ``opening`` and ``first`` are the wall clock's. ``ratio`` is that of the first look, after so many ``sets``, that
    decided it; of the last one where none did.
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
    decision: Word
    sets: int = 0


@dataclass(frozen=True)
class Said:
    """What one clock says by itself."""

    clock: Clock
    verdict: Verdict
    reason: str


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

    ``clock`` is what the verdict was reached by. ``readings`` are the wall clock's whatever it is, ``by_cpu`` those of
    the calling thread's CPU time, and ``said`` what each clock says. ``help`` is what would help an undecided one.
    ``instructions`` of one run are there where they were counted, by arm. ``device`` is there where the engines run on
    one: beside the readings, which are the host's times from call to answer.
    """

    load: Load
    verdict: Verdict
    reason: str
    readings: tuple[Reading, ...]
    samples: Samples
    device: tuple[DeviceTimes, ...] = ()
    clock: Clock = "wall"
    by_cpu: tuple[Reading, ...] = ()
    said: tuple[Said, ...] = ()
    help: str = ""
    instructions: dict[str, int] = field(default_factory=dict)

    def by(self, clock: Clock) -> tuple[Reading, ...]:
        """The readings of a clock: none where it was not looked at."""
        return self.by_cpu if clock == "cpu" else self.readings

    def reading(self, arm: str, clock: Clock = "wall") -> Reading:
        """The reading of an arm by a clock. Raises KeyError where there is none."""
        return {reading.arm: reading for reading in self.by(clock)}[arm]


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
        if schema not in READ:
            raise LorafuseError(
                f"{path}: schema {schema}; this lorafuse reads {' and '.join(map(str, READ))}; measure again, or read"
                " it with the lorafuse that wrote it"
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
    """Whether every arm has times in every set, and the base in every round, by each clock that was looked at."""
    samples = point.samples
    by_clock = (samples.runs, samples.cpu) if samples.cpu else (samples.runs,)
    readings = (point.readings, point.by_cpu) if samples.cpu or point.by_cpu else (point.readings,)
    times = [one for runs in by_clock for rounds in runs for one in rounds]
    return (
        all(tuple(reading.arm for reading in of) == arms for of in readings)
        and len(readings) == len(by_clock)
        and len(samples.runs) > 0
        and all(len(rounds) > 0 for rounds in samples.runs)
        and all([len(rounds) for rounds in runs] == [len(rounds) for rounds in samples.runs] for runs in by_clock)
        and len(samples.runs) == len(samples.opening) == len(samples.first)
        and all(len(one) == len(arms) for one in (*samples.opening, *samples.first))
        and all(len(one) == len(arms) for one in times)
        and all(one[0] is not None for one in times)
        and all(_every_arm_ran(rounds) for runs in by_clock for rounds in runs)
        and point.by(point.clock) != ()
    )


def _every_arm_ran(rounds: list[list[Nanoseconds | None]]) -> bool:
    return all(any(times) for times in zip(*rounds, strict=True))
