"""Edits of a manifest: from the current one to the next, as values. ``staging`` makes one of them the bundle's.

A task or a graph that an edit is about may have gone since the caller looked: each edit raises BundleError then.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import SCHEMA, Base, Engine, File, Graph, Manifest, Part, Task
from exporter.bundle.staging import amend, staging
from lora.errors import BundleError


def with_task(
    current: Manifest | None, name: str, task: Task, base: Base, graphs: dict[str, Graph], versions: dict[str, str]
) -> Manifest:
    """The manifest with the task added or replaced; what another export has added meanwhile stays.

    ``graphs`` are those of the task's parts. Engines of graphs, and of parts that are as they were, are kept.
    Raises BundleError when the bundle has become another base's meanwhile.
    """
    if current is None:
        return Manifest(schema=SCHEMA, base=base, graphs=graphs, tasks={name: task}, versions=versions)
    if (current.base.sha256, current.base.precision) != (base.sha256, base.precision):
        raise BundleError(
            f"task '{name}': another export has made this bundle for another base meanwhile; use a bundle of its own"
        )
    tasks = {**current.tasks, name: _with_former_engines(task, current.tasks.get(name))}
    known = {**graphs, **current.graphs}
    return msgspec.structs.replace(
        current,
        base=_with_weights(current.base, base),
        graphs=_used(known, tasks),
        tasks=dict(sorted(tasks.items())),
        versions=versions,
    )


def without_task(current: Bundle, name: str) -> Manifest:
    """The manifest without the task, and without graphs that no other task has; the base's weights stay."""
    current.task(name)
    return only_tasks(current, current.manifest.tasks.keys() - {name})


def only_tasks(current: Bundle, names: Collection[str]) -> Manifest:
    """The manifest with these tasks and the graphs that they have."""
    tasks = {name: current.task(name) for name in sorted(names)}
    return msgspec.structs.replace(current.manifest, tasks=tasks, graphs=_used(current.manifest.graphs, tasks))


def with_task_engine(current: Bundle, name: str, role: str, engine: Engine) -> Manifest:
    """The manifest with an engine of a task's part, in the place of one of the same backend and target."""
    task = current.task(name)
    if role not in task.parts:
        raise BundleError(f"{current.path}: task '{name}' has lost its part '{role}' meanwhile; export it again")
    part = msgspec.structs.replace(task.parts[role], engines=with_engine(task.parts[role].engines, engine))
    task = msgspec.structs.replace(task, parts={**task.parts, role: part})
    return msgspec.structs.replace(current.manifest, tasks={**current.manifest.tasks, name: task})


def with_graph_engine(current: Bundle, digest: str, engine: Engine) -> Manifest:
    """The manifest with an engine of an unadapted graph, in the place of one of the same backend and target."""
    graph = current.manifest.graphs.get(digest)
    if graph is None:
        raise BundleError(
            f"{current.path}: the graph {digest[:12]}… has gone meanwhile, with the last task of it; export one again,"
            " and build anew"
        )
    graph = msgspec.structs.replace(graph, engines=with_engine(graph.engines, engine))
    return msgspec.structs.replace(current.manifest, graphs={**current.manifest.graphs, digest: graph})


def with_timing_cache(manifest: Manifest, key: str | None, cache: File | None) -> Manifest:
    """The manifest with TensorRT's timings under ``key``; as it was where there are none."""
    if key is None or cache is None:
        return manifest
    return msgspec.structs.replace(manifest, timing_caches={**manifest.timing_caches, key: cache})


def with_engine(engines: tuple[Engine, ...], engine: Engine) -> tuple[Engine, ...]:
    """The engines with one more, in the place of one of the same backend and target; in order of both."""
    place = engine.backend, engine.target
    others = [other for other in engines if (other.backend, other.target) != place]
    return tuple(sorted([*others, engine], key=lambda one: (one.backend, one.target)))


def remove_task(path: Path, task: str) -> Bundle:
    """Remove ``task``, its files and its engines from the bundle in ``path``; the base's weights stay.

    Raises BundleError when there is no such task.
    """
    open_bundle(path).task(task)
    with staging(path) as stage:
        return amend(path, stage, lambda current: without_task(current, task))


def _with_former_engines(task: Task, former: Task | None) -> Task:
    """The task with the engines of the one that it replaces, where a part is what it was."""
    if former is None or former.adapter_sha256 != task.adapter_sha256:
        return task
    parts = {role: _kept_engines(part, former.parts.get(role)) for role, part in task.parts.items()}
    return msgspec.structs.replace(task, parts=parts)


def _kept_engines(part: Part, former: Part | None) -> Part:
    if former is None or former.model != part.model:
        return part
    return msgspec.structs.replace(part, engines=former.engines)


def _with_weights(current: Base, base: Base) -> Base:
    """The current base with weights, and groups of tied parameters, that another head has brought."""
    weights = tuple(file for file in base.weights if file not in current.weights)
    tied = tuple(group for group in base.tied if group not in current.tied)
    return msgspec.structs.replace(
        current,
        weights=(*current.weights, *weights),
        tied=(*current.tied, *tied),
        structure=base.structure or current.structure,
    )


def _used(graphs: dict[str, Graph], tasks: dict[str, Task]) -> dict[str, Graph]:
    used = {part.graph for task in tasks.values() for part in task.parts.values()}
    return {digest: graphs[digest] for digest in sorted(used)}
