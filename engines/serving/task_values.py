"""What moves when an engine goes from one task to another: the tensors that either changes, and no others."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.bundle.changes import (
    base_stored,
    brought_whole,
    bundled_changes,
    in_graph_order,
    merged_at_load,
    own_names,
    own_stored,
)
from exporter.bundle.manifest import Bundle
from lora.errors import BundleError
from lora.files.tensorfile import Array


def changed_names(bundle: Bundle, task: str) -> frozenset[str]:
    """The parameters whose values are the task's and not the base's."""
    merged = bundled_changes(bundle, task) if bundle.task(task).store == "factors" else {}
    return own_names(bundle, task) | {name for name, changes in merged.items() if not brought_whole(changes)}


def task_values(bundle: Bundle, task: str, names: Iterable[str], adapted: bool = True) -> dict[str, Array]:
    """The task's values of these parameters, in the graph's axis order: its own where it changes them, else the base's.

    To go from one task to another, ``names`` are what either changes: what only the former changed goes back to the
    base. Without ``adapted``, the base's wherever it has them; a head that the task brought stays.
    """
    base = base_stored(bundle, task)
    own = {**own_stored(bundle, task), **merged_at_load(bundle, task, base)}
    first, second = (own, base) if adapted else (base, own)
    values = {}
    for name in names:
        if name not in own and name not in base:
            raise BundleError(
                f"{bundle.path}: neither the base nor task '{task}' has the weight '{name}'; export the task again"
            )
        values[name] = first[name] if name in first else second[name]
    return in_graph_order(bundle, task, values)
