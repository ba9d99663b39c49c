"""Storing weights in the layout that the graph reads them in."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter.bundle.layout import to_graph
from exporter.graph.fold_transposes import fold_weight_transposes, is_weight_transpose

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def model_of(body: str, weight: np.ndarray = WEIGHT) -> ir.Model:
    """A model of ``body``, in ONNX's text format, that reads ``x`` and the initializer ``w`` and gives ``y``."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g (float[N,M] x) => (float[A,B] y) {{ {body} }}'
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto)


def outputs(model: ir.Model, x: np.ndarray, stored: np.ndarray) -> np.ndarray:
    model.graph.initializers["w"].const_value = ir.tensor(stored)
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)",
        (
            "t = Transpose <perm = [1, 0]> (w) u = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) b = MatMul (x, u) y"
            " = Add (a, b)"
        ),
    ],
    ids=["one reader", "two readers of one order"],
)
def test_a_transposed_weight_is_stored_transposed_and_computes_the_same(body: str):
    x = np.ones((4, 3), np.float32)
    before = outputs(model_of(body), x, WEIGHT)
    model = model_of(body)
    assert fold_weight_transposes(model) == {"w": (1, 0)}
    assert "Transpose" not in operators(model)
    assert model.graph.initializers["w"].shape == (3, 2)
    np.testing.assert_array_equal(outputs(model, x, to_graph(WEIGHT, (1, 0))), before)


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose <perm = [1, 0]> (w) a = MatMul (x, t) y = MatMul (a, w)",
        "t = Transpose <perm = [1, 0]> (w) u = Transpose <perm = [0, 1]> (w) a = MatMul (x, t) y = MatMul (a, u)",
        "t = Transpose <perm = [1, 0]> (x) y = MatMul (w, t)",
        "y = MatMul (x, w)",
    ],
    ids=["also read untransposed", "two orders", "not a weight", "no transpose"],
)
def test_a_graph_that_folding_would_change_or_store_twice_is_left_alone(body: str):
    model = model_of(body)
    before = ir.to_proto(model).SerializeToString()
    assert fold_weight_transposes(model) == {}
    assert ir.to_proto(model).SerializeToString() == before


def test_only_the_transpose_of_an_initializer_is_one_of_a_weight():
    model = model_of(
        "a = Transpose <perm = [1, 0]> (x) b = Transpose <perm = [1, 0]> (w) c = Neg (w) d = MatMul (b, a) y = Add"
        " (d, c)"
    )
    assert [node.outputs[0].name for node in model.graph if is_weight_transpose(node)] == ["b"]


@given(st.integers(1, 4).flatmap(lambda rank: st.permutations(range(rank))))
def test_any_permutation_of_any_rank_is_recorded_as_the_transpose_had_it(order: list[int]):
    shape = tuple(range(2, 2 + len(order)))
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    node = helper.make_node("Transpose", ["w"], ["t"], perm=order)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [node, helper.make_node("Neg", ["t"], ["y"])], "g", [], [result], [numpy_helper.from_array(weight, "w")]
    )
    model = ir.from_proto(helper.make_model(graph))
    assert fold_weight_transposes(model) == {"w": tuple(order)}
    assert model.graph.initializers["w"].shape == tuple(shape[axis] for axis in order)
    model.graph.initializers["w"].const_value = ir.tensor(to_graph(weight, tuple(order)))
    np.testing.assert_array_equal(ReferenceEvaluator(ir.to_proto(model)).run(None, {})[0], -weight.transpose(order))
