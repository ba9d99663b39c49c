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
from engines.latency.service import BEYOND, MOST_REQUESTS, OVERTIME, SLICES, Service, Traffic, carried, poisson, serve
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


def arrivals_of(traffic: Traffic) -> Array:
    assert traffic.rate is not None
    return poisson(traffic.rate, traffic.seconds, np.random.default_rng(traffic.seed))


def simulated(arrivals: Array, seconds: float, stalls: Mapping[int, float] | None = None) -> Array:
    """A queue with one server, by Lindley's recursion: the time in s of each request, from arrival to answer."""
    free, times = 0.0, []
    for number, arrival in enumerate(arrivals.tolist()):
        free = max(free, arrival) + (stalls or {}).get(number, seconds)
        times.append(free - arrival)
    return np.array(times)


def test_a_waiting_client_asks_as_often_as_it_is_answered(clock: Clock):
    """Requests of 20 ms: 50 a second, whatever the slices are."""
    service = served(Sleeping(0.02, sleep=clock.sleep), Traffic(None, 1, 2.0))
    assert service.requests == pytest.approx(100, abs=1)
    assert service.rate == pytest.approx(50)
    assert service.percentiles == pytest.approx({"p50": 20, "p90": 20})
    assert (service.queues, service.waiting, service.overloaded) == ((), 0, False)


def test_a_waiting_client_that_overruns_a_slice_has_less_of_the_next(clock: Clock):
    """Requests of 0.7 s in slices of half a second: six take 4.2 s, within a tenth of twelve would not be eight."""
    service = served(Sleeping(0.7, sleep=clock.sleep), Traffic(None, 1, 0.5 * SLICES))
    assert service.requests == 6
    assert service.seconds == pytest.approx(4.2)


def test_percentiles_are_in_milliseconds_and_of_all_slices(clock: Clock):
    """The first 300 of 400 requests take 1 ms, and the others three times as long."""
    stalls = dict.fromkeys(range(WARMUP + 300, WARMUP + 1000), 0.003)
    percentiles = served(Sleeping(0.001, stalls, sleep=clock.sleep), Traffic(None, 1, 0.6)).percentiles
    assert percentiles == pytest.approx({"p50": 1, "p90": 3})


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        (2 * BEYOND - 1, []),
        (2 * BEYOND, ["p50"]),
        (10 * BEYOND - 1, ["p50"]),
        (10 * BEYOND, ["p50", "p90"]),
        (100 * BEYOND, ["p50", "p90", "p99"]),
        (1000 * BEYOND - 1, ["p50", "p90", "p99"]),
        (1000 * BEYOND, ["p50", "p90", "p99", "p99.9"]),
    ],
)
def test_percentiles_are_told_where_enough_requests_lie_beyond_them(requests: int, told: list[str]):
    times = np.arange(requests) / 1e3
    assert list(carried(times)) == told
    for value in carried(times).values():
        assert (times * 1e3 > value).sum() >= BEYOND - 1


def test_more_clients_are_answered_side_by_side():
    one, four = (served(Sleeping(0.02), Traffic(None, workers, 0.8)) for workers in (1, 4))
    assert one.requests * 1.5 < four.requests <= 4 * 41


@pytest.mark.parametrize("workers", [1, 3])
def test_a_request_longer_than_the_time_is_answered_once_a_client(workers: int):
    session = Sleeping(0.03)
    service = served(session, Traffic(None, workers, 0.004))
    assert service.requests == workers == session.runs - WARMUP
    assert service.rate < workers / 0.03


def test_a_stall_is_met_by_one_waiting_client_and_by_everyone_who_comes_meanwhile(clock: Clock):
    """At 100 requests a second 100 come in a second, which a closed loop omits; the queue simulation knows them all."""
    stall = {WARMUP + 200: 1.0}
    traffic = Traffic(100, 1, 12.0)
    opened = served(Sleeping(0.001, stall, sleep=clock.sleep), traffic)
    expected = simulated(arrivals_of(traffic), 0.001, {200: 1.0})
    assert opened.requests == len(expected)
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert opened.percentiles[name] == pytest.approx(float(np.percentile(expected, share)) * 1e3)
    assert opened.percentiles["p99"] > 700
    closed = served(Sleeping(0.001, stall, sleep=clock.sleep), Traffic(None, 1, 12.0))
    assert closed.percentiles["p99"] == pytest.approx(1)


@pytest.mark.parametrize("number", [20, 200, 700, 1100])
def test_a_stall_of_a_second_is_no_overload_wherever_it_comes(clock: Clock, number: int):
    """At a tenth of what the engine can do; its queue is carried over from the slice that it comes in."""
    traffic = Traffic(100, 1, 12.0)
    service = served(Sleeping(0.001, {WARMUP + number: 1.0}, sleep=clock.sleep), traffic)
    assert not service.overloaded
    expected = simulated(arrivals_of(traffic), 0.001, {number: 1.0})
    assert service.requests + service.waiting == len(expected)
    assert service.percentiles["p90"] == pytest.approx(float(np.percentile(expected, 90)) * 1e3)


def test_a_queue_is_carried_over_to_the_next_slice_and_told(clock: Clock):
    """The stall begins half a second before the first slice of a second and a half ends."""
    traffic = Traffic(100, 1, 12.0)
    number = int(np.searchsorted(arrivals_of(traffic), 1.0))
    service = served(Sleeping(0.001, {WARMUP + number: 1.0}, sleep=clock.sleep), traffic)
    arrivals = arrivals_of(traffic)
    ends = arrivals[number] + 1.0  # when the stalled request is answered, which is when the slice ends
    assert service.queues[0] == ((arrivals > arrivals[number]) & (arrivals <= ends)).sum() > 80
    assert service.queues[1] < 5
    assert service.waiting == 0


def test_what_is_left_at_the_end_counts_with_the_time_it_waited(clock: Clock):
    """The last requests meet a stall that is longer than the overtime."""
    traffic = Traffic(100, 1, 8.0)
    number = int(np.searchsorted(arrivals_of(traffic), 6.5))
    service = served(Sleeping(0.001, {WARMUP + number: 9.0}, sleep=clock.sleep), traffic)
    assert not service.overloaded
    assert service.waiting == len(arrivals_of(traffic)) - number - 1 > 100
    assert service.percentiles["p90"] > 7500  # the stalled one, and those that waited for it


@pytest.mark.parametrize("times", [1.2, 2, 16])
def test_an_overload_is_told_as_it_is_and_ends_in_time(clock: Clock, times: float):
    """A session of 10 ms under more than a hundred requests a second, beside the queue simulation."""
    traffic = Traffic(100 * times, 1, 10.0)
    service = served(Sleeping(0.01, sleep=clock.sleep), traffic)
    assert service.overloaded
    assert service.percentiles == {}
    assert service.rate == pytest.approx(100, rel=0.03)
    assert 10 <= service.seconds <= 10 * (1 + OVERTIME)
    arrivals = arrivals_of(traffic)
    answered = int((arrivals + simulated(arrivals, 0.01) <= service.seconds + 1e-9).sum())
    assert (service.arrived, service.requests) == (len(arrivals), answered)
    assert service.waiting == len(arrivals) - answered
    assert service.queues[0] < service.queues[3] < service.queues[-1]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_what_can_be_answered_is_no_overload(clock: Clock, share: float, seed: int):
    traffic = Traffic(100 * share, 1, 10.0, seed)
    service = served(Sleeping(0.01, sleep=clock.sleep), traffic)
    assert not service.overloaded
    assert service.seconds <= 10 * (1 + OVERTIME)
    expected = simulated(arrivals_of(traffic), 0.01)
    assert service.percentiles["p50"] == pytest.approx(float(np.percentile(expected, 50)) * 1e3)


def test_an_overload_of_slow_answers_ends_in_time(clock: Clock):
    """60 a second at 0.27 s each, for six seconds: what took three minutes to be answered."""
    service = served(Sleeping(0.27, sleep=clock.sleep), Traffic(60, 1, 6.0))
    assert service.overloaded
    assert service.seconds <= 6 * (1 + OVERTIME)
    assert service.rate == pytest.approx(1 / 0.27, rel=0.01)


def test_a_request_that_finds_a_free_worker_takes_what_the_engine_takes(clock: Clock):
    service = served(Sleeping(1e-6, sleep=clock.sleep), Traffic(10, 1, 20))
    assert service.percentiles == pytest.approx({"p50": 1e-3, "p90": 1e-3}, rel=1e-3)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_arrival_is_answered_once_by_one_of_the_workers(workers: int):
    traffic, session = Traffic(100, workers, 1.6, seed=1), Sleeping(0.001)
    assert served(session, traffic).requests == len(arrivals_of(traffic)) == session.runs - WARMUP


def test_workers_answer_at_the_same_time():
    """A stall of one leaves the others at work."""
    few, many = (served(Sleeping(0, {WARMUP + 3: 0.4}), Traffic(100, workers, 2.0)) for workers in (8, 1))
    assert few.percentiles["p90"] < 100 < many.percentiles["p90"]


def test_every_arm_is_under_the_same_traffic_in_turns_of_shuffled_order():
    steps: list[str] = []
    base, merged = Sleeping(), Sleeping()
    services = serve(
        [Arm("base", lambda: base), Arm("merged", lambda: merged)], run, Traffic(100, 2, 0.8), steps.append
    )
    assert [service.arm for service in services] == ["base", "merged"]
    assert services[0].requests == services[1].requests == base.runs - WARMUP == merged.runs - WARMUP
    turns = [steps[start : start + 2] for start in range(0, len(steps), 2)]
    for number, turn in enumerate(turns, 1):
        assert set(turn) == {f"base, {number} of {SLICES}", f"merged, {number} of {SLICES}"}
    assert len({turn[0].split(",")[0] for turn in turns}) == 2
    assert base.closed
    assert merged.closed


@pytest.mark.parametrize("rate", [None, 100.0])
def test_the_second_arm_has_an_interval_beside_the_first_over_the_slices(clock: Clock, rate: float | None):
    base, merged = Sleeping(1e-3, sleep=clock.sleep), Sleeping(1.02e-3, sleep=clock.sleep)
    arms = [Arm("base", lambda: base), Arm("merged", lambda: merged)]
    first, second = serve(arms, run, Traffic(rate, 1, 8.0))
    assert first.ratio is None
    assert second.ratio is not None
    assert second.ratio.low <= 1.02 * 1.0001
    assert second.ratio.high >= 1.02 * 0.9999
    assert second.ratio.median == pytest.approx(1.02, rel=0.01)


def test_too_few_requests_have_no_interval(clock: Clock):
    """Four of eight slices have one: that bounds nothing at the declared error."""
    arms = [Arm(name, lambda: Sleeping(0.01, sleep=clock.sleep)) for name in ("base", "merged")]
    assert serve(arms, run, Traffic(0.25, 1, 8.0))[1].ratio is None


def test_an_overloaded_arm_has_no_interval(clock: Clock):
    arms = [Arm(name, lambda: Sleeping(0.01, sleep=clock.sleep)) for name in ("base", "merged")]
    first, second = serve(arms, run, Traffic(1600, 1, 8.0))
    assert (first.overloaded, second.overloaded, second.ratio) == (True, True, None)


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
