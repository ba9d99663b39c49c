"""The harness: its protocol with sessions that wait a chosen time, its verdicts, and one run of real engines."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.cli import _arms
from engines.equivalence import Ratio
from engines.inputs import random_inputs
from engines.latency import AGAIN, BASE, LEAST_SETS, MERGED, UNMERGED, WARMUP, Arm, Protocol, Reading, Report, judge, measure
from exporter.bundle.manifest import Bundle, Graph
from lora.tensorfile import Array

NAMES = (BASE, AGAIN, MERGED, UNMERGED)
SHORT = Protocol(rounds=4, budget=0)


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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.events.append(("close", self.name))


class StopError(Exception):
    pass


def waiting_arms(events: list[tuple[str, str]], **seconds: float) -> list[Arm]:
    """The four arms; ``seconds`` by arm, nothing for the others."""
    return [Arm(name, lambda name=name: Waiting(name, events, seconds.get(name.replace(" ", "_"), 0))) for name in NAMES]


@pytest.fixture(scope="module")
def events() -> list[tuple[str, str]]:
    """What a short measurement does with its sessions, in order."""
    kept: list[tuple[str, str]] = []
    measure(waiting_arms(kept), {}, SHORT)
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
    assert len(rounds) == SHORT.rounds * LEAST_SETS
    assert {tuple(sorted(names)) for names in rounds} == {tuple(sorted(NAMES))}


def test_order_of_the_arms_differs_between_rounds_and_sets(events: list[tuple[str, str]]):
    rounds = timed_rounds(events)
    assert len(set(rounds)) > SHORT.rounds  # of 24 orders, 24 draws
    assert len({tuple(rounds[start : start + SHORT.rounds]) for start in range(0, len(rounds), SHORT.rounds)}) == LEAST_SETS


def test_order_of_the_arms_follows_the_seed(events: list[tuple[str, str]]):
    same, other = [], []
    measure(waiting_arms(same), {}, SHORT)
    measure(waiting_arms(other), {}, replace(SHORT, seed=1))
    assert timed_rounds(same) == timed_rounds(events) != timed_rounds(other)


def test_every_arm_is_warmed_up_before_any_is_timed(events: list[tuple[str, str]]):
    for one in sets_of(events):
        runs = [name for what, name in one if what == "run"]
        assert {name: runs[: WARMUP * len(NAMES)].count(name) for name in NAMES} == dict.fromkeys(NAMES, WARMUP)


def test_order_of_creation_alternates_between_sets(events: list[tuple[str, str]]):
    opened = [tuple(name for what, name in one if what == "open") for one in sets_of(events)]
    assert opened == [NAMES, NAMES[::-1]] * (LEAST_SETS // 2)


def test_sessions_of_a_set_live_together_and_are_closed_before_the_next(events: list[tuple[str, str]]):
    for one in sets_of(events):
        assert [what for what, _ in one] == ["open"] * 4 + ["run"] * (4 * (WARMUP + SHORT.rounds)) + ["close"] * 4
        assert {name for what, name in one if what == "close"} == set(NAMES)


def test_least_number_of_sets_is_measured_on_no_budget(events: list[tuple[str, str]]):
    assert len(sets_of(events)) == LEAST_SETS


def test_undecided_run_goes_on_while_there_is_budget():
    """The null control is always slower, so nothing can be decided; the budget of an hour is cut short from outside."""
    kept: list[tuple[str, str]] = []

    def stop(step: str) -> None:
        if sum(what == "open" for what, _ in kept) == 4 * (LEAST_SETS + 3):
            raise StopError(step)

    with pytest.raises(StopError, match=f"^{LEAST_SETS + 3} sets of sessions, .* of 3600 s"):
        measure(waiting_arms(kept, base_again=2e-4), {}, Protocol(rounds=2, budget=3600), stop)


def waited(**seconds: float) -> Report:
    everyone = dict.fromkeys((name.replace(" ", "_") for name in NAMES), 1e-3)
    return measure(waiting_arms([], **{**everyone, **seconds}), {}, Protocol(budget=20, margin=0.05))


@pytest.mark.parametrize(
    ("slow", "verdict", "reason"),
    [
        ({"merged": 1.3e-3, "unmerged": 1.3e-3}, "slower", "merged is more than 5.0% slower than the unadapted base"),
        ({"unmerged": 1.3e-3}, "equivalent", "merged is within 5.0% of the unadapted base"),
    ],
)
def test_planted_difference_of_thirty_per_cent_is_found_where_it_is(slow: dict[str, float], verdict: str, reason: str):
    report = waited(**slow)
    assert (report.verdict, report.reason) == (verdict, reason)
    assert {reading.arm: reading.decision for reading in report.readings} == {name: "slower" if name in slow else "equivalent" for name in NAMES}


def test_null_control_that_is_slower_silences_the_verdict():
    report = measure(waiting_arms([], base=2e-4, base_again=3e-4, merged=2e-4), {}, Protocol(budget=0, margin=0.05))
    assert (report.verdict, report.reason) == ("undecided", "this machine is too noisy: the base against itself is not within 5.0%")


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
    measure([Arm(name, lambda name=name: Watched(name, collecting=collecting)) for name in NAMES], {}, SHORT)
    assert collecting == ([True] * (4 * WARMUP) + [False] * (4 * SHORT.rounds)) * LEAST_SETS
    assert gc.isenabled()


@pytest.mark.parametrize("run", [1, WARMUP, WARMUP + 1, WARMUP + SHORT.rounds])
def test_session_that_raises_leaves_the_collector_on_and_every_session_closed(run: int):
    kept: list[tuple[str, str]] = []
    arms = [*waiting_arms(kept)[:3], Arm(UNMERGED, lambda: Watched(UNMERGED, kept, fails_at=run))]
    with pytest.raises(StopError):
        measure(arms, {}, SHORT)
    assert gc.isenabled()
    assert sorted(name for what, name in kept if what == "close") == sorted(NAMES)


def readings(again: str, merged: str, unmerged: str | None) -> dict[str, Reading]:
    decisions = {BASE: "equivalent", AGAIN: again, MERGED: merged, UNMERGED: unmerged}
    return {name: Reading(name, 1.0, Ratio(1, 1, 1), decision) for name, decision in decisions.items() if decision is not None}


@pytest.mark.parametrize(
    ("again", "merged", "unmerged"), list(itertools.product(["slower", "inconclusive"], ["equivalent", "slower", "inconclusive"], ["slower", None]))
)
def test_noisy_null_control_leaves_it_undecided_whatever_merged_says(again: str, merged: str, unmerged: str | None):
    verdict, reason = judge(readings(again, merged, unmerged), 0.01)
    assert verdict == "undecided"
    assert reason == "this machine is too noisy: the base against itself is not within 1.0%"


@pytest.mark.parametrize("merged", ["equivalent", "slower"])
@pytest.mark.parametrize(("unmerged", "powerless"), [("slower", False), (None, False), ("equivalent", True), ("inconclusive", True)])
def test_decided_merged_arm_is_the_verdict_and_missing_power_is_said(merged: str, unmerged: str | None, powerless: bool):
    verdict, reason = judge(readings("equivalent", merged, unmerged), 0.01)
    assert verdict == merged
    assert ("no power shown" in reason) == powerless


@pytest.mark.parametrize("unmerged", ["slower", "equivalent", "inconclusive", None])
def test_inconclusive_merged_arm_is_undecided_and_asks_for_a_larger_budget(unmerged: str | None):
    verdict, reason = judge(readings("equivalent", "inconclusive", unmerged), 0.01)
    assert verdict == "undecided"
    assert "give it a larger budget" in reason


@pytest.fixture
def graph(tiny_bundle: Bundle) -> Graph:
    return tiny_bundle.graph(tiny_bundle.task("first"))


def test_report_of_real_engines_holds_every_sample(tiny_bundle: Bundle, graph: Graph):
    inputs = random_inputs(graph, tiny_bundle.manifest.base.vocabulary, {"batch": 1, "sequence": 8}, seed=0)
    report = measure(_arms(tiny_bundle, "first", threads=1)[0], inputs, SHORT)
    assert report.arms == NAMES == tuple(reading.arm for reading in report.readings)
    assert report.nanoseconds.shape == (LEAST_SETS, SHORT.rounds, len(NAMES))
    assert (report.nanoseconds > 0).all()
    assert [reading.milliseconds for reading in report.readings] == list(np.median(report.nanoseconds, axis=(0, 1)) / 1e6)
    assert report.readings[0].ratio == Ratio(1, 1, 1)
    assert all(reading.ratio.low <= reading.ratio.median <= reading.ratio.high for reading in report.readings)
    assert {"processor", "cores", "load before", "load after"} <= report.environment.keys()


def test_command_lines_arms_compute_what_their_names_say(tiny_bundle: Bundle, tokens: dict[str, Array]):
    """A wrong arm would be timed just as well, and the verdict would be on something else."""
    outputs = {}
    for arm in _arms(tiny_bundle, "first", threads=1)[0]:
        with arm.open() as session:
            outputs[arm.name] = session.run(tokens)["logits"]
    np.testing.assert_array_equal(outputs[AGAIN], outputs[BASE])
    np.testing.assert_allclose(outputs[UNMERGED], outputs[MERGED], atol=1e-5)
    assert np.abs(outputs[MERGED] - outputs[BASE]).max() > 1e-3


@given(vocabulary=st.integers(1, 50_000), batch=st.integers(1, 8), sequence=st.integers(1, 64), seed=st.integers(0, 2**32 - 1))
def test_random_inputs_have_the_graphs_dtypes_and_the_sizes_asked_for(tiny_bundle: Bundle, vocabulary: int, batch: int, sequence: int, seed: int):
    graph = tiny_bundle.graph(tiny_bundle.task("first"))
    inputs = random_inputs(graph, vocabulary, {"batch": batch, "sequence": sequence}, seed)
    assert {name: (values.dtype.name, values.shape) for name, values in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ("int64", (batch, sequence))
    )
    assert (inputs["attention_mask"] == 1).all()
    assert (inputs["token_type_ids"] == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 3, 100])
def test_random_ids_are_drawn_from_the_whole_vocabulary(graph: Graph, vocabulary: int):
    ids = random_inputs(graph, vocabulary, {"batch": 64, "sequence": 64}, seed=0)["input_ids"]
    assert set(np.unique(ids)) == set(range(vocabulary))


def test_random_inputs_follow_the_seed_and_the_ports(graph: Graph):
    narrow = msgspec.structs.replace(graph.inputs[0], dtype="int32", shape=(3, "sequence"))
    changed = msgspec.structs.replace(graph, inputs=(narrow,))
    one, same, other = (random_inputs(changed, 1000, {"sequence": 9}, seed)["input_ids"] for seed in (0, 0, 1))
    assert (one.dtype, one.shape) == (np.dtype(np.int32), (3, 9))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
