"""What a bundle holds, task by task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from exporter.bundle.records import MODEL, Graph, Manifest, Task, task_files


@dataclass(frozen=True)
class Listed:
    """One task, in words: its head, how it is stored, its graphs, the bytes of its files, its labels and engines."""

    task: str
    head: str
    store: str
    graph: str
    size: int
    labels: tuple[str, ...]
    engines: tuple[str, ...]


def listing(manifest: Manifest) -> tuple[Listed, ...]:
    """The tasks in order of their names; a graph that several share counts for none of them."""
    users = Counter(file.path for task in manifest.tasks.values() for file in set(task_files(task)))
    return tuple(_listed(name, task, manifest, users) for name, task in sorted(manifest.tasks.items()))


def base_size(manifest: Manifest) -> int:
    """The bytes that the tasks share."""
    base = manifest.base
    structure = () if base.structure is None else (base.structure,)
    return sum(file.size for file in (*base.weights, *base.files, *structure))


def _listed(name: str, task: Task, manifest: Manifest, users: Counter[str]) -> Listed:
    graphs = {role: part.graph for role, part in sorted(task.parts.items())}
    engines = {
        f"{engine.backend} ({engine.target})" if engine.target else engine.backend
        for part in task.parts.values()
        for engine in part.engines
    }
    return Listed(
        task=name,
        head="; ".join(_head(role, manifest.graphs[digest]) for role, digest in graphs.items()),
        store=task.store if task.adapter else "the base itself",
        graph=", ".join(graphs.values()),
        size=sum(file.size for file in set(task_files(task)) if users[file.path] == 1),
        labels=task.labels,
        engines=tuple(sorted(engines)),
    )


def _head(role: str, graph: Graph) -> str:
    words = f"{graph.head.task_type}, {graph.head.outputs} outputs"
    return words if role == MODEL else f"{role}: {words}"
