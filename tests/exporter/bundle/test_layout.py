"""The two axis orders of a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from exporter.bundle.layout import ModelWeights, key, to_graph, to_model
from exporter.bundle.records import Weight
from lora.files.tensorfile import Array, TensorFile

Order = tuple[int, ...] | None

orders = st.none() | st.integers(0, 4).flatmap(lambda rank: st.permutations(range(rank))).map(tuple)


@st.composite
def ordered_arrays(draw: st.DrawFn) -> tuple[Array, Order]:
    rank = draw(st.integers(1, 4))
    values = draw(hnp.arrays(np.int32, draw(hnp.array_shapes(min_dims=rank, max_dims=rank, max_side=4))))
    return values, draw(st.none() | st.permutations(range(rank)).map(tuple))


@given(ordered_arrays())
def test_model_order_survives_the_way_to_the_graph_and_back(case: tuple[Array, Order]):
    values, order = case
    np.testing.assert_array_equal(to_model(to_graph(values, order), order), values)


@given(ordered_arrays())
def test_graph_order_is_what_a_transpose_node_of_that_permutation_gives(case: tuple[Array, Order]):
    values, order = case
    stored = to_graph(values, order)
    assert stored.flags.c_contiguous
    np.testing.assert_array_equal(stored, values if order is None else np.transpose(values, order))


@given(orders, orders)
def test_keys_of_two_orders_never_mix(one: Order, other: Order):
    assert (key("w", one) == key("w", other)) == (one == other)


def test_a_weight_in_the_models_own_order_is_kept_under_its_own_name():
    assert key("layer.weight", None) == "layer.weight"
    assert key("layer.weight", (1, 0)) == "layer.weight@1,0"


# The weights of the graph that ``files`` is of.
W, B = Weight((1, 0), (3, 2), "float64"), Weight(None, (2,), "float64")


@pytest.fixture
def files(tmp_path: Path) -> list[TensorFile]:
    """A base with two weights, one of them transposed, and a task that changes the latter."""
    save_file({"w@1,0": np.arange(6.0).reshape(3, 2), "b": np.zeros(2)}, tmp_path / "base.safetensors")
    save_file({"w@1,0": np.ones((3, 2))}, tmp_path / "task.safetensors")
    return [TensorFile(tmp_path / "base.safetensors"), TensorFile(tmp_path / "task.safetensors")]


def test_weights_are_seen_in_the_models_order(files: list[TensorFile]):
    weights = ModelWeights(files[:1], {"w": W, "b": B})
    np.testing.assert_array_equal(weights["w"], np.arange(6.0).reshape(3, 2).T)


def test_a_later_file_wins(files: list[TensorFile]):
    weights = ModelWeights(files, {"w": W, "b": B})
    np.testing.assert_array_equal(weights["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(weights["b"], np.zeros(2))


def test_a_weight_kept_in_another_order_is_not_taken_for_this_one(files: list[TensorFile]):
    weights = ModelWeights(files, {"w": Weight(None, (3, 2), "float64"), "b": B})
    assert dict.fromkeys(weights) == {"b": None}
    assert "w" not in weights
    assert len(weights) == 1


def test_a_weight_of_another_shape_is_another_graphs(files: list[TensorFile]):
    assert ModelWeights(files, {"w": Weight((1, 0), (2, 2), "float64"), "b": B}).keys() == {"b"}
