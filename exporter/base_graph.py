"""The dense graph of a head over a base: a task's in the bundle where there is one, else traced."""

from __future__ import annotations

import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from exporter.bundle.layout import ModelWeights, Shapes, WeightMap, key, to_graph
from exporter.bundle.manifest import Bundle, File, Graph, Head, Port, Precision
from exporter.bundle.staging import named_by_content
from exporter.graph.external_data import load_graph
from exporter.source import Source
from lora.adapter import Adapter
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import Array, Lazy, TensorFile, numpy_dtype, write_tensors
from lora.progress import Progress

Dtype = np.dtype[np.generic]


@dataclass(frozen=True)
class Dense:
    """The graph, the dtypes of its weights, and the files that hold the base's values; ``added`` are those not in the
    bundle yet.
    """

    graph: Graph
    proto: onnx.ModelProto
    dtypes: dict[str, Dtype]
    weights: tuple[TensorFile, ...]
    added: tuple[File, ...]
    traced: bool

    @property
    def stored(self) -> ModelWeights:
        """The base's values for this graph; a head of another size that the files hold for another graph is not one."""
        return ModelWeights(self.weights, self.graph.weights, _shapes(self.proto, self.graph.weights))


def known_dense(existing: Bundle, head: Head, weights: tuple[TensorFile, ...]) -> Dense | None:
    """The graph of a task in the bundle that has the same head; none where no undamaged one has."""
    for task in existing.manifest.tasks.values():
        graph = existing.graph(task)
        if graph.head == head:
            with suppress(BundleError):
                proto = load_graph(existing.checked(task.model))
                return Dense(graph, proto, _dtypes(proto), weights, added=(), traced=False)
    return None


def traced_dense(
    source: Source,
    head: Head,
    precision: Precision,
    adapter: Adapter,
    held: tuple[TensorFile, ...],
    stage: Path,
    progress: Progress,
) -> Dense:
    """Trace the base with ``head``, and stage those of its weights that no file of ``held`` has yet."""
    progress("tracing the base model (once for this head)")
    graph, proto = _trace(source, head, precision)
    progress("writing the base's weights")
    values, dtypes = source.weights(head, adapter.replaced), _dtypes(proto)
    present = ModelWeights(held, graph.weights, _shapes(proto, graph.weights))
    absent = {
        key(name, order): _stored(name, values[name], order, dtypes[name], source.name)
        for name, order in graph.weights.items()
        if name in values and name not in present
    }
    if not absent:
        return Dense(graph, proto, dtypes, held, added=(), traced=True)
    write_tensors(stage / "base.safetensors", absent)
    added = named_by_content(stage / "base.safetensors", "base")
    return Dense(graph, proto, dtypes, (*held, TensorFile(stage / added.path)), added=(added,), traced=True)


def held_weights(bundle: Bundle) -> tuple[TensorFile, ...]:
    """The files of the base's weights, without damaged ones: an export writes those again."""
    held = []
    for file in bundle.manifest.base.weights:
        with suppress(BundleError):
            held.append(TensorFile(bundle.checked(file)))
    return tuple(held)


def _trace(source: Source, head: Head, precision: Precision) -> tuple[Graph, onnx.ModelProto]:
    from exporter.graph.trace import trace

    asked = source.signature(head, precision)
    try:
        traced = trace(asked)
    except Exception as error:  # torch raises classes of its own that share no root but Exception
        reason = textwrap.shorten(str(error.__cause__ or error), 300, placeholder=" …")
        raise ExportError(
            f"{source.name}: torch can't trace this as a {head.task_type} model ({reason}); export it from Python as a"
            " module of your own"
        ) from error
    inputs, outputs = (tuple(map(_port, values)) for values in (traced.graph.graph.input, traced.graph.graph.output))
    return Graph(head=head, inputs=inputs, outputs=outputs, weights=traced.weights), traced.graph


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return Port(name=value.name, dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))


def _dtypes(proto: onnx.ModelProto) -> dict[str, Dtype]:
    """By name; bfloat16 as ml_dtypes has it, which safetensors files are read with."""
    return {
        tensor.name: numpy_dtype(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).name)
        for tensor in proto.graph.initializer
    }


def _shapes(proto: onnx.ModelProto, weights: WeightMap) -> Shapes:
    """By the key under which a file keeps the weight."""
    return {
        key(tensor.name, weights[tensor.name]): tuple(tensor.dims)
        for tensor in proto.graph.initializer
        if tensor.name in weights
    }


def _stored(name: str, values: Array, order: tuple[int, ...] | None, dtype: Dtype, source: str) -> Lazy:
    from exporter.graph.precision import stored_as

    shape = values.shape if order is None else tuple(values.shape[axis] for axis in order)
    return Lazy(dtype, shape, lambda: to_graph(stored_as(name, values, dtype, source), order))
