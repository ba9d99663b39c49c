"""What a plan is built for, and what it runs on."""

from __future__ import annotations

import pytest

from engines.backends.tensorrt.target import dotted, runs_on


@pytest.mark.parametrize(
    ("target", "runs", "not_on"),
    [
        ("portable", [(8, 0), (8, 9), (12, 0)], [(7, 5)]),
        ("8.0+", [(8, 0), (9, 0), (10, 0)], [(7, 5)]),
        ("8.9", [(8, 9)], [(8, 6), (9, 0), (8, 0)]),
        ("8.6, 12.0", [(8, 6), (12, 0)], [(8, 9), (1, 20), (2, 0)]),
    ],
)
def test_a_plan_runs_on_the_devices_it_was_built_for(
    target: str, runs: list[tuple[int, int]], not_on: list[tuple[int, int]]
):
    assert [runs_on(target, capability) for capability in (*runs, *not_on)] == [True] * len(runs) + [False] * len(
        not_on
    )


@pytest.mark.parametrize(("member", "capability"), [("SM75", "7.5"), ("SM89", "8.9"), ("SM120", "12.0")])
def test_the_apis_names_are_read_as_people_write_them(member: str, capability: str):
    assert dotted(member) == capability
