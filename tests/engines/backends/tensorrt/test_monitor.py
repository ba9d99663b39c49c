"""The builder's progress as one share, on the phases that a real build reports and on invented ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engines.backends.tensorrt.monitor import Phases, monitor_of


class Base:
    """What the API's base class does: nothing."""


TRT = SimpleNamespace(IProgressMonitor=Base)


def test_a_nested_phase_counts_as_a_share_of_its_parents_step():
    phases = Phases()
    phases.start("building", None, 2)
    phases.start("optimizing", "building", 4)
    assert phases.share("optimizing") == ("building", 0)
    phases.step("optimizing", 0)
    assert phases.share("optimizing") == ("building", 1 / 8)
    phases.step("optimizing", 3)
    assert phases.share("optimizing") == ("building", 1 / 2)
    phases.finish("optimizing")
    phases.step("building", 0)
    assert phases.share("building") == ("building", 1 / 2)


@pytest.mark.parametrize(("steps", "done"), [(0, 0), (1, 5)])
def test_a_share_is_never_more_than_the_whole(steps: int, done: int):
    phases = Phases()
    phases.start("building", None, steps)
    phases.step("building", done)
    assert phases.share("building") == ("building", 1)


def test_a_phase_whose_parent_is_over_stands_for_itself():
    phases = Phases()
    phases.start("orphan", "gone", 2)
    phases.step("orphan", 0)
    assert phases.share("orphan") == ("orphan", 1 / 2)
    assert phases.outermost("orphan")


def test_the_whole_is_reported_when_the_outermost_phase_ends_early():
    heard: list[tuple[str, float | None]] = []
    monitor = monitor_of(TRT, lambda step, share=None: heard.append((step, share)))
    monitor.phase_start("building", None, 6)
    monitor.phase_start("cloning", "building", 1)
    assert monitor.step_complete("cloning", 0)
    monitor.phase_finish("cloning")
    monitor.phase_finish("building")
    assert heard == [("building", pytest.approx(1 / 6)), ("building", 1.0)]


def test_an_interrupt_stops_the_build_and_leaves_no_callback():
    """An exception may not cross the library; the build is asked to end, and whoever started it raises."""

    def interrupted(step: str, share: float | None = None) -> None:
        raise KeyboardInterrupt

    monitor = monitor_of(TRT, interrupted)
    monitor.phase_start("building", None, 2)
    assert monitor.step_complete("building", 0) is False
    assert monitor.interrupted
