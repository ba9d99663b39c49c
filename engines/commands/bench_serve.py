"""``lorafuse bench serve``: a task's engine under traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.options import (
    MODEL,
    AsJson,
    BundlePath,
    Digest,
    PartName,
    TaskName,
    Threads,
)
from engines.commands.terminal import DONE, UNDECIDED, print_json, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.latency.service import Service


def serve(
    bundle: BundlePath,
    task: TaskName,
    part: PartName = MODEL,
    rate: Annotated[
        float | None,
        typer.Option(min=0.001, max=1e6, help="Open loop: Poisson arrivals per second. Default: closed loop."),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=1024, help="Threads that answer; in a closed loop, clients that ask.")
    ] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a request.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Sequence length, in tokens.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="How long each arm is under traffic.")] = 30.0,
    threads: Threads = 1,
    seed: Annotated[int, typer.Option(help="Seed of when requests arrive.")] = 0,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Put base and merged engine under traffic: requests a second, and p50 to p99.9 of their times, queueing included.

    Exit status 2: more requests came than could be answered.

    Example: lorafuse bench serve bundle --task movies --rate 40
    """
    from dataclasses import asdict

    from engines.latency.arm_engines import OnnxRuntimeOpener
    from engines.latency.arms import arms_of
    from engines.latency.service import Traffic
    from engines.latency.service import serve as put_under_traffic
    from engines.latency.verdict import BASE, MERGED
    from engines.latency.workloads import loads_of, work_of
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_part

    served = task_part(open_bundle(bundle, digest), task, part)
    load = loads_of(served, [batch], [length])[0]
    work = work_of(served.graph, served.bundle.manifest.base.vocabulary, load)
    with progress(f"serve {task}") as step:
        arms = [arm for arm in arms_of(served, OnnxRuntimeOpener(threads)).arms if arm.name in (BASE, MERGED)]
        services = put_under_traffic(arms, work, Traffic(rate, workers, seconds, seed), step)
    if as_json:
        print_json([asdict(service) for service in services])
    else:
        _print_services(f"{task}: {load}", services, rate, workers)
    raise typer.Exit(UNDECIDED if any(service.overloaded for service in services) else DONE)


def _print_services(title: str, services: Sequence[Service], rate: float | None, workers: int) -> None:
    from engines.latency.service import PERCENTILES
    from engines.latency.words import interval

    names = [f"p{percentile:g}" for percentile in PERCENTILES]
    rows = [
        (
            s.arm,
            str(s.requests),
            f"{s.rate:.1f}",
            *(f"{s.percentiles[name]:.3f}" if name in s.percentiles else "-" for name in names),
            "-" if s.ratio is None else interval(s.ratio),
        )
        for s in services
    ]
    waiting, chance = (
        f"{workers} client(s) that wait",
        f"{rate or 0:g} Poisson arrivals per second, {workers} worker(s)",
    )
    columns = ("arm", "answered", "a second", *(f"{name} ms" for name in names), "median beside base")
    print_table(f"{title}, {waiting if rate is None else chance}", columns, rows)
    if any(not service.percentiles.keys() >= set(names) and not service.overloaded for service in services):
        print("A percentile with too few requests beyond it is not told; more --seconds carry more of them.")
    for service in services:
        for sentence in _said_of(service, rate):
            print(sentence)


def _said_of(service: Service, rate: float | None) -> list[str]:
    """What the percentiles don't tell: an overload, a queue that was carried over, requests left without an answer."""
    if service.overloaded:
        return [
            f"OVERLOADED: {rate:g} requests a second come and {service.arm} answers {service.rate:.1f};"
            f" {service.waiting} of {service.arrived} were waiting after {service.seconds:.1f} s. Their times would say"
            " how long it was measured; choose a lower --rate or more --workers"
        ]
    said = []
    if any(service.queues[:-1]):
        said.append(f"{service.arm}: up to {max(service.queues[:-1])} requests were carried over from slice to slice")
    if service.waiting:
        said.append(
            f"{service.arm}: {service.waiting} of {service.arrived} requests were not answered in time; they count with"
            " the time that they had waited"
        )
    return said
