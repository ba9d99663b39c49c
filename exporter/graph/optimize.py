"""Simplifying a traced graph without touching a weight: constants are folded, redundant nodes removed, nothing else.

onnxscript's default optimization also folds and fuses weights (a BatchNorm into a convolution, a bias of zeros away),
which loses their names and makes the graph depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules import common as rules

# Larger constants are no axes, shapes or masks; folding them would only make the file larger.
FOLD_LIMIT = 1024
# The second round finds what the first one made adjacent; a third finds nothing.
ROUNDS = 2

# Shapes and casts only. Rules that read values (add 0, multiply by 1) see constants: no weight is 0 or 1 while it is
# traced.
RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.no_op_expand_rule,
    rules.materialize_reshape_shape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.slice_split_rule,
)


def optimize(model: ir.Model, is_weight: Callable[[str | None], bool]) -> None:
    """Simplify ``model`` in place; a node that reads a weight is never folded, however small the weight."""

    def kept(node: ir.Node) -> bool | None:
        return (
            False
            if any(value is not None and value.is_initializer() and is_weight(value.name) for value in node.inputs)
            else None
        )

    def fold() -> None:
        fold_constants(
            model,
            onnx_shape_inference=True,
            input_size_limit=FOLD_LIMIT,
            output_size_limit=FOLD_LIMIT,
            should_fold=kept,
        )

    common.InlinePass()(model)
    for _ in range(ROUNDS):
        fold()
        RewritePass(RULES)(model)
        common.RemoveUnusedNodesPass()(model)
    fold()
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
