"""Reports of simulated times, to compare, to write and to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from engines.latency.report import Load, Report
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED

ARMS = (BASE, AGAIN, MERGED, UNMERGED)


@pytest.fixture(scope="session")
def make_report() -> Callable[..., Report]:
    """A report of equal arms, but for those that are ``slow`` by a factor; all arms take ``scale`` times 5 ms."""
    from reports import point, report

    def make(
        loads: Sequence[Load] = (Load(1, 8),),
        arms: Sequence[str] = ARMS,
        slow: Mapping[str, float] | None = None,
        scale: float = 1.0,
        sets: int = 12,
        seed: int = 0,
        cpu: bool = False,
    ) -> Report:
        ratios = {arm: scale * (slow or {}).get(arm, 1.0) for arm in arms}
        return report(
            *(point(ratios, sets=sets, rounds=5, spread=0.001, load=load, seed=seed, cpu=cpu) for load in loads)
        )

    return make
