"""What a bundle holds, task by task."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from exporter.bundle.manifest import Manifest, task_files


@dataclass(frozen=True)
class Listed:
    """One task: its head in words, how it is stored, the digest of its graph, the bytes of its own files, its labels
    and engines.
    """

    task: str
    head: str
    store: str
    graph: str
    size: int
    labels: tuple[str, ...]
    engines: tuple[str, ...]


def listing(manifest: Manifest) -> tuple[Listed, ...]:
    """The tasks in order of their names; a graph that several share counts for none of them."""
    users = Counter(file.path for task in manifest.tasks.values() for file in task_files(task))
    return tuple(
        Listed(
            task=name,
            head=f"{manifest.graphs[task.graph].head.task_type}, {manifest.graphs[task.graph].head.outputs} outputs",
            store=task.store if task.adapter else "the base itself",
            graph=task.graph,
            size=sum(file.size for file in task_files(task) if users[file.path] == 1),
            labels=task.labels,
            engines=tuple(sorted(task.engines)),
        )
        for name, task in sorted(manifest.tasks.items())
    )


def base_size(manifest: Manifest) -> int:
    """The bytes that the tasks share."""
    return sum(file.size for file in (*manifest.base.weights, *manifest.base.files))
