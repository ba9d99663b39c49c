"""The precision of a graph: which dtype weights and products have, and what is computed in float32 all the same.

The graph is strongly typed: every dtype is written in it, and no builder is asked to choose. In float16 an exponential
or a sum can exceed 65504, in bfloat16 a sum loses its small terms, so softmax and reductions keep float32 inside.
LayerNormalization's statistics are float32 by the operator's own definition (its ``stash_type``), and transformers
computes RMS norms in float32 itself.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from exporter.bundle.records import Precision
from lora.errors import ExportError
from lora.files.tensorfile import Array

# https://onnx.ai/onnx/operators/
IN_FLOAT32 = frozenset(
    {
        "Softmax",
        "LogSoftmax",
        "ReduceSum",
        "ReduceMean",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSumExp",
        "CumSum",
    }
)
HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of that name."""
    dtype = getattr(torch, precision)
    assert isinstance(dtype, torch.dtype)
    return dtype


def keep_in_float32(model: ir.Model) -> None:
    """Compute softmax and reductions in float32, between two casts, where the graph has them in half precision.

    The sum of scores and mask before a softmax is widened too: float16's mask of -65504 and a low score give minus
    infinity, and a row of padding that is nothing else becomes NaN.
    """
    for node in list(model.graph.all_nodes()):
        half = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
        if node.op_type in IN_FLOAT32 and half in HALVES:
            _compute_in_float32(node, half)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Softmax":
            _widen_masked_scores(node)


def stored_as(name: str, values: Array, dtype: np.dtype[np.generic], source: object) -> Array:
    """``values`` rounded to ``dtype``. Raises ExportError where a finite weight becomes infinite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype, copy=False)
    if stored.dtype == np.float16 and not np.isfinite(stored).all() and np.isfinite(values).all():
        raise ExportError(
            f"{source}: weight '{name}' overflows float16 (its largest is {np.abs(values).max():.3g}); export in"
            " bfloat16 or float32"
        )
    return stored


def _compute_in_float32(node: ir.Node, half: ir.DataType) -> None:
    result = node.outputs[0]
    narrowed = ir.node("Cast", [result], {"to": half})
    _like(narrowed.outputs[0], result, half)
    _widen(node, 0)
    assert node.graph is not None
    node.graph.insert_after(node, narrowed)
    result.replace_all_uses_with(narrowed.outputs[0], replace_graph_outputs=True)
    narrowed.replace_input_with(0, result)
    result.dtype = ir.DataType.FLOAT


def _widen_masked_scores(softmax: ir.Node) -> None:
    """Add(scores, mask) in half, cast to float32 for the softmax, becomes an Add of float32."""
    cast = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    masked = (
        cast.inputs[0].producer()
        if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None
        else None
    )
    if (
        cast is None
        or masked is None
        or masked.op_type != "Add"
        or masked.outputs[0].dtype not in HALVES
        or len(masked.outputs[0].uses()) != 1
    ):
        return
    for index in range(len(masked.inputs)):
        _widen(masked, index)
    masked.outputs[0].dtype = ir.DataType.FLOAT
    cast.outputs[0].replace_all_uses_with(masked.outputs[0])
    assert masked.graph is not None
    masked.graph.remove(cast, safe=True)


def _widen(node: ir.Node, index: int) -> None:
    """Give ``node`` that input in float32."""
    value, graph = node.inputs[index], node.graph
    assert value is not None
    assert graph is not None
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
    _like(cast.outputs[0], value, ir.DataType.FLOAT)
    graph.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])


def _like(value: ir.Value, other: ir.Value, dtype: ir.DataType) -> None:
    value.shape = other.shape
    value.dtype = dtype
