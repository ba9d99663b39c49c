"""Weights as inputs, without onnx: held against onnx's own reading, and run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from float32_sums import sums_bound
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from engines.serving.overridable import ELEMENT_TYPES, overridable
from lora.files.tensorfile import Array

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(4, 3)).astype(np.float32)


def model() -> bytes:
    """y = x · w."""
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", size))
        for name, size in (("x", 4), ("y", 3))
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [numpy_helper.from_array(WEIGHT, "w")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=200),
        st.tuples(st.sampled_from(sorted(ELEMENT_TYPES)), st.lists(st.integers(0, 300), max_size=4)),
        max_size=5,
    )
)
def test_onnx_reads_the_inputs_that_were_put_behind_the_model(described: dict[str, tuple[str, list[int]]]):
    values = {
        name: np.empty(shape if np.prod(shape, dtype=float) < 1e6 else (), dtype_of(dtype))
        for name, (dtype, shape) in described.items()
    }
    made = onnx.load_from_string(overridable(model(), values))
    inputs = {value.name: value.type.tensor_type for value in made.graph.input[1:]}
    assert [value.name for value in made.graph.input] == ["x", *sorted(values)]
    for name, array in values.items():
        assert helper.tensor_dtype_to_np_dtype(inputs[name].elem_type) == array.dtype
        assert tuple(dimension.dim_value for dimension in inputs[name].shape.dim) == array.shape
    del made.graph.input[1:]
    assert made == onnx.load_from_string(model())  # nothing else has changed


def dtype_of(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def run(session: onnxruntime.InferenceSession, **inputs: Array) -> Array:
    return session.run(["y"], inputs)[0]


def assert_product(found: Array, x: Array, weight: Array) -> None:
    """Within what a float32 sum may lose, in whatever order."""
    exact = x.astype(np.float64) @ weight
    np.testing.assert_allclose(found, exact, rtol=0, atol=sums_bound(x.shape[1]) * np.abs(exact).max())


def test_a_weight_is_what_the_run_says_and_else_what_it_was():
    session = onnxruntime.InferenceSession(overridable(model(), {"w": WEIGHT}), providers=["CPUExecutionProvider"])
    x, other = RANDOM.normal(size=(2, 4)).astype(np.float32), RANDOM.normal(size=(4, 3)).astype(np.float32)
    assert_product(run(session, x=x), x, WEIGHT)
    assert_product(run(session, x=x, w=other), x, other)
    assert_product(run(session, x=x), x, WEIGHT)


def test_without_it_a_weight_can_not_be_given():
    session = onnxruntime.InferenceSession(model(), providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="Invalid input name: w"):
        run(session, x=np.zeros((1, 4), np.float32), w=WEIGHT)
