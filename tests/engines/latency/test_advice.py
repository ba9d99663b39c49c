"""What is said to help where no verdict was reached."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reports import RATIOS, point

from engines.latency.advice import advice
from engines.latency.report import Said
from engines.latency.verdict import AGAIN, MERGED

MARGIN = 0.01


def test_a_verdict_needs_no_help():
    assert advice(point(), MARGIN, 60) == ""


def test_the_other_clock_that_decides_is_named():
    noisy = replace(point(spread=0.05), said=(Said("wall", "undecided", ""), Said("cpu", "equivalent", "")))
    assert advice(noisy, MARGIN, 60) == "CPU time decides here: --clock cpu"


def test_a_run_that_was_close_is_told_how_much_more_it_takes():
    close = point({**RATIOS, AGAIN: 1.004}, spread=0.006)
    assert close.verdict == "undecided"
    said = advice(close, MARGIN, 60)
    assert said.startswith("close to: about ")
    more = int(said.split("about ")[1].split(" s more")[0])
    assert 6 <= more <= 240
    assert f"--seconds {more + 60}"[:-1] in said


def test_a_steadier_clock_is_named_where_more_time_of_it_would_do():
    noisy = point({**RATIOS, AGAIN: 1.002}, spread=0.05, cpu=True)
    steady = point({**RATIOS, AGAIN: 1.0035}, spread=0.007, cpu=True)
    undecided = replace(noisy, clock="wall", by_cpu=steady.by_cpu, said=())
    assert advice(undecided, MARGIN, 60).startswith("CPU time is steadier here: --clock cpu --seconds ")


def test_a_machine_that_no_time_helps_should_have_a_core_to_itself():
    assert "taskset --cpu-list" in advice(point(spread=0.2), MARGIN, 60)


@pytest.mark.parametrize("seconds", [0.001, 1, 60, 5000])
def test_any_run_gets_advice(seconds: float):
    for spread in (0.005, 0.01, 0.02, 0.1):
        for merged in (0.9, 0.99, 1.0, 1.01, 1.0099):
            found = point({**RATIOS, MERGED: merged}, spread=spread)
            assert (advice(found, MARGIN, seconds) == "") == (found.verdict != "undecided")
