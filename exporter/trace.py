"""Tracing: from a torch module to a dense ONNX graph whose weights keep their names.

The graph must not depend on the weights' values, or base and task would differ: ONNX optimizers drop all-zero biases
and merge equal tensors. So every weight holds unique dummy values while the graph is traced and optimized, and only
names, shapes and axis orders are kept of it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch

from exporter.fold_transposes import Permutation, fold_weight_transposes, is_weight_transpose

# Larger constants are weights; folding them would lose their names.
FOLD_LIMIT = 1024


@dataclass(frozen=True)
class Trace:
    """A dense graph without values: every weight is an external initializer that lies nowhere yet.

    ``weights`` maps each weight's name to the axis order in which the graph stores it, or None for the model's own.
    """

    graph: onnx.ModelProto
    weights: dict[str, Permutation | None]


def trace(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], outputs: tuple[str, ...], axes: Mapping[int, str]) -> Trace:
    """Trace ``module(**inputs)``; the ``axes`` of every input are dynamic and bear the names given.

    The module's floating-point parameters and persistent buffers are overwritten: pass one made for this purpose.
    """
    weights = _fill_with_dummies(module)
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=dict(inputs),
            output_names=list(outputs),
            dynamic_shapes={name: dict(axes) for name in inputs},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        graph = program.model
        onnxscript.optimizer.optimize_ir(
            graph,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=lambda node: False if is_weight_transpose(node) else None,
        )
    permutations = fold_weight_transposes(graph)
    stored = {name: permutations.get(name) for name in graph.graph.initializers if name in weights}
    _forget_values(graph, stored)
    _forget_origins(graph)
    return Trace(ir.to_proto(graph), stored)


def _fill_with_dummies(module: torch.nn.Module) -> set[str]:
    """Give every weight unique values; return the weights' names, each alias of a tied one included."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    with torch.no_grad():
        for tensor in weights.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.02 + 0.01)
    return set(weights)


def _forget_values(model: ir.Model, weights: Mapping[str, Permutation | None]) -> None:
    for name in weights:
        value = model.graph.initializers[name]
        assert value.dtype is not None
        assert isinstance(value.shape, ir.Shape)
        value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=name, base_dir="")


def _forget_origins(model: ir.Model) -> None:
    """Drop the exporter's notes (stack traces with paths of this machine): they are no part of the model."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_version = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own deprecations and of torchvision's absence; neither is the user's business."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
