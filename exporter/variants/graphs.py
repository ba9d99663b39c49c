"""The graphs that a merged task is held against: the unadapted model, and the adapter left unmerged.

All are made of the merged graph by editing it, so that nothing but the named difference can differ.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporter.bundle.task_part import TaskPart
from exporter.graph.external_data import parsed_file, pointed
from lora.adapter import Change, LowRank, Replacement
from lora.errors import ExportError

# Where a merged weight is read: y = x · W, with the weight as the second input (Gemm: not transposed again).
READERS = ("MatMul", "Gemm")


def merged_graph(part: TaskPart) -> onnx.ModelProto:
    """The task's own graph; of one stored as factors, the graph that its merged tensors are put into."""
    return parsed_file(part.model_path, part.model)


def unadapted_graph(part: TaskPart) -> onnx.ModelProto:
    """The task's graph on the base's weights; what the base does not have (a trained head) stays the task's."""
    files = (*part.part.own_weights, *part.bundle.manifest.base.weights)
    return pointed(merged_graph(part), part.graph.weights, [part.bundle.tensors(file) for file in files])


def unmerged_graph(part: TaskPart) -> onnx.ModelProto:
    """The unadapted graph plus ``scaling · B · A · x`` beside every adapted weight, as an unmerged server computes it.

    Raises ExportError where an adapted weight is not read by a MatMul or Gemm.
    """
    graph = unadapted_graph(part)
    for parameter, changes in part.changes.items():
        for index, change in enumerate(changes):
            if not isinstance(change, Replacement):  # replaced tensors are the task's in this graph already
                _add_branch(graph.graph, parameter, change, index)
    return graph


def _add_branch(graph: onnx.GraphProto, parameter: str, update: Change, number: int = 0) -> None:
    """The branch of one update; of several adapters, a weight has several, which are numbered."""
    if not isinstance(update, LowRank) or update.magnitude is not None or update.layout not in ("linear", "transposed"):
        raise ExportError(
            f"'{parameter}' is changed by more than a low-rank product of a matrix; there is no unmerged arm for"
            " that yet"
        )
    readers = [(index, node) for index, node in enumerate(graph.node) if parameter in node.input]
    for index, node in reversed(readers):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = (
            node.op_type in READERS
            and node.input[1] == parameter
            and not attributes.get("transA")
            and attributes.get("alpha", 1.0) == 1.0
        )
        if not plain:
            raise ExportError(
                f"'{parameter}' is read by a {node.op_type} in a way that has no unmerged arm; expected x · W by"
                f" {' or '.join(READERS)}"
            )
        for position, branch in enumerate(_branch(node, update, number)):
            graph.node.insert(index + 1 + position, branch)
    dtype = next(tensor.data_type for tensor in graph.initializer if tensor.name == parameter)
    down, up = update.a.T.astype(np.float32), (update.b.astype(np.float32) * np.float32(update.scaling)).T
    for name, values in ((_name(update, "A", number), down), (_name(update, "B", number), up)):
        graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(values.astype(helper.tensor_dtype_to_np_dtype(dtype))), name)
        )


def _branch(node: onnx.NodeProto, update: LowRank, number: int) -> list[onnx.NodeProto]:
    """MatMul(x, Aᵀ), MatMul(·, scaling · Bᵀ), and the sum with the dense product under the output's name."""
    output = node.output[0]
    dense, reduced, delta = (f"{output}.{part}{number or ''}" for part in ("dense", "lora_A", "lora_B"))
    node.output[0] = dense
    return [
        helper.make_node("MatMul", [node.input[0], _name(update, "A", number)], [reduced]),
        helper.make_node("MatMul", [reduced, _name(update, "B", number)], [delta]),
        helper.make_node("Add", [dense, delta], [output]),
    ]


def _name(update: LowRank, factor: str, number: int) -> str:
    return f"{update.module}.lora_{factor}{number or ''}.weight"
