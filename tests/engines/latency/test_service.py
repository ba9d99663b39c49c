"""An engine under traffic: sessions that take a chosen time, so that what clients must see is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.backends import Session
from engines.latency.harness import WARMUP, Arm
from engines.latency.service import MOST_REQUESTS, SLICES, Service, Traffic, _slice, poisson, serve
from lora.errors import EngineError
from lora.files.tensorfile import Array


@dataclass
class Sleeping:
    """A session whose every run sleeps; the run numbered in ``stalls`` takes that long instead.

    It counts runs, from many threads.
    """

    seconds: float = 0.0
    stalls: Mapping[int, float] = field(default_factory=dict)
    fails_at: int | None = None
    runs: int = 0
    closed: bool = False
    sleep: Callable[[float], None] = time.sleep
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self.lock:
            number = self.runs
            self.runs += 1
        if number == self.fails_at:
            raise EngineError("the engine broke")
        seconds = self.stalls.get(number, self.seconds)
        if seconds:
            self.sleep(seconds)
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed = True


@dataclass
class Clock:
    """A clock of which one thread can say what time it is, since only that thread's sleeping moves it."""

    now: float = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("engines.latency.service.time", made)
    return made


def run(session: Session) -> object:
    return session.run({})


def served(session: Sleeping, traffic: Traffic) -> Service:
    (service,) = serve([Arm("base", lambda: session)], run, traffic)
    return service


def times_of(session: Sleeping, traffic: Traffic) -> Array:
    """The times in s of one slice."""
    return _slice(session, run, traffic, 0)[0]


def test_a_waiting_client_asks_as_often_as_it_is_answered(clock: Clock):
    """50 ms a slice: requests of 20 ms begin at 0, 20 and 40 ms."""
    service = served(Sleeping(0.02, sleep=clock.sleep), Traffic(None, 1, 0.05 * SLICES))
    assert service.requests == 3 * SLICES
    assert service.rate == pytest.approx(50)
    assert service.percentiles == pytest.approx({"p50": 20, "p90": 20, "p99": 20, "p99.9": 20})


def test_a_waiting_client_asks_once_on_no_time(clock: Clock):
    assert served(Sleeping(0.02, sleep=clock.sleep), Traffic(None, 1, 0)).requests == SLICES


def test_percentiles_are_in_milliseconds_and_of_all_slices(clock: Clock):
    """A hundred requests in each of two slices; those of the other two take three times as long."""
    stalls = dict.fromkeys(range(WARMUP + 200, WARMUP + 500), 0.003)
    percentiles = served(Sleeping(0.001, stalls, sleep=clock.sleep), Traffic(None, 1, 0.0995 * SLICES)).percentiles
    assert percentiles == pytest.approx({"p50": 1, "p90": 3, "p99": 3, "p99.9": 3})


def test_more_clients_are_answered_side_by_side():
    one, four = (served(Sleeping(0.02), Traffic(None, workers, 0.5)) for workers in (1, 4))
    assert one.requests * 1.5 < four.requests <= 4 * (25 + SLICES)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_request_longer_than_the_time_is_answered_once_a_client_and_slice(workers: int):
    session = Sleeping(0.03)
    service = served(session, Traffic(None, workers, 0.004))
    assert service.requests == workers * SLICES == session.runs - WARMUP
    assert service.rate < workers / 0.03


def late(times: Array) -> int:
    """Requests that took longer than 100 ms."""
    return int((times > 0.1).sum())


def test_a_stall_of_200_ms_is_met_by_one_waiting_client_and_by_everyone_who_comes_meanwhile(clock: Clock):
    """At 100 requests a second 20 come in it, of which half wait for longer than 100 ms: what a closed loop omits."""
    closed = times_of(Sleeping(0.001, {50: 0.2}, sleep=clock.sleep), Traffic(None, 1, 4.0))
    assert (late(closed), closed.max()) == (1, pytest.approx(0.2))
    opened = times_of(Sleeping(0.001, {50: 0.2}, sleep=clock.sleep), Traffic(100, 1, 4.0))
    arrivals = poisson(100, 4.0 / SLICES, np.random.default_rng((0, 0)))
    began = arrivals[50] + opened[50] - 0.2
    meanwhile = (arrivals > began) & (arrivals < began + 0.2)
    assert 10 <= meanwhile.sum() <= 32
    assert (opened[meanwhile] >= began + 0.2 - arrivals[meanwhile]).all()
    assert late(opened) >= ((arrivals > began) & (arrivals < began + 0.1)).sum() >= 4


def test_a_request_that_finds_a_free_worker_takes_what_the_engine_takes(clock: Clock):
    times = times_of(Sleeping(1e-6, sleep=clock.sleep), Traffic(10, 1, 20))
    assert times == pytest.approx(np.full(len(times), 1e-6), rel=1e-3)


def test_at_more_than_it_can_answer_times_grow_without_end(clock: Clock):
    """Five times as much as a session of 10 ms can answer: the n-th is answered 10 n ms after the first came."""
    times = times_of(Sleeping(0.01, sleep=clock.sleep), Traffic(500, 1, 0.8))
    arrivals = poisson(500, 0.8 / SLICES, np.random.default_rng((0, 0)))
    assert len(times) == len(arrivals) > 50
    assert times + arrivals == pytest.approx(arrivals[0] + 0.01 * np.arange(1, len(times) + 1))
    assert served(Sleeping(0.01, sleep=clock.sleep), Traffic(500, 1, 0.8)).rate == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_arrival_is_answered_once_by_one_of_the_workers(workers: int):
    traffic, session = Traffic(300, workers, 0.8, seed=1), Sleeping(0.001)
    expected = sum(len(poisson(300, 0.8 / SLICES, np.random.default_rng((1, turn)))) for turn in range(SLICES))
    assert served(session, traffic).requests == expected == session.runs - WARMUP


def test_workers_answer_at_the_same_time():
    """A stall of one leaves the others at work."""
    few, many = (late(times_of(Sleeping(0, {3: 0.4}), Traffic(100, workers, 4.0))) for workers in (8, 1))
    assert few < many


def test_no_request_is_answered_before_it_arrives():
    session, traffic = Sleeping(), Traffic(50, 4, 1.6, seed=2)
    times, seconds = _slice(session, run, traffic, 0)
    assert times.min() > 0
    assert seconds >= poisson(50, 0.4, np.random.default_rng((2, 0)))[-1]


def test_every_arm_is_under_the_same_traffic_in_turns():
    steps: list[str] = []
    base, merged = Sleeping(), Sleeping()
    services = serve(
        [Arm("base", lambda: base), Arm("merged", lambda: merged)], run, Traffic(100, 2, 0.4), steps.append
    )
    assert [service.arm for service in services] == ["base", "merged"]
    assert services[0].requests == services[1].requests == base.runs - WARMUP == merged.runs - WARMUP
    assert steps == [f"{arm}, {turn} of {SLICES}" for turn in range(1, SLICES + 1) for arm in ("base", "merged")]
    assert base.closed
    assert merged.closed


@pytest.mark.parametrize("rate", [None, 200.0])
@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_worker_raises_surfaces_and_closes_every_session(rate: float | None, workers: int):
    session, other = Sleeping(0.001, fails_at=WARMUP + 3), Sleeping(0.001)
    with pytest.raises(EngineError, match=r"\Athe engine broke\Z"):
        serve([Arm("base", lambda: other), Arm("merged", lambda: session)], run, Traffic(rate, workers, 0.4))
    assert session.closed
    assert other.closed


def test_more_requests_than_times_can_be_kept_of_are_refused_before_anything_is_opened():
    def fail() -> Session:
        raise AssertionError

    with pytest.raises(
        EngineError,
        match=r"^1e\+06 requests a second for 1e\+06 s are more than 10,000,000; choose a lower rate or fewer seconds$",
    ):
        serve([Arm("base", fail)], run, Traffic(1e6, 1, 1e6))
    assert len(poisson(1e6, MOST_REQUESTS / 1e6, np.random.default_rng(0))) == pytest.approx(MOST_REQUESTS, rel=0.01)


def test_requests_come_independently_at_the_rate():
    """The gaps of a Poisson process: exponential, with a spread as large as their mean."""
    arrivals = poisson(40, 2000, np.random.default_rng(0))
    gaps = np.diff(arrivals, prepend=0)
    assert len(arrivals) == pytest.approx(80_000, rel=0.02)  # 5.6 standard deviations
    assert gaps.mean() == pytest.approx(1 / 40, rel=0.02)
    assert gaps.std() == pytest.approx(1 / 40, rel=0.03)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.02


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(1e-3, 1e3), seconds=st.floats(1e-3, 10), seed=st.integers(0, 2**31))
def test_at_least_one_request_comes_and_none_later_than_asked_for(rate: float, seconds: float, seed: int):
    draw: Callable[[int], Array] = lambda seed: poisson(rate, seconds, np.random.default_rng(seed))  # noqa: E731
    arrivals = draw(seed)
    assert len(arrivals) >= 1
    assert (np.diff(arrivals) >= 0).all()
    assert len(arrivals) == 1 or arrivals[-1] < seconds
    np.testing.assert_array_equal(arrivals, draw(seed))
    assert draw(seed + 1)[0] != arrivals[0]
