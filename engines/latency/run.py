"""One run of the harness: every load, one after the other, and the report of all."""

from __future__ import annotations

from collections.abc import Sequence

from engines.backends import Progress
from engines.latency.arms import Arms
from engines.latency.environment import machine, state
from engines.latency.harness import Protocol, measure
from engines.latency.loads import work_of
from engines.latency.report import Load, Report, overall
from exporter.bundle.manifest import Bundle


def run(bundle: Bundle, task: str, arms: Arms, loads: Sequence[Load], protocol: Protocol, threads: int, progress: Progress = lambda step: None) -> Report:
    """Measure the arms at each of ``loads``, each with the whole budget."""
    graph, vocabulary = bundle.graph(bundle.task(task)), bundle.manifest.base.vocabulary
    before = state()
    points = tuple(measure(arms.arms, load, work_of(graph, vocabulary, load), protocol, progress) for load in loads)
    return Report(
        subject=task,
        verdict=overall(points),
        margin=protocol.margin,
        points=points,
        digests=arms.digests,
        left_out=arms.left_out,
        machine=machine(threads),
        before=before,
        after=state(),
    )
