"""What moves when an engine goes from one task to another: the tensors that either changes, and no others."""

from __future__ import annotations

from collections.abc import Iterable

from exporter.bundle.changes import in_graph_order, merged_at_load
from exporter.bundle.task_part import TaskPart
from lora.errors import BundleError
from lora.files.tensorfile import Array


def task_values(part: TaskPart, names: Iterable[str], adapted: bool = True) -> dict[str, Array]:
    """The task's values of these parameters, in the graph's axis order: its own where it changes them, else the base's.

    To go from one task to another, ``names`` are what either changes: what only the former changed goes back to the
    base. Without ``adapted``, the base's wherever it has them; a head that the task brought stays.
    """
    own = {**part.own, **merged_at_load(part)}
    first, second = (own, part.base) if adapted else (part.base, own)
    values = {}
    for name in names:
        if name not in own and name not in part.base:
            raise BundleError(
                f"{part.bundle.path}: neither the base nor task '{part.name}' has the weight '{name}'; export the task"
                " again"
            )
        values[name] = first[name] if name in first else second[name]
    return in_graph_order(part, values)
