"""Taking a task out of a bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec

from exporter.bundle.manifest import Bundle, Manifest, open_bundle
from exporter.bundle.staging import amend, staging


def remove_task(path: Path, task: str) -> Bundle:
    """Remove ``task``, its files and its engines; the base's weights stay.

    Raises BundleError when there is no such task.
    """
    open_bundle(path).task(task)

    def without(current: Bundle) -> Manifest:
        current.task(task)  # it may have gone meanwhile
        tasks = {name: record for name, record in current.manifest.tasks.items() if name != task}
        used = {record.graph for record in tasks.values()}
        graphs = {digest: graph for digest, graph in current.manifest.graphs.items() if digest in used}
        return msgspec.structs.replace(current.manifest, tasks=tasks, graphs=graphs)

    with staging(path) as stage:
        return amend(path, stage, without)
