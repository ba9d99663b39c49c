"""How far two engines may be apart that compute one ONNX graph in float32: derived from the graph, not from a machine.

An engine chooses the order of its sums by the processor, and whether a product is rounded before it is added. Each
choice rounds otherwise, and none is the right one, so an engine is held to the exact value, and two engines to twice
its bound.

The error of a sum of n terms is at most λ·√n·u, with u = 2⁻²⁴, but for a probability of 2·exp(−λ²/2): Higham and Mary
2019, A new approach to probabilistic rounding error analysis, theorem 2.4, https://doi.org/10.1137/18M1226312. Errors
of sums that follow one another are independent, so their squares add up, and n is what the longest path through the
graph adds up. That the error is a share of the largest output holds for networks that do not amplify: residual sums and
norms keep them so.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx

UNIT = 2.0**-24  # of float32: half the distance from 1 to the next number
LAMBDA = 6.0  # one sum in 3·10⁷ is further off


def sums_bound(terms: int) -> float:
    """How far a result of sums of ``terms`` terms in all, one after the other, may be from the exact, as a share of the
    largest.
    """
    return LAMBDA * UNIT * math.sqrt(terms)


def engine_bound(model: Path | onnx.ModelProto, length: int) -> float:
    """How far an engine may be from the exact outputs, as a share of the largest; sequences of at most ``length``."""
    return sums_bound(summed(model, length))


def engines_bound(model: Path | onnx.ModelProto, length: int) -> float:
    """How far two engines may be apart, as a share of the largest output."""
    return 2 * engine_bound(model, length)


def summed(model: Path | onnx.ModelProto, length: int) -> int:
    """How many terms are added on the longest path from an input to an output; axes of no fixed size are ``length``
    long.
    """
    loaded = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    graph = onnx.shape_inference.infer_shapes(loaded).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = [axis.dim_value or length for axis in value.type.tensor_type.shape.dim]
    longest: dict[str, int] = {}
    for node in graph.node:  # each after those that it reads
        terms = max((longest.get(name, 0) for name in node.input), default=0) + _terms(node, shapes, length)
        longest |= dict.fromkeys(node.output, terms)
    return max(longest[value.name] for value in graph.output)


def _terms(node: onnx.NodeProto, shapes: dict[str, list[int]], length: int) -> int:
    """How many terms one element of the node's output is the sum of; 1 where it is rounded once."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    first = shapes.get(node.input[0], []) if node.input else []
    match node.op_type:
        case "Gemm":
            return first[0 if "transA" in attributes and attributes["transA"].i else 1] + 1
        case "Conv":
            return math.prod(shapes[node.input[1]][1:]) + 1
        case "GRU" | "LSTM" | "RNN":
            return length * (shapes[node.input[1]][-1] + shapes[node.input[2]][-1])
        case "MatMul" | "Softmax" | "LayerNormalization" | "RMSNormalization" | "ReduceMean" | "ReduceSum" | "ReduceL2":
            return first[-1]
        case _:
            return 1
