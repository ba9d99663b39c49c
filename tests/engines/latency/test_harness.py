"""The harness: its protocol with sessions that wait a chosen time, its verdicts, and one run of real engines."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

import engines.latency.harness
from engines.backends import Session
from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.latency.arms import SELDOM, arms_of
from engines.latency.harness import WARMUP, Arm, Protocol, Taken, _Run, measure, take_set, timed_by_both
from engines.latency.report import Load, Point
from engines.latency.rounds import LEAST_ROUNDS
from engines.latency.sequential import FIRST_LOOK
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from engines.latency.workloads import work_of
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import Graph
from exporter.bundle.task_part import task_part
from lora.files.tensorfile import Array
from lora.progress import unheard

NAMES = (BASE, AGAIN, MERGED, UNMERGED)
SHORT = Protocol(rounds=4, budget=0)
LOAD = Load(1, 8)


def run(session: Session) -> object:
    return session.run({})


@dataclass
class Waiting:
    """A session that keeps the processor busy for a chosen time, and writes down what is done with it."""

    name: str
    events: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.events.append(("run", self.name))
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        return {}

    def __enter__(self) -> Self:
        self.events.append(("open", self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.events.append(("close", self.name))


class StopError(Exception):
    pass


def waiting_arms(events: list[tuple[str, str]], **seconds: float) -> list[Arm]:
    """The four arms; ``seconds`` by arm, nothing for the others."""
    return [
        Arm(name, lambda name=name: Waiting(name, events, seconds.get(name.replace(" ", "_"), 0))) for name in NAMES
    ]


@pytest.fixture(scope="module")
def events() -> list[tuple[str, str]]:
    """What a short measurement does with its sessions, in order."""
    kept: list[tuple[str, str]] = []
    measure(waiting_arms(kept), LOAD, run, SHORT)
    return kept


def sets_of(events: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The events of each set of sessions: four are opened, used and closed."""
    size = len(NAMES) * (2 + WARMUP + SHORT.rounds)
    return [events[start : start + size] for start in range(0, len(events), size)]


def timed_rounds(events: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """The arms of each round, in the order they ran; warming up comes first."""
    runs = [[name for what, name in one if what == "run"][WARMUP * len(NAMES) :] for one in sets_of(events)]
    return [tuple(names[start : start + len(NAMES)]) for names in runs for start in range(0, len(names), len(NAMES))]


def test_every_arm_runs_once_a_round(events: list[tuple[str, str]]):
    rounds = timed_rounds(events)
    assert len(rounds) == SHORT.rounds * FIRST_LOOK
    assert {tuple(sorted(names)) for names in rounds} == {tuple(sorted(NAMES))}


def test_order_of_the_arms_differs_between_short_rounds(events: list[tuple[str, str]]):
    assert len(set(timed_rounds(events))) > SHORT.rounds  # of 24 orders, 24 draws


def test_all_long_rounds_of_a_set_have_one_order_and_sets_have_different_ones(monkeypatch: pytest.MonkeyPatch):
    """So that two arms are always equally far apart, and yet none always follows another."""
    monkeypatch.setattr(engines.latency.harness, "LONG_ROUND", 0.0)
    kept: list[tuple[str, str]] = []
    measure(waiting_arms(kept), LOAD, run, SHORT)
    rounds = timed_rounds(kept)
    orders = [set(rounds[start : start + SHORT.rounds]) for start in range(0, len(rounds), SHORT.rounds)]
    assert [len(of) for of in orders] == [1] * FIRST_LOOK
    assert len(set.union(*orders)) > 2  # of 24 orders, 6 draws


def test_order_of_the_arms_follows_the_seed(events: list[tuple[str, str]]):
    same, other = [], []
    measure(waiting_arms(same), LOAD, run, SHORT)
    measure(waiting_arms(other), LOAD, run, replace(SHORT, seed=1))
    assert timed_rounds(same) == timed_rounds(events) != timed_rounds(other)


def test_every_arm_is_warmed_up_before_any_is_timed(events: list[tuple[str, str]]):
    for one in sets_of(events):
        runs = [name for what, name in one if what == "run"]
        assert {name: runs[: WARMUP * len(NAMES)].count(name) for name in NAMES} == dict.fromkeys(NAMES, WARMUP)


def test_slow_engines_are_warmed_up_once():
    kept: list[tuple[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.latency.harness, "WARM_SECONDS", 1e-9)
        measure(waiting_arms(kept), LOAD, run, SHORT)
    assert kept.count(("run", BASE)) == FIRST_LOOK * (1 + SHORT.rounds)


def test_every_arm_is_opened_first_and_last_as_often_as_another():
    """Or the place in line would be taken for the arm: a session that is opened first may keep being slower."""
    kept: list[tuple[str, str]] = []
    random = np.random.default_rng(0)
    for _ in range(60):
        take_set(waiting_arms(kept), run, 1, random)
    opened = [name for what, name in kept if what == "open"]
    orders = [tuple(opened[start : start + len(NAMES)]) for start in range(0, len(opened), len(NAMES))]
    shares = [
        sum(order[place] == name for order in orders) / len(orders) for place in range(len(NAMES)) for name in NAMES
    ]
    assert all(0.05 < share < 0.45 for share in shares)


def test_sessions_of_a_set_live_together_and_are_closed_before_the_next(events: list[tuple[str, str]]):
    for one in sets_of(events):
        assert [what for what, _ in one] == ["open"] * 4 + ["run"] * (4 * (WARMUP + SHORT.rounds)) + ["close"] * 4
        assert {name for what, name in one if what == "close"} == set(NAMES)


def test_least_number_of_sets_is_measured_on_no_budget(events: list[tuple[str, str]]):
    assert len(sets_of(events)) == FIRST_LOOK


def test_undecided_run_goes_on_while_there_is_budget():
    """The null control is always slower, so nothing can be decided; the budget of an hour is cut short from outside."""
    kept: list[tuple[str, str]] = []

    def stop(step: str) -> None:
        if sum(what == "open" for what, _ in kept) == 4 * (FIRST_LOOK + 3):
            raise StopError(step)

    with pytest.raises(StopError, match=f"^batch 1, length 8: set {FIRST_LOOK + 4} of sessions, .* of 3600 s"):
        measure(waiting_arms(kept, base_again=2e-4), LOAD, run, Protocol(rounds=2, budget=3600), stop)


def waited(**seconds: float) -> Point:
    everyone = dict.fromkeys((name.replace(" ", "_") for name in NAMES), 1e-3)
    return measure(waiting_arms([], **{**everyone, **seconds}), LOAD, run, Protocol(budget=60, margin=0.05))


@pytest.mark.parametrize(
    ("slow", "verdict", "reason"),
    [
        (
            {"merged": 1.3e-3, "unmerged": 1.3e-3},
            "slower",
            "merged is more than 5.0% slower than the unadapted base by the wall clock",
        ),
        ({"unmerged": 1.3e-3}, "equivalent", "merged is within 5.0% of the unadapted base by the wall clock"),
    ],
)
def test_planted_difference_of_thirty_per_cent_is_found_where_it_is(slow: dict[str, float], verdict: str, reason: str):
    report = waited(**slow)
    assert (report.verdict, report.reason) == (verdict, reason)
    assert {reading.arm: reading.decision for reading in report.readings} == {
        name: "slower" if name in slow else "equivalent" for name in NAMES
    }


def test_null_control_that_is_slower_silences_the_verdict():
    report = measure(
        waiting_arms([], base=2e-4, base_again=3e-4, merged=2e-4), LOAD, run, Protocol(budget=0, margin=0.05)
    )
    assert (report.verdict, report.reason) == (
        "undecided",
        "this machine is too noisy: the base against itself is not within 5.0% by the wall clock",
    )
    assert {reading.arm: reading.decision for reading in report.readings} == {
        BASE: "equivalent",
        AGAIN: "slower",
        MERGED: "not said",
        UNMERGED: "not said",
    }
    assert report.help


@dataclass
class Watched(Waiting):
    """Writes down whether the collector may run, and fails at a chosen run."""

    collecting: list[bool] = field(default_factory=list)
    fails_at: int | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.collecting.append(gc.isenabled())
        if len(self.collecting) == self.fails_at:
            raise StopError
        return super().run(inputs)


def test_collector_is_off_while_rounds_are_timed_and_on_again_after():
    collecting: list[bool] = []
    measure([Arm(name, lambda name=name: Watched(name, collecting=collecting)) for name in NAMES], LOAD, run, SHORT)
    assert collecting == ([True] * (4 * WARMUP) + [False] * (4 * SHORT.rounds)) * FIRST_LOOK
    assert gc.isenabled()


@pytest.mark.parametrize("number", [1, WARMUP, WARMUP + 1, WARMUP + SHORT.rounds])
def test_session_that_raises_leaves_the_collector_on_and_every_session_closed(number: int):
    kept: list[tuple[str, str]] = []
    arms = [*waiting_arms(kept)[:3], Arm(UNMERGED, lambda: Watched(UNMERGED, kept, fails_at=number))]
    with pytest.raises(StopError):
        measure(arms, LOAD, run, SHORT)
    assert gc.isenabled()
    assert sorted(name for what, name in kept if what == "close") == sorted(NAMES)


@pytest.fixture
def graph(tiny_bundle: Bundle) -> Graph:
    return task_part(tiny_bundle, "first").graph


def test_point_of_real_engines_holds_every_sample(tiny_bundle: Bundle, graph: Graph):
    point = measure(
        arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1)).arms,
        LOAD,
        work_of(graph, tiny_bundle.manifest.base.vocabulary, LOAD),
        SHORT,
    )
    runs = np.array(point.samples.runs, float)
    assert tuple(reading.arm for reading in point.readings) == NAMES
    assert runs.shape == (FIRST_LOOK, SHORT.rounds, len(NAMES))
    assert np.array(point.samples.opening).shape == np.array(point.samples.first).shape == (FIRST_LOOK, len(NAMES))
    assert min(np.nanmin(runs), np.min(point.samples.opening), np.min(point.samples.first)) > 0
    assert [reading.p50 for reading in point.readings] == list(np.nanmedian(runs, axis=(0, 1)) / 1e6)
    assert all(reading.ratio.low <= reading.ratio.median <= reading.ratio.high for reading in point.readings)


def test_the_positive_control_sits_out_two_rounds_of_three(tiny_bundle: Bundle, graph: Graph):
    """Its time is the others', whose verdict is waited for."""
    arms = arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1)).arms
    point = measure(arms, LOAD, work_of(graph, tiny_bundle.manifest.base.vocabulary, LOAD), SHORT)
    for rounds in point.samples.runs:
        ran = [[time is not None for time in one] for one in rounds]
        assert ran == [[True, True, True, number % SELDOM == 0] for number in range(SHORT.rounds)]


def test_opening_a_session_and_its_first_run_are_timed_apart():
    @dataclass
    class Slow(Waiting):
        """Takes 20 ms to open, and 10 ms for its first run."""

        def __post_init__(self) -> None:
            time.sleep(0.02)

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            self.seconds = 0 if ("run", self.name) in self.events else 0.01
            return super().run(inputs)

    arms = [*waiting_arms([])[:3], Arm(UNMERGED, lambda: Slow(UNMERGED, []))]
    slow = measure(arms, LOAD, run, SHORT).reading(UNMERGED)
    assert 20 <= slow.opening < 200
    assert slow.p50 < 5 <= 10 <= slow.first < 100


def first_set(seconds: float, budget: float) -> float:
    """Rounds of the first set, of arms that take so long."""
    kept: list[tuple[str, str]] = []

    def stop(step: str) -> None:
        if kept:
            raise StopError(step)

    with pytest.raises(StopError):
        measure(
            waiting_arms(kept, **dict.fromkeys((name.replace(" ", "_") for name in NAMES), seconds)),
            LOAD,
            run,
            Protocol(budget=budget),
            stop,
        )
    return sum(what == "run" for what, _ in kept) / len(NAMES) - WARMUP


def test_the_first_set_has_rounds_for_as_long_as_opening_and_warming_took():
    """Five rounds of warming up, and little to open."""
    assert 5 <= first_set(2e-3, budget=3600) <= 8


def test_a_set_has_the_least_rounds_on_no_budget():
    assert first_set(2e-4, budget=0) == LEAST_ROUNDS


def test_sets_have_more_rounds_where_their_sessions_do_not_differ():
    """Every run takes the same by chance alone: new sessions would tell nothing that more rounds do not."""
    point = waited(merged=1.05e-3)
    rounds = [len(one) for one in point.samples.runs]
    assert max(rounds) > 2 * rounds[0]


def test_cpu_time_leaves_out_what_a_run_sleeps():
    class Sleeping(Waiting):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            time.sleep(0.02)
            return super().run(inputs)

    wall, cpu = timed_by_both(run, Sleeping("x", seconds=0.005))
    assert wall > 25e6 > 15e6 > cpu >= 1


def test_cpu_time_is_taken_beside_the_wall_clock_where_the_engine_runs_on_this_thread():
    there = measure(waiting_arms([]), LOAD, run, replace(SHORT, on_thread=True))
    assert np.array(there.samples.cpu).shape == np.array(there.samples.runs).shape
    assert np.array(there.samples.cpu).min() > 0
    assert [reading.arm for reading in there.by_cpu] == list(NAMES)
    assert [said.clock for said in there.said] == ["wall", "cpu"]
    elsewhere = measure(waiting_arms([]), LOAD, run, SHORT)
    assert (elsewhere.samples.cpu, elsewhere.by_cpu, [said.clock for said in elsewhere.said]) == ([], (), ["wall"])


class Disturbed(Waiting):
    """Computes for a millisecond, and then waits for up to twenty."""

    random = np.random.default_rng(0)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        until = time.thread_time() + 1e-3
        while time.thread_time() < until:
            pass
        time.sleep(float(self.random.random()) * 0.02)
        return {}


@pytest.mark.parametrize("clock", ["cpu", "auto"])
def test_cpu_time_decides_where_the_wall_clock_can_not(clock: Any):
    arms = [Arm(name, lambda name=name: Disturbed(name, [])) for name in NAMES]
    found = measure(arms, LOAD, run, Protocol(budget=8, margin=0.1, clock=clock, on_thread=True))
    assert (found.clock, found.verdict) == ("cpu", "equivalent")
    assert found.reason.startswith("merged is within 10.0% of the unadapted base by CPU time")
    assert found.said[0].verdict == "undecided"
    assert found.help == ""


def test_an_undecided_wall_clock_is_told_that_cpu_time_decides():
    arms = [Arm(name, lambda name=name: Disturbed(name, [])) for name in NAMES]
    found = measure(arms, LOAD, run, Protocol(budget=4, margin=0.1, on_thread=True))
    assert (found.clock, found.verdict) == ("wall", "undecided")
    assert found.help == "CPU time decides here: --clock cpu"


def test_a_brought_arm_keeps_the_run_going_until_it_is_decided_too():
    """Sets in which merged is plainly as fast as the base, and the last arm's sessions differ by 10 %."""
    random = np.random.default_rng(0)
    for asked in (False, True):
        arms = [*waiting_arms([])[:3], Arm("mine", lambda: Waiting("mine", []), asked)]
        going = _Run(arms, LOAD, run, Protocol(budget=3600), unheard)
        sets = [
            Taken([[10**6, 10**6, 10**6, int(10**6 * mine)]] * 5, [], [1] * 4, [1] * 4)
            for mine in np.exp(random.normal(0, 0.1, 12)).tolist()
        ]
        seen = going.judge(sets, 0.01, 0.5)
        assert (seen.point.verdict, seen.point.reading("mine").decision) == ("equivalent", "inconclusive")
        assert seen.is_decided != asked


def test_command_lines_arms_compute_what_their_names_say(tiny_bundle: Bundle, tokens: dict[str, Array]):
    """A wrong arm would be timed just as well, and the verdict would be on something else."""
    outputs = {}
    for arm in arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), ["resident"]).arms:
        with arm.open() as session:
            outputs[arm.name] = session.run(tokens)["logits"]
    np.testing.assert_array_equal(outputs[AGAIN], outputs[BASE])
    np.testing.assert_allclose(outputs[UNMERGED], outputs[MERGED], atol=1e-5)
    np.testing.assert_array_equal(outputs["resident"], outputs[MERGED])
    assert np.abs(outputs[MERGED] - outputs[BASE]).max() > 1e-3
