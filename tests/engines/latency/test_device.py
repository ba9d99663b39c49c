"""The device's own times: medians of the runs after a warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Self

from engines.latency.device import RUNS, device_times
from engines.latency.harness import WARMUP, Arm
from engines.latency.report import DeviceTimes
from lora.files.tensorfile import Array


class Staged:
    """A session whose runs take 1000 ms while it is cold, and then 1, 2, 3 ... ms; its copies half and a quarter as
    long.
    """

    def __init__(self) -> None:
        self._runs = count(1 - WARMUP)
        self.closed = False

    def stages(self, inputs: Mapping[str, Array]) -> tuple[float, float, float]:
        run = next(self._runs)
        engine = 1000.0 if run <= 0 else float(run)
        return engine / 2, engine, engine / 4

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise AssertionError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


def test_medians_leave_the_warm_up_out_and_sessions_are_closed():
    sessions = {name: Staged() for name in ("base", "merged")}
    found = device_times([Arm(name, lambda session=session: session) for name, session in sessions.items()], {})
    middle = (RUNS + 1) / 2
    assert found == tuple(DeviceTimes(name, middle / 2, middle, middle / 4) for name in sessions)
    assert all(session.closed for session in sessions.values())
