"""One run of the harness: every load, one after the other, and the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from engines.latency.arms import Arms
from engines.latency.clocks import check_clock
from engines.latency.device import device_times
from engines.latency.environment import machine, state
from engines.latency.harness import Protocol, measure
from engines.latency.report import Load, Point, Report, overall
from engines.latency.workloads import inputs_of, work_of
from exporter.bundle.task_part import TaskPart
from lora.progress import Progress, unheard


def run(
    part: TaskPart,
    arms: Arms,
    loads: Sequence[Load],
    protocol: Protocol,
    threads: int,
    progress: Progress = unheard,
) -> Iterator[Report]:
    """Measure the arms at each of ``loads``, each with the whole budget; after each, the report so far: what follows
    may fail, or take too long.

    Raises EngineError where the protocol's clock can't time these arms.
    """
    check_clock(protocol.clock, arms.on_thread)
    protocol = replace(protocol, on_thread=arms.on_thread)
    base, graph = part.bundle.manifest.base, part.graph
    before = state()
    points: tuple[Point, ...] = ()
    for load in loads:
        point = measure(arms.arms, load, work_of(graph, base.vocabulary, load), protocol, progress)
        if arms.on_device:
            point = replace(point, device=device_times(arms.arms, inputs_of(graph, base.vocabulary, load)))
        points = (*points, point)
        yield Report(
            subject=part.name,
            verdict=overall(points),
            margin=protocol.margin,
            points=points,
            digests=arms.digests,
            left_out=arms.left_out,
            machine={"backend": arms.backend, **machine(threads)},
            before=before,
            after=state(),
            hashes={"base": base.sha256, "merged": part.part.model.sha256, "adapter": part.task.adapter_sha256},
            seed=protocol.seed,
        )
