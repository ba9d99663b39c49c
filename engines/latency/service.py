"""A task's engine as a service: how long requests take when clients wait for each answer, and when they come by chance.

*Closed loop*: so many clients, each of which asks again as soon as it has its answer. It finds the most that the engine
can do, and can't see queues: a slow answer delays the requests that would have waited for it.

*Open loop*: requests arrive at a rate, as a Poisson process, whether or not there are answers, and a request's time
counts from when it arrived, not from when a worker took it up (Tene's "coordinated omission").

Arms take turns. Each has a clock of its own, which stands still while it is another's turn, and a queue that waits for
it meanwhile: its slices are parts of one run, as if nothing had come between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock

import numpy as np

from engines.backends import Session
from engines.latency.equivalence import Ratio, signed_rank
from engines.latency.harness import WARMUP, Arm, Work
from engines.latency.sequential import ERROR
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
BEYOND = 10  # requests that took longer than a percentile, or it is not told: one of seven has no thousandth
MOST_REQUESTS = 10_000_000  # of an arm: every one's time is kept
SLICES = 8  # turns of an arm: what the machine does meanwhile meets all arms, and an interval has eight observations
OVERTIME = 0.1  # of the seconds, in which a queue that is left may be answered

# An overloaded service: its queue grows all the time, holds this share of all that came at the end, and is longer than
# its workers could have answered at their usual pace.
LEFT, USUAL, BUSY = 0.05, 0.95, 0.95


@dataclass(frozen=True)
class Traffic:
    """How requests come: ``rate`` a second by chance to so many workers; None: from so many clients that wait for their
    answers.
    """

    rate: float | None
    workers: int
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Service:
    """One arm under traffic: the requests that came and that were answered, how many a second in so many ``seconds``,
    and percentiles of their times in ms, as far as the requests carry them.

    ``queues`` are the requests that waited at the end of each slice, and were carried over to the next; ``waiting``
    those left at the end of all, which count in the percentiles with the time that they had waited. ``ratio`` is the
    median time beside the first arm's. An ``overloaded`` service has neither percentiles nor a ratio, for they would
    say how long it was measured.
    """

    arm: str
    arrived: int
    requests: int
    rate: float
    seconds: float
    percentiles: dict[str, float]
    queues: tuple[int, ...] = ()
    waiting: int = 0
    overloaded: bool = False
    ratio: Ratio | None = None


def serve(arms: Sequence[Arm], work: Work, traffic: Traffic, progress: Progress = unheard) -> list[Service]:
    """Put each arm under the same traffic, in turns, for ``traffic.seconds`` each in all.

    Raises EngineError where that is too many requests.
    """
    if traffic.rate is not None and traffic.rate * traffic.seconds > MOST_REQUESTS:
        raise EngineError(
            f"{traffic.rate:g} requests a second for {traffic.seconds:g} s are more than {MOST_REQUESTS:,}; choose a"
            " lower rate or fewer seconds"
        )
    random = np.random.default_rng((traffic.seed, 1))
    with ExitStack() as stack:
        runs = [_Run(arm.name, stack.enter_context(arm.open()), work, traffic) for arm in arms]
        for run in runs:
            run.warm_up()
        for turn in range(SLICES):
            for index in random.permutation(len(runs)).tolist():
                progress(f"{runs[index].name}, {turn + 1} of {SLICES}")
                runs[index].take_turn()
        for run in runs:
            run.finish()
    return [run.service(beside=runs[0]) for run in runs]


def poisson(rate: float, seconds: float, random: np.random.Generator) -> Array:
    """When requests arrive, in s from the start: at ``rate`` a second, independently of one another.

    At least one does.
    """
    gaps = random.exponential(1 / rate, int(rate * seconds + 6 * (rate * seconds) ** 0.5 + 10))
    arrivals: Array = np.cumsum(gaps)
    return arrivals[: max(1, int(np.searchsorted(arrivals, seconds)))]


@dataclass(frozen=True)
class Answered:
    """A request: how long it took from its arrival, and how long its answer took to be made, in s."""

    took: float
    work: float


class _Run:
    """An arm's run: its clock, its queue, and what was answered in each slice."""

    def __init__(self, name: str, session: Session, work: Work, traffic: Traffic) -> None:
        self.name = name
        self._session, self._work, self._traffic = session, work, traffic
        self._queue = _Queue(_arrivals(traffic))
        self._elapsed = 0.0
        self._slices: list[list[Answered]] = []
        self._late: list[Answered] = []
        self._queues: list[int] = []
        self.overloaded = False

    def warm_up(self) -> None:
        for _ in range(WARMUP):
            self._work(self._session)

    def take_turn(self) -> None:
        """The next slice: what overran the one before is taken from it."""
        end = self._traffic.seconds * (len(self._slices) + 1) / SLICES
        self._slices.append(self._until(end))
        self._queues.append(self._queue.waiting(self._elapsed))

    def finish(self) -> None:
        """Answer the queue that is left, within the overtime; one that is overloaded would only go on so."""
        self.overloaded = self._is_overloaded()
        if self._traffic.rate is not None and not self.overloaded:
            self._late = self._until(self._traffic.seconds * (1 + OVERTIME))

    def _is_overloaded(self) -> bool:
        """Whether more came than could be answered, and not only for a while: a stall leaves a queue too."""
        made = sorted(one.work for one in self._answered)
        usual = made[: max(1, min(len(made) - 1, int(USUAL * len(made))))]  # without those that stalled
        if self._traffic.rate is None or not usual:
            return False
        busy = self._traffic.rate * float(np.mean(usual)) / self._traffic.workers
        quarter, half, end = (self._queues[int(SLICES * share) - 1] for share in (0.25, 0.5, 1.0))
        left = max(self._traffic.workers, LEFT * len(self._queue))
        return busy >= BUSY and end > left and half >= end / 4 and quarter >= end / 16

    def service(self, beside: _Run) -> Service:
        waiting = self._queue.left(self._elapsed)
        times = [one.took for one in self._answered] + waiting
        return Service(
            arm=self.name,
            arrived=len(self._queue) or len(times),
            requests=len(self._answered),
            rate=len(self._answered) / self._elapsed,
            seconds=self._elapsed,
            percentiles={} if self.overloaded else carried(np.array(times)),
            queues=tuple(self._queues) if self._traffic.rate is not None else (),
            waiting=len(waiting),
            overloaded=self.overloaded,
            ratio=None if beside is self or self.overloaded or beside.overloaded else self._ratio(beside),
        )

    @property
    def _answered(self) -> list[Answered]:
        return [one for taken in (*self._slices, self._late) for one in taken]

    def _ratio(self, beside: _Run) -> Ratio | None:
        """Of median times, with an interval over the slices; none where too few have requests."""
        pairs = [(own, base) for own, base in zip(self._slices, beside._slices, strict=True) if own and base]
        if 0.5 ** len(pairs) > ERROR:
            return None
        medians = [[float(np.median([one.took for one in slice_])) for slice_ in pair] for pair in pairs]
        return signed_rank(np.array([np.log(own / base) for own, base in medians]), ERROR)

    def _until(self, end: float) -> list[Answered]:
        """Answer what comes until the arm's clock shows ``end``. A request that is begun then is finished."""
        if self._elapsed >= end:
            return []
        origin = time.perf_counter() - self._elapsed
        loop = self._closed if self._traffic.rate is None else self._open
        answered = _in_threads(self._traffic.workers, lambda: loop(origin, end))
        now = time.perf_counter() - origin
        self._elapsed = now if self._traffic.rate is None else self._idle_until(now, end)
        return answered

    def _idle_until(self, now: float, end: float) -> float:
        """What nothing comes in need not be waited for; overtime ends with the last answer."""
        return max(now, min(end, self._traffic.seconds))

    def _closed(self, origin: float, end: float) -> list[Answered]:
        answered: list[Answered] = []
        start = time.perf_counter() - origin
        while start < end or not (answered or self._slices):  # once, on no time
            self._work(self._session)
            done = time.perf_counter() - origin
            answered.append(Answered(done - start, done - start))
            start = done
        return answered

    def _open(self, origin: float, end: float) -> list[Answered]:
        answered: list[Answered] = []
        while time.perf_counter() - origin < end:
            arrival = self._queue.take(end)
            if arrival is None:
                break
            wait = origin + arrival - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            begun = time.perf_counter() - origin
            self._work(self._session)
            done = time.perf_counter() - origin
            answered.append(Answered(done - arrival, done - begun))
        return answered


class _Queue:
    """Arrivals, each of which one worker takes."""

    def __init__(self, arrivals: Array) -> None:
        self._arrivals: list[float] = arrivals.tolist()
        self._taken = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._arrivals)

    def take(self, end: float) -> float | None:
        """When the next request arrives; None where none does before ``end``."""
        with self._lock:
            if self._taken == len(self._arrivals) or self._arrivals[self._taken] >= end:
                return None
            self._taken += 1
            return self._arrivals[self._taken - 1]

    def waiting(self, now: float) -> int:
        """How many have come by now, and were not taken."""
        return len(self.left(now))

    def left(self, now: float) -> list[float]:
        """How long each of those has waited so far."""
        return [now - arrival for arrival in self._arrivals[self._taken :] if arrival <= now]


def carried(times: Array) -> dict[str, float]:
    """The percentiles in ms of times in s, but for those with fewer than ``BEYOND`` requests beyond them."""
    return {
        f"p{percentile:g}": float(np.percentile(times, percentile)) * 1e3
        for percentile in PERCENTILES
        if len(times) * (100 - percentile) > 100 * BEYOND - 1e-6  # 100 - 99.9 is a little less than 0.1
    }


def _arrivals(traffic: Traffic) -> Array:
    if traffic.rate is None:
        return np.zeros(0)
    return poisson(traffic.rate, traffic.seconds, np.random.default_rng(traffic.seed))


def _in_threads(workers: int, serve: Callable[[], list[Answered]]) -> list[Answered]:
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(serve) for _ in range(workers)]
        return [one for future in futures for one in future.result()]
