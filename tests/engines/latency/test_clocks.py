"""Which clock decides, and where CPU time is no clock at all."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from engines.latency.clocks import check_clock, deciding, has_cpu_time
from engines.latency.equivalence import Ratio
from engines.latency.verdict import AGAIN, MERGED
from lora.errors import EngineError

MARGIN = 0.01


def ratios(half: float, middle: float = 1.0) -> dict[str, Ratio]:
    """Intervals of such a half width in both arms."""
    ratio = Ratio(middle, middle * (1 - half), middle * (1 + half), 0.05)
    return {AGAIN: ratio, MERGED: ratio}


@pytest.mark.parametrize(
    ("wall", "cpu", "share", "clock"),
    [
        (0.003, 0.001, 1.0, "wall"),  # the wall clock will do
        (0.006, 0.002, 0.25, "wall"),  # and so it will by the end
        (0.02, 0.005, 0.25, "cpu"),
        (0.02, 0.019, 0.25, "wall"),  # CPU time is hardly steadier
        (0.02, 0.03, 0.25, "wall"),
    ],
)
def test_auto_takes_the_clock_that_can_decide(wall: float, cpu: float, share: float, clock: str):
    assert deciding("auto", {"wall": ratios(wall), "cpu": ratios(cpu)}, MARGIN, share) == clock


def test_auto_does_not_look_at_where_the_intervals_lie():
    for middle in (0.9, 1.0, 1.1):
        found = {"wall": ratios(0.02, 2 - middle), "cpu": ratios(0.005, middle)}
        assert deciding("auto", found, MARGIN, 0.5) == "cpu"


def test_a_named_clock_decides_and_without_cpu_time_the_wall_clock_does():
    both = {"wall": ratios(0.02), "cpu": ratios(0.001)}
    assert deciding("wall", both, MARGIN, 1.0) == "wall"
    assert deciding("cpu", both, MARGIN, 1.0) == "cpu"
    assert deciding("auto", {"wall": ratios(0.02)}, MARGIN, 1.0) == "wall"


def test_cpu_time_is_refused_where_it_is_not_the_engines():
    check_clock("wall", on_thread=False)
    check_clock("auto", on_thread=False)
    check_clock("cpu", on_thread=True)
    with pytest.raises(EngineError, match=r"does not run on the calling thread alone.*--threads 1"):
        check_clock("cpu", on_thread=False)


def test_cpu_time_is_refused_where_its_clock_is_coarse(monkeypatch: pytest.MonkeyPatch):
    assert has_cpu_time()
    monkeypatch.setattr(time, "get_clock_info", lambda name: SimpleNamespace(resolution=0.0156))
    assert not has_cpu_time()
    with pytest.raises(EngineError, match="too coarse; choose --clock wall"):
        check_clock("cpu", on_thread=True)
