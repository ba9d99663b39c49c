"""A task's engine as a service: how long requests take when clients wait for each answer, and when they come by chance.

*Closed loop*: so many clients, each of which asks again as soon as it has its answer. It finds the most that the engine
can do, and can't see queues: a slow answer delays the requests that would have waited for it.

*Open loop*: requests arrive at a rate, as a Poisson process, whether or not there are answers, and a request's time
counts from when it arrived, not from when a worker took it up (Tene's "coordinated omission").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from threading import Lock

import numpy as np

from engines.backends import Session
from engines.latency.harness import WARMUP, Arm, Work
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
MOST_REQUESTS = 10_000_000  # of an arm: every one's time is kept
SLICES = 4  # arms take turns, so that what the machine does meanwhile meets all of them


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
    """One arm under traffic: the requests answered, how many a second, and percentiles of their times in ms."""

    arm: str
    requests: int
    rate: float
    percentiles: dict[str, float]


def serve(arms: Sequence[Arm], work: Work, traffic: Traffic, progress: Progress = unheard) -> list[Service]:
    """Put each arm under the same traffic, in turns, for ``traffic.seconds`` each in all.

    Raises EngineError where that is too many requests.
    """
    if traffic.rate is not None and traffic.rate * traffic.seconds > MOST_REQUESTS:
        raise EngineError(
            f"{traffic.rate:g} requests a second for {traffic.seconds:g} s are more than {MOST_REQUESTS:,}; choose a"
            " lower rate or fewer seconds"
        )
    times: dict[str, list[Array]] = {arm.name: [] for arm in arms}
    busy = dict.fromkeys(times, 0.0)
    with ExitStack() as stack:
        sessions = {arm.name: stack.enter_context(arm.open()) for arm in arms}
        for session in sessions.values():
            for _ in range(WARMUP):
                work(session)
        for turn in range(SLICES):
            for name, session in sessions.items():
                progress(f"{name}, {turn + 1} of {SLICES}")
                taken, seconds = _slice(session, work, traffic, turn)
                times[name].append(taken)
                busy[name] += seconds
    return [_service(name, np.concatenate(taken), busy[name]) for name, taken in times.items()]


def _slice(session: Session, work: Work, traffic: Traffic, turn: int) -> tuple[Array, float]:
    """The requests' times in s, and how long answering all of them took."""
    seconds = traffic.seconds / SLICES
    if traffic.rate is None:
        return _in_threads(traffic.workers, lambda: _closed(session, work, seconds))
    arrivals = poisson(traffic.rate, seconds, np.random.default_rng((traffic.seed, turn)))
    queue, start = _Queue(arrivals), time.perf_counter()
    return _in_threads(traffic.workers, lambda: _open(session, work, queue, start))


def poisson(rate: float, seconds: float, random: np.random.Generator) -> Array:
    """When requests arrive, in s from the start: at ``rate`` a second, independently of one another.

    At least one does.
    """
    gaps = random.exponential(1 / rate, int(rate * seconds + 6 * (rate * seconds) ** 0.5 + 10))
    arrivals: Array = np.cumsum(gaps)
    return arrivals[: max(1, int(np.searchsorted(arrivals, seconds)))]


def _closed(session: Session, work: Work, seconds: float) -> list[float]:
    times: list[float] = []
    start = time.perf_counter()
    end = start + seconds
    while not times or start < end:
        work(session)
        done = time.perf_counter()
        times.append(done - start)
        start = done
    return times


class _Queue:
    """Arrivals, each of which one worker takes."""

    def __init__(self, arrivals: Array) -> None:
        self._arrivals = arrivals.tolist()
        self._next = count()
        self._lock = Lock()

    def __iter__(self) -> Iterator[float]:
        while True:
            with self._lock:
                index = next(self._next)
            if index >= len(self._arrivals):
                return
            yield self._arrivals[index]


def _open(session: Session, work: Work, queue: _Queue, start: float) -> list[float]:
    times: list[float] = []
    for arrival in queue:
        wait = start + arrival - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        work(session)
        times.append(time.perf_counter() - start - arrival)
    return times


def _in_threads(workers: int, serve: Callable[[], list[float]]) -> tuple[Array, float]:
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        taken = [future.result() for future in [pool.submit(serve) for _ in range(workers)]]
    return np.concatenate(taken), time.perf_counter() - start


def _service(arm: str, seconds: Array, busy: float) -> Service:
    percentiles = {f"p{percentile:g}": float(np.percentile(seconds, percentile)) * 1e3 for percentile in PERCENTILES}
    return Service(arm, len(seconds), len(seconds) / busy, percentiles)
