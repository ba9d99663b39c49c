"""Taking the samples: engines resident together, interleaved in shuffled rounds, in several sets of fresh sessions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from engines.backends import Session
from engines.latency.advice import advice
from engines.latency.clocks import ClockChoice, has_cpu_time
from engines.latency.report import Load, Point, Samples
from engines.latency.rounds import LEAST_ROUNDS, Costs, Summary, best_rounds, summary
from engines.latency.sequential import until_decided
from engines.latency.verdict import ASKED, Look, judged
from lora.collector import uncollected
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

Work = Callable[[Session], object]  # what is timed: one run, or a generation of several
Sample = tuple[int, int]  # ns, by the wall clock and of CPU time
Times = list[list[int | None]]  # ns, of shape (rounds, arms)
InTurn = tuple[int, int, Session]  # every how many rounds, which arm, and its session

# Runs of a fresh session before it is timed; fewer where so many seconds are over, one at least. What is left of
# warming up falls on all arms of a round alike, and a long run's first is hardly slower than its third.
WARMUP, WARM_SECONDS = 5, 0.1
LONG_ROUND = 0.05  # seconds: longer than a scheduler's slices


@dataclass(frozen=True)
class Arm:
    """A way to run the model: its name, and how to open a fresh session of it.

    ``asked``: what it costs is a question of its own, which keeps a run going. It is for the arms that users bring.
    ``every`` so many rounds it is timed: an arm that no verdict waits for leaves its time to the others.
    """

    name: str
    open: Callable[[], Session]
    asked: bool = False
    every: int = 1


@dataclass(frozen=True)
class Protocol:
    """How long to measure and what to decide: a budget in seconds, the margin, the seed of all chance.

    ``rounds`` in a set; None: as many as its sessions are worth. ``clock`` is what the verdict is reached by. CPU time
    is taken where the engines run ``on_thread``, the one that calls them.
    """

    budget: float = 60.0
    margin: float = 0.01
    seed: int = 0
    rounds: int | None = None
    clock: ClockChoice = "wall"
    on_thread: bool = False


@dataclass(frozen=True)
class Taken:
    """What one set of sessions gave, in ns: wall and CPU times of shape (rounds, arms), none where an arm sat a round
    out, and of each arm the opening and the first run.
    """

    times: Times
    cpu: Times
    opening: list[int]
    first: list[int]


@dataclass(frozen=True)
class Seen:
    """What a look sees: the point, and whether every question is answered."""

    point: Point
    is_decided: bool


def measure(arms: Sequence[Arm], load: Load, work: Work, protocol: Protocol, progress: Progress = unheard) -> Point:
    """Time the arms at ``work`` until the questions are decided or the budget is spent.

    The first arm is the base that all are compared with. At least ``FIRST_LOOK`` sets are measured, whatever they take.
    """
    run = _Run(arms, load, work, protocol, progress)
    seen = until_decided(run.take, run.judge, run.spent)
    return replace(seen.point, help=advice(seen.point, protocol.margin, run.seconds))


class _Run:
    """The sets of one measurement, and what the looks at them have seen."""

    def __init__(self, arms: Sequence[Arm], load: Load, work: Work, protocol: Protocol, progress: Progress) -> None:
        self._arms, self._load, self._work, self._protocol, self._progress = arms, load, work, protocol, progress
        self._random = np.random.default_rng(protocol.seed)
        self._started = time.monotonic()
        self._with_cpu = protocol.on_thread and has_cpu_time()
        self._sets: list[Taken] = []
        self._point: Point | None = None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def spent(self, sets: int) -> float:
        """The share of the budget; everything, where another set could not be fitted in."""
        budget = self._protocol.budget
        return 1.0 if self.seconds >= budget else self.seconds / budget

    def take(self, number: int) -> Taken:
        self._progress(
            f"{self._load}: set {number + 1} of sessions, {self.seconds:.0f} s of {self._protocol.budget:.0f} s"
        )
        taken = take_set(self._arms, self._work, self._protocol.rounds or self._rounds, self._random)
        self._sets.append(taken)
        return taken

    def _rounds(self, spent: float, one: float) -> int:
        """Of this set, whose sessions took ``spent`` seconds so far and whose rounds take ``one`` each, to go by the
        quickest runs of warming up: beside other work it is what the rounds before took.
        """
        if self._sets:
            one = max(one, float(np.mean([_a_round(taken.times) for taken in self._sets])))
        left = self._protocol.budget - self.seconds
        rounds = best_rounds(self._summaries(), Costs(spent, one), self._protocol.budget)
        return max(LEAST_ROUNDS, min(rounds, int(left / one)))

    def _summaries(self) -> list[Summary]:
        """By the clock that decides, of the arms that are asked about."""
        by_cpu = self._with_cpu and (self._point.clock if self._point else self._protocol.clock) == "cpu"
        asked = [index for index, arm in enumerate(self._arms) if arm.name in ASKED or arm.asked]
        return [summary(_logs(taken.cpu if by_cpu else taken.times)[:, asked]) for taken in self._sets]

    def judge(self, sets: Sequence[Taken], error: float, share: float) -> Seen:
        look = Look(self._protocol.margin, error, self._protocol.clock, share, self._point)
        point = judged(self._load, [arm.name for arm in self._arms], _samples(sets, self._with_cpu), look)
        self._point = point
        asked = {arm.name for arm in self._arms if arm.asked}
        words = {reading.decision for reading in point.by(point.clock) if reading.arm in asked}
        return Seen(point, point.verdict != "undecided" and "inconclusive" not in words)


def _a_round(times: Times) -> float:
    """What a round takes in the mean, in seconds."""
    return float(np.nansum(np.array(times, float))) / len(times) / 1e9


def _logs(times: Times) -> Array:
    """The rounds' log-ratios to the base, shape (rounds, arms)."""
    logs = np.log(np.array(times, float))
    beside: Array = logs - logs[:, :1]
    return beside


def take_set(
    arms: Sequence[Arm], work: Work, rounds: int | Callable[[float, float], int], random: np.random.Generator
) -> Taken:
    """One fresh session per arm, opened in shuffled order, warmed up, and timed in rounds of shuffled order.

    Which session is opened first shows in its times, for as long as it lives. Turning one order round would leave the
    same arm at its ends, set after set.
    """
    creation = random.permutation(len(arms)).tolist()
    began, opening, warming = time.monotonic(), [0] * len(arms), [[0]] * len(arms)
    with ExitStack() as stack:
        sessions: dict[int, Session] = {}
        for index in creation:
            start = time.perf_counter_ns()
            sessions[index] = stack.enter_context(arms[index].open())
            opening[index] = time.perf_counter_ns() - start
        for index in creation:
            warming[index] = _warm_up(work, sessions[index])
        quickest = sum(min(times) for times in warming) / 1e9  # seconds of a round
        if not isinstance(rounds, int):
            rounds = rounds(time.monotonic() - began, quickest)
        turns = [(arms[index].every, index, session) for index, session in sessions.items()]
        taken = _measure_rounds(_orders(turns, rounds, quickest >= LONG_ROUND, random), work)
    times, cpu = ([[sample and sample[clock] for sample in one] for one in taken] for clock in (0, 1))
    return Taken(times, cpu, opening, [times[0] for times in warming])


def _warm_up(work: Work, session: Session) -> list[int]:
    times = [timed(work, session)]
    while len(times) < WARMUP and sum(times) < WARM_SECONDS * 1e9:
        times.append(timed(work, session))
    return times


def _orders(turns: list[InTurn], rounds: int, is_long: bool, random: np.random.Generator) -> list[list[InTurn]]:
    """The order of the arms in each round of a set.

    Long rounds all have the same, so that two arms are always equally far apart: what disturbs runs lasts for some of
    them, and evenly spaced differences cancel more of it. Short ones might keep step with the scheduler's slices.
    """
    drawn = [random.permutation(len(turns)).tolist() for _ in range(1 if is_long else rounds)]
    return [[turns[place] for place in drawn[number % len(drawn)]] for number in range(rounds)]


def _measure_rounds(orders: Sequence[Sequence[InTurn]], work: Work) -> list[list[Sample | None]]:
    """Without the garbage collector, which would take its time from whichever arm it meets."""
    gc.collect()
    with uncollected():
        return [_measure_round(order, work, number) for number, order in enumerate(orders)]


def _measure_round(order: Sequence[InTurn], work: Work, number: int) -> list[Sample | None]:
    samples: list[Sample | None] = [None] * len(order)
    for every, index, session in order:
        if number % every == 0:
            samples[index] = timed_by_both(work, session)
    return samples


def timed(work: Work, session: Session) -> int:
    """One sample by the wall clock, in ns."""
    start = time.perf_counter_ns()
    work(session)
    return time.perf_counter_ns() - start


def timed_by_both(work: Work, session: Session) -> Sample:
    """One sample by the wall clock and by this thread's CPU time, in ns.

    Reading the latter enters the kernel, so it is done outside of what the wall clock sees.
    """
    began = time.thread_time_ns()
    wall = timed(work, session)
    return wall, max(1, time.thread_time_ns() - began)


def _samples(sets: Sequence[Taken], with_cpu: bool) -> Samples:
    return Samples(
        [one.times for one in sets],
        [one.opening for one in sets],
        [one.first for one in sets],
        [one.cpu for one in sets] if with_cpu else [],
    )
