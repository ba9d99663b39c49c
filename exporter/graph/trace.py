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
import torch
from torch.export import ExportedProgram

from exporter.graph.decompose import decomposed_in_place
from exporter.graph.fold_transposes import Permutation, fold_weight_transposes
from exporter.graph.optimize import FOLD_LIMIT, optimize
from exporter.graph.precision import keep_in_float32
from exporter.graph.signature import Signature
from lora.collector import uncollected

MODEL = "model."  # where a signature's module keeps the model


@dataclass(frozen=True)
class Trace:
    """A dense graph without values: every weight is an external initializer that lies nowhere yet.

    ``weights`` maps each weight's name to the axis order in which the graph stores it, or None for the model's own.
    ``longest`` are the sizes up to which torch says that the graph holds, of those dynamic axes where it says so: the
    model's code took one branch of two, by a size.
    """

    graph: onnx.ModelProto
    weights: dict[str, Permutation | None]
    longest: dict[str, int]


def trace(signature: Signature) -> Trace:
    """Trace the signature's module.

    Weights bear the names they have in ``signature.module.model``, a tied one the first of its names.

    Values are no part of the graph, and the module's floating-point parameters and persistent buffers are overwritten:
    pass one made for this purpose.
    """
    names = _fill_with_dummies(signature.module)
    signature.module.requires_grad_(False)  # a sixth of the tracing time is spent on gradients that nobody asks for
    without_cache = torch._dynamo.config.patch(
        fake_tensor_cache_enabled=False
    )  # with symbolic sizes it costs more than it saves
    # Tracing makes millions of objects that stay; looking for garbage among them takes a tenth of its time.
    with _quiet(), uncollected(), without_cache, decomposed_in_place():
        program = torch.onnx.export(
            signature.module.eval(),
            kwargs={"inputs": signature.inputs},
            input_names=list(signature.inputs),
            output_names=list(signature.outputs),
            dynamic_shapes={"inputs": signature.axes},
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        graph, longest = program.model, _longest(program.exported_program, signature)
        optimize(graph, names.__contains__)
    weights = _with_names_of_the_model(graph, names)
    permutations = fold_weight_transposes(graph)
    stored = {name: permutations.get(name) for name in weights}
    keep_in_float32(graph)
    _forget_values(graph, stored)
    _forget_origins(graph)
    return Trace(ir.to_proto(graph), stored, longest)


def _longest(program: ExportedProgram | None, signature: Signature) -> dict[str, int]:
    """{dynamic axis: the largest size that the traced program holds for}, of axes that have one.

    https://docs.pytorch.org/docs/stable/export/api_reference.html: ``range_constraints``
    """
    assert program is not None
    highest = {symbol: range_.upper for symbol, range_ in program.range_constraints.items()}
    inputs = [node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    longest: dict[str, int] = {}
    for tensor, axes in zip(inputs, (signature.axes.get(name, {}) for name in signature.inputs), strict=True):
        for axis, name in axes.items():
            upper = highest.get(getattr(tensor.shape[axis].node, "expr", None))
            if upper is not None and upper.is_Integer:
                longest[name] = min(int(upper), longest.get(name, int(upper)))
    return longest


def _fill_with_dummies(module: torch.nn.Module) -> dict[str, str]:
    """Give every weight unique values.

    Returns {name in ``module``: name in ``module.model``, of a tied weight the first}.

    The head of a weight makes it unique. The rest of a large one is not even touched: its memory is never needed.
    """
    generator = torch.Generator().manual_seed(0)
    first: dict[int, str] = {}
    names = {}
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                head = tensor.view(-1)[:FOLD_LIMIT]
                head.copy_(torch.rand(head.shape, generator=generator) * 0.02 + 0.01)
                names[name] = first.setdefault(id(tensor), name.removeprefix(MODEL))
    return names


def _with_names_of_the_model(graph: ir.Model, names: Mapping[str, str]) -> list[str]:
    """Rename the initializers that are weights, and return their new names in the graph's order."""
    initializers = graph.graph.initializers
    weights = []
    for name in [name for name in initializers if name in names]:
        value = initializers.pop(name)
        value.name = names[name]
        initializers.add(value)
        weights.append(names[name])
    return weights


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
