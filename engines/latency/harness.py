"""Taking the samples: engines resident together, interleaved in shuffled rounds, in several sets of fresh sessions."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from engines.backends import Session
from engines.latency.report import Load, Point, Samples
from engines.latency.sequential import until_decided
from engines.latency.verdict import judged
from lora.collector import uncollected
from lora.progress import Progress, unheard

Work = Callable[[Session], object]  # what is timed: one run, or a generation of several

# Runs of a fresh session before it is timed; fewer where so many seconds are over, one at least.
WARMUP, WARM_SECONDS = 5, 1.5
# A set is worth its sessions, and short enough for this many in the budget: sets, not rounds, decide.
SETS = 48
LEAST_ROUNDS, MOST_ROUNDS = 5, 200


@dataclass(frozen=True)
class Arm:
    """A way to run the model: its name, and how to open a fresh session of it."""

    name: str
    open: Callable[[], Session]


@dataclass(frozen=True)
class Protocol:
    """How long to measure and what to decide: a budget in seconds, the margin, the seed of all chance.

    ``rounds`` in a set; None: as many as leave the budget room for ``SETS`` sets.
    """

    budget: float = 60.0
    margin: float = 0.01
    seed: int = 0
    rounds: int | None = None


@dataclass(frozen=True)
class Taken:
    """What one set of sessions gave, in ns: times of shape (rounds, arms), and of each arm the opening and the first
    run.
    """

    times: list[list[int]]
    opening: list[int]
    first: list[int]


def measure(arms: Sequence[Arm], load: Load, work: Work, protocol: Protocol, progress: Progress = unheard) -> Point:
    """Time the arms at ``work`` until the question is decided or the budget is spent.

    The first arm is the base that all are compared with. At least ``FIRST_LOOK`` sets are measured, whatever they take.
    """
    random, started = np.random.default_rng(protocol.seed), time.monotonic()
    names = tuple(arm.name for arm in arms)
    rounds = protocol.rounds

    def take(number: int) -> Taken:
        nonlocal rounds
        progress(f"{load}: set {number + 1} of sessions, {time.monotonic() - started:.0f} s of {protocol.budget:.0f} s")
        taken = take_set(arms, work, rounds or rounds_within(protocol.budget / SETS), random)
        rounds = len(taken.times)
        return taken

    def judge(sets: Sequence[Taken], error: float) -> Point:
        return judged(load, names, _samples(sets), protocol.margin, error)

    return until_decided(take, judge, lambda sets: time.monotonic() - started > protocol.budget)


def rounds_within(seconds: float) -> Callable[[float, float], int]:
    """As many rounds as there is time for, of a set's ``seconds``, when so many are spent and one takes so long."""
    return lambda spent, one: int(np.clip((seconds - spent) / one, LEAST_ROUNDS, MOST_ROUNDS))


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
        if not isinstance(rounds, int):
            rounds = rounds(time.monotonic() - began, sum(min(times) for times in warming) / 1e9)
        times = _measure_rounds(sessions, work, rounds, random)
    return Taken(times, opening, [times[0] for times in warming])


def _warm_up(work: Work, session: Session) -> list[int]:
    times = [timed(work, session)]
    while len(times) < WARMUP and sum(times) < WARM_SECONDS * 1e9:
        times.append(timed(work, session))
    return times


def _measure_rounds(
    sessions: Mapping[int, Session], work: Work, rounds: int, random: np.random.Generator
) -> list[list[int]]:
    """Without the garbage collector, which would take its time from whichever arm it meets."""
    gc.collect()
    with uncollected():
        return [_measure_round(sessions, work, random) for _ in range(rounds)]


def _measure_round(sessions: Mapping[int, Session], work: Work, random: np.random.Generator) -> list[int]:
    times = [0] * len(sessions)
    for index in random.permutation(len(sessions)).tolist():
        times[index] = timed(work, sessions[index])
    return times


def timed(work: Work, session: Session) -> int:
    """One sample, in ns."""
    start = time.perf_counter_ns()
    work(session)
    return time.perf_counter_ns() - start


def _samples(sets: Sequence[Taken]) -> Samples:
    return Samples([one.times for one in sets], [one.opening for one in sets], [one.first for one in sets])
