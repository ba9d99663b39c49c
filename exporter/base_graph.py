"""The dense graph of a head over a base: a task's in the bundle where there is one, else traced."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from exporter.bundle.layout import ModelWeights, Order, key, to_graph
from exporter.bundle.manifest import Bundle
from exporter.bundle.recipe import Recipe
from exporter.bundle.records import File, Graph, Head, Port, Precision, Weight
from exporter.bundle.staging import named_by_content
from exporter.graph.external_data import parsed_file
from exporter.source import Source
from lora.bases.structure import BaseStructure
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import Array, Lazy, TensorFile, numpy_dtype, write_tensors
from lora.progress import Progress

# Dynamic axes that count tokens.
LENGTHS = ("sequence", "decoder_sequence", "past_sequence", "total_sequence")


@dataclass(frozen=True)
class BaseGraph:
    """A graph and the files that hold the base's values; ``added`` are those that are not in the bundle yet.

    ``structure`` is what is known of the parameters: what the bundle keeps, or was found when the graph was traced.
    """

    graph: Graph
    proto: onnx.ModelProto
    weights: tuple[TensorFile, ...]
    added: tuple[File, ...]
    traced: bool
    structure: BaseStructure | None = None

    @property
    def stored(self) -> ModelWeights:
        """The base's values for this graph; a head of another size that the files hold for another graph is not one."""
        return ModelWeights(self.weights, self.graph.weights)


def known_graph(
    existing: Bundle, role: str, head: Head, weights: tuple[TensorFile, ...], structure: BaseStructure | None
) -> BaseGraph | None:
    """The graph of a task in the bundle that has the same head; none where no undamaged one has.

    ``structure`` is the bundle's.
    """
    for task in existing.manifest.tasks.values():
        part = task.parts.get(role)
        if part is not None and existing.manifest.graphs[part.graph].head == head:
            with suppress(BundleError):
                proto = parsed_file(existing.path / part.model.path, existing.content(part.model))
                graph = existing.manifest.graphs[part.graph]
                return BaseGraph(graph, proto, weights, added=(), traced=False, structure=structure)
    return None


def traced_graph(
    source: Source,
    role: str,
    head: Head,
    precision: Precision,
    recipe: Recipe,
    held: tuple[TensorFile, ...],
    stage: Path,
    progress: Progress,
) -> BaseGraph:
    """Trace the base with ``head``, and stage those of its weights that no file of ``held`` has yet."""
    progress("tracing the base model (once for this head)")
    graph, proto = _trace(source, role, head, precision)
    structure = source.structure(role, head)
    progress("writing the base's weights")
    values, present = source.weights(role, head, recipe.replaced), ModelWeights(held, graph.weights)
    absent = {
        key(name, weight.order): _stored(name, values[name], weight, source.name)
        for name, weight in graph.weights.items()
        if name in values and name not in present
    }
    if not absent:
        return BaseGraph(graph, proto, held, added=(), traced=True, structure=structure)
    write_tensors(stage / "base.safetensors", absent)
    added = named_by_content(stage / "base.safetensors", "base")
    weights = (*held, TensorFile(stage / added.path))
    return BaseGraph(graph, proto, weights, added=(added,), traced=True, structure=structure)


def held_weights(bundle: Bundle) -> tuple[TensorFile, ...]:
    """The files of the base's weights, without damaged ones: an export writes those again."""
    held = []
    for file in bundle.manifest.base.weights:
        with suppress(BundleError):
            held.append(bundle.tensors(file))
    return tuple(held)


def weight_map(proto: onnx.ModelProto, orders: Mapping[str, Order]) -> dict[str, Weight]:
    """{weight: its order, and the shape and dtype that its initializer has in ``proto``}."""
    return {
        tensor.name: Weight(orders[tensor.name], tuple(tensor.dims), _dtype(tensor.data_type))
        for tensor in proto.graph.initializer
        if tensor.name in orders
    }


def _trace(source: Source, role: str, head: Head, precision: Precision) -> tuple[Graph, onnx.ModelProto]:
    from exporter.graph.trace import trace

    asked = source.signature(role, head, precision)
    try:
        traced = trace(asked)
    except Exception as error:  # torch raises classes of its own that share no root but Exception
        reason = textwrap.shorten(str(error.__cause__ or error), 300, placeholder=" …")
        raise ExportError(
            f"{source.name}: torch can't trace this as a {head.task_type} model ({reason}); export it from Python as a"
            " module of your own"
        ) from error
    inputs, outputs = (tuple(map(_port, values)) for values in (traced.graph.graph.input, traced.graph.graph.output))
    _refuse_short(source, head, traced.longest)
    weights = weight_map(traced.graph, traced.weights)
    return Graph(part=role, head=head, inputs=inputs, outputs=outputs, weights=weights), traced.graph


def _refuse_short(source: Source, head: Head, longest: Mapping[str, int]) -> None:
    """Raises ExportError where the graph would be wrong for lengths that the base takes."""
    short = {axis: size for axis, size in longest.items() if axis in LENGTHS and size < source.longest}
    for axis, size in sorted(short.items()):
        raise ExportError(
            f"{source.name}: traced as a {head.task_type} model, the graph holds for a {axis} of at most {size}, and"
            f" the base takes {source.longest}: the model's code decides by this length what it computes. Choose a"
            " configuration of it that does not (of BigBird, attention_type 'original_full')"
        )


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return Port(name=value.name, dtype=_dtype(tensor.elem_type), shape=shape)


def _dtype(onnx_type: int) -> str:
    return np.dtype(helper.tensor_dtype_to_np_dtype(onnx_type)).name


def _stored(name: str, values: Array, weight: Weight, source: str) -> Lazy:
    from exporter.graph.precision import stored_as

    dtype = numpy_dtype(weight.dtype)
    return Lazy(dtype, weight.shape, lambda: to_graph(stored_as(name, values, dtype, source), weight.order))
