"""The tensors that are merged when a task is loaded, and the axis order in which its graph reads them."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.bundle.layout import to_graph
from exporter.bundle.task_part import TaskPart
from lora.files.tensorfile import Array
from lora.merging.merge import merge


def merged_at_load(part: TaskPart) -> dict[str, Array]:
    """The tensors that loading the task must merge, by parameter name and in the model's axis order.

    The same numbers as a dense export stores: W + ΔW in float32, rounded once. None of a dense task. Raises
    AdapterError as the merge does.
    """
    if not part.merged_at_load:
        return {}
    source = part.bundle.path / part.task.adapter[0].path
    return {merged.parameter: merged.stored for merged in merge(part.base, part.merged_at_load, source)}


def in_graph_order(part: TaskPart, values: Mapping[str, Array]) -> dict[str, Array]:
    """``values`` as the graph's initializers of those names have them."""
    return {name: to_graph(tensor, part.graph.weights[name].order) for name, tensor in values.items()}
