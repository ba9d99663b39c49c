"""The latency harness: engines resident together, interleaved in shuffled rounds, in several sets of sessions.

Arms: the unadapted base, the base again (a null control: it must come out equivalent, or the machine is too noisy to
speak), the merged task, and the unmerged adapter (a positive control: it ought to come out slower, or the harness has
shown no power at this shape).
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engines.backends import Progress, Session
from engines.equivalence import Decision, Ratio, paired_ratio
from lora.tensorfile import Array

BASE, AGAIN, MERGED, UNMERGED = "base", "base again", "merged", "unmerged"
WARMUP = 5
# Fewer sets say too little about how much sessions differ from one another.
LEAST_SETS = 6

Verdict = Literal["equivalent", "slower", "undecided"]


@dataclass(frozen=True)
class Arm:
    """A way to run the model: its name, and how to open a fresh session of it."""

    name: str
    open: Callable[[], Session]


@dataclass(frozen=True)
class Protocol:
    """How long to measure and what to decide: rounds in a set, a budget in seconds, the margin, the seed of all chance."""

    rounds: int = 20
    budget: float = 60.0
    margin: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Reading:
    """One arm: its median time in milliseconds, its ratio to the base, and what the ratio says."""

    arm: str
    milliseconds: float
    ratio: Ratio
    decision: Decision


@dataclass(frozen=True)
class Report:
    """The verdict with everything it rests on; ``nanoseconds`` has shape (sets, rounds, arms)."""

    verdict: Verdict
    reason: str
    margin: float
    readings: tuple[Reading, ...]
    arms: tuple[str, ...]
    nanoseconds: Array
    environment: dict[str, str]


def measure(arms: Sequence[Arm], inputs: Mapping[str, Array], protocol: Protocol, progress: Progress = lambda step: None) -> Report:
    """Time the arms on ``inputs`` until the question is decided or the budget is spent.

    The first arm is the base that all are compared with. At least ``LEAST_SETS`` sets are measured, whatever they take.
    """
    random = np.random.default_rng(protocol.seed)
    started, load_before = time.monotonic(), os.getloadavg()[0]
    sets: list[Array] = []
    while True:
        order = list(range(len(arms)))
        sets.append(_measure_set(arms, order if len(sets) % 2 == 0 else order[::-1], inputs, protocol.rounds, random))
        elapsed = time.monotonic() - started
        if len(sets) >= LEAST_SETS:
            report = _report(arms, np.stack(sets), protocol, _environment(load_before))
            if report.verdict != "undecided" or elapsed > protocol.budget:
                return report
        progress(f"{len(sets)} sets of sessions, {elapsed:.0f} s of {protocol.budget:.0f} s")


def _measure_set(arms: Sequence[Arm], creation: Sequence[int], inputs: Mapping[str, Array], rounds: int, random: np.random.Generator) -> Array:
    """One fresh session per arm, opened in the order of ``creation``; times in ns, shape (rounds, arms)."""
    times = np.empty((rounds, len(arms)), np.int64)
    with ExitStack() as stack:
        sessions = {index: stack.enter_context(arms[index].open()) for index in creation}
        for session in sessions.values():
            for _ in range(WARMUP):
                session.run(inputs)
        gc.collect()
        gc.disable()
        try:
            for row in range(rounds):
                for index in random.permutation(len(arms)):
                    run = sessions[int(index)].run
                    start = time.perf_counter_ns()
                    run(inputs)
                    times[row, index] = time.perf_counter_ns() - start
        finally:
            gc.enable()
    return times


def _report(arms: Sequence[Arm], times: Array, protocol: Protocol, environment: dict[str, str]) -> Report:
    readings = []
    for index, arm in enumerate(arms):
        ratio = paired_ratio(times[:, :, index], times[:, :, 0], protocol.seed) if index else Ratio(1.0, 1.0, 1.0)
        decision = ratio.decide(protocol.margin) if index else "equivalent"
        readings.append(Reading(arm.name, float(np.median(times[:, :, index])) / 1e6, ratio, decision))
    verdict, reason = judge({reading.arm: reading for reading in readings}, protocol.margin)
    return Report(verdict, reason, protocol.margin, tuple(readings), tuple(arm.name for arm in arms), times, environment)


def judge(readings: Mapping[str, Reading], margin: float) -> tuple[Verdict, str]:
    """The verdict on the merged arm, and the reason. The null control decides whether the harness may speak at all."""
    if readings[AGAIN].decision != "equivalent":
        return "undecided", f"this machine is too noisy: the base against itself is not within {margin:.1%}"
    power = (
        "" if UNMERGED not in readings or readings[UNMERGED].decision == "slower" else "; no power shown: the unmerged adapter is not measurably slower here"
    )
    merged = readings[MERGED]
    match merged.decision:
        case "equivalent":
            return "equivalent", f"merged is within {margin:.1%} of the unadapted base{power}"
        case "slower":
            return "slower", f"merged is more than {margin:.1%} slower than the unadapted base{power}"
    return "undecided", f"the interval of merged against base crosses the margin of {margin:.1%}; give it a larger budget"


def _environment(load_before: float) -> dict[str, str]:
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load before": f"{load_before:.2f}",
        "load after": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # not a file of ours
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
