"""Decomposing a traced program in place, where that takes no more than exchanging a few operators.

`torch.onnx.export` decomposes what it has traced by `ExportedProgram.run_decompositions`, which traces the program
again, and twice: of an export's time, a third. But a model in evaluation mode uses few operators that ONNX has no
function for, and each of them stands for one other operator or for none: dropout, `contiguous`, `detach_`, casts. Where
these are all, exchanging them gives the graph that tracing again gives.

The patch of ``run_decompositions`` can go when `torch.onnx.export` no longer traces a program again to decompose it
(torch 2.13 does), or takes one that is decomposed already.

ExportedProgram: https://docs.pytorch.org/docs/stable/export/api_reference.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch.export import ExportedProgram
from torch.fx import Node

Table = Mapping[Any, Callable[..., Any]]

aten = torch.ops.aten
# Composed of others, but ONNX has a function for them. `contiguous` stays although a graph knows no strides, because
# torch checks them once more.
KEPT = {aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints}
# They return their first argument: in evaluation mode, and where nobody asks for gradients.
NOTHING = {aten.dropout.default, aten.detach.default, aten.detach_.default}
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device}
SAME = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.min.other: aten.minimum.default}


@contextmanager
def decomposed_in_place() -> Iterator[None]:
    """Inside, ``ExportedProgram.run_decompositions`` exchanges operators in place where that is enough.

    Where it is not, it traces again, as torch does.
    """
    trace_again: Callable[[ExportedProgram, dict[Any, Any]], ExportedProgram] = ExportedProgram.run_decompositions

    def run_decompositions(program: ExportedProgram, table: Table) -> ExportedProgram:
        nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
        if not all(_stays(node, table) or _is_exchanged(node) for node in nodes):
            return trace_again(program, dict(table))
        for node in nodes:
            _exchange(node, program)
        program.graph.eliminate_dead_code()
        program.graph_module.recompile()
        return program

    with patch.object(ExportedProgram, "run_decompositions", run_decompositions):
        yield


def _stays(node: Node, table: Table) -> bool:
    """Whether tracing again would keep the node: its operator changes no tensor, and no rule takes it apart.

    ``table`` has no rule for an operator that ONNX has a function for. Torch takes others apart without a table, if
    they are composed of others and not among those that it can be asked to keep.
    """
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return node.op == "call_function" and not isinstance(
            operator, torch._ops.HigherOrderOperator
        )  # arithmetic of sizes
    composed = operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return (
        not operator._schema.is_mutable
        and operator not in table
        and (not composed or operator in KEPT or operator in _kept_if_asked())
    )


@cache
def _kept_if_asked() -> frozenset[Any]:
    return frozenset(torch.export.default_decompositions())


def _is_exchanged(node: Node) -> bool:
    if node.target is aten.dropout.default:
        return node.args[2] is False
    return node.target in NOTHING or node.target in CASTS or node.target in SAME


def _exchange(node: Node, program: ExportedProgram) -> None:
    if node.target in SAME:
        node.target = SAME[node.target]
    elif node.target in CASTS and _dtype(node) != _dtype(node.args[0]):
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": _dtype(node)}
    elif node.target in NOTHING or node.target in CASTS:
        same = node.args[0]
        assert isinstance(same, Node)
        node.replace_all_uses_with(same)
        program.graph_signature.replace_all_uses(node.name, same.name)
        program.graph.erase_node(node)


def _dtype(node: Any) -> torch.dtype:
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype
