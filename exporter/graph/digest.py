"""A digest of a graph that leaves out the weights' values: equal digests, equal computation, equal cost.

It covers opset, inputs, outputs, nodes in order, attributes, edges, every initializer's name, shape and dtype, and the
values of inline constants (axes, epsilons). It leaves out what an external initializer holds and where, and the names
of intermediate values, which depend on the exporter's counters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import onnx
from onnx import numpy_helper


def graph_digest(model: onnx.ModelProto) -> str:
    """SHA-256 in hex of the canonical form of ``model``."""
    digest = hashlib.sha256()
    for opset in sorted(model.opset_import, key=lambda opset: opset.domain):
        digest.update(f"opset {opset.domain} {opset.version}\n".encode())
    for function in model.functions:
        digest.update(function.SerializeToString(deterministic=True))
    for line in _canonical(model.graph, {}):
        digest.update(line + b"\n")
    return digest.hexdigest()


def _canonical(graph: onnx.GraphProto, outer: dict[str, str]) -> Iterator[bytes]:
    names = dict(outer)
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            yield f"{kind} {value.name} ".encode() + value.type.SerializeToString(deterministic=True)
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        yield f"initializer {tensor.name} {tensor.data_type} {list(tensor.dims)}".encode() + _inline_value(tensor)
    for value in (*graph.input, *graph.output, *graph.initializer):
        names[value.name] = value.name
    for node in graph.node:
        for name in node.output:
            if name:
                names.setdefault(name, f"%{len(names)}")
        edges = [[names[name] if name else "" for name in side] for side in (node.input, node.output)]
        yield f"node {node.domain} {node.op_type} {node.overload} {edges}".encode()
        for attribute in sorted(node.attribute, key=lambda attribute: attribute.name):
            yield from _attribute(attribute, names)


def _attribute(attribute: onnx.AttributeProto, names: dict[str, str]) -> Iterator[bytes]:
    graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
    if not graphs:
        yield attribute.SerializeToString(deterministic=True)
    for graph in graphs:
        yield f"subgraph {attribute.name}".encode()
        yield from _canonical(graph, names)


def _inline_value(tensor: onnx.TensorProto) -> bytes:
    return b"" if tensor.data_location == onnx.TensorProto.EXTERNAL else b" " + numpy_helper.to_array(tensor).tobytes()
