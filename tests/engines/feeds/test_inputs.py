"""Random inputs: of the sizes, dtypes and range that the graph takes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.feeds.inputs import random_inputs
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import Graph
from exporter.bundle.task_part import task_part


@pytest.fixture
def graph(tiny_bundle: Bundle) -> Graph:
    return task_part(tiny_bundle, "first").graph


@given(
    vocabulary=st.integers(1, 50_000),
    batch=st.integers(1, 8),
    sequence=st.integers(1, 64),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_inputs_have_the_graphs_dtypes_and_the_sizes_asked_for(
    tiny_bundle: Bundle, vocabulary: int, batch: int, sequence: int, seed: int
):
    graph = task_part(tiny_bundle, "first").graph
    inputs = random_inputs(graph, vocabulary, {"batch": batch, "sequence": sequence}, seed)
    assert {name: (values.dtype.name, values.shape) for name, values in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), ("int64", (batch, sequence))
    )
    assert (inputs["attention_mask"] == 1).all()
    assert (inputs["token_type_ids"] == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 3, 100])
def test_random_ids_are_drawn_from_the_whole_vocabulary(graph: Graph, vocabulary: int):
    ids = random_inputs(graph, vocabulary, {"batch": 64, "sequence": 64}, seed=0)["input_ids"]
    assert set(np.unique(ids)) == set(range(vocabulary))


def test_random_inputs_follow_the_seed_and_the_ports(graph: Graph):
    narrow = msgspec.structs.replace(graph.inputs[0], dtype="int32", shape=(3, "sequence"))
    changed = msgspec.structs.replace(graph, inputs=(narrow,))
    one, same, other = (random_inputs(changed, 1000, {"sequence": 9}, seed)["input_ids"] for seed in (0, 0, 1))
    assert (one.dtype, one.shape) == (np.dtype(np.int32), (3, 9))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
