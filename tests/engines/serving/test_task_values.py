"""What moves when an engine goes from one task to another."""

from __future__ import annotations

import numpy as np
import pytest

from engines.serving.task_values import changed_names, task_values
from exporter.bundle.changes import base_stored
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.variants.graphs import unadapted_graph
from lora.files.tensorfile import Array


@pytest.fixture
def both(stored_both_ways) -> Bundle:
    return open_bundle(stored_both_ways)


def assert_same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_a_task_changes_the_same_tensors_however_it_is_stored(both: Bundle):
    dense, factors = (changed_names(both, task) for task in ("dense", "factors"))
    assert dense == factors
    assert any("query" in name for name in dense)
    assert_same(task_values(both, "dense", dense), task_values(both, "factors", dense))


def test_what_only_the_former_task_changed_goes_back_to_the_base(both: Bundle):
    untouched = next(
        name for name in base_stored(both, "dense") if name not in changed_names(both, "dense") and "LayerNorm" in name
    )
    (values,) = task_values(both, "dense", [untouched]).values()
    np.testing.assert_array_equal(values, base_stored(both, "dense")[untouched])


def test_from_a_to_b_and_back_is_what_a_was(both: Bundle):
    """Held in a dictionary as an engine holds it: nothing of the task between is left."""
    first, second = changed_names(both, "first"), changed_names(both, "dense")
    held = task_values(both, "first", both.graph(both.task("first")).weights)
    before = dict(held)
    held |= task_values(both, "dense", first | second)
    assert any((held[name] != before[name]).any() for name in second)
    held |= task_values(both, "first", first | second)
    assert_same(held, before)


def test_without_the_adapter_the_base_is_left_and_the_tasks_own_head(both: Bundle):
    names = changed_names(both, "dense")
    base, values = base_stored(both, "dense"), task_values(both, "dense", names, adapted=False)
    adapted = task_values(both, "dense", names)
    for name in names:
        same_as_task = (values[name] == adapted[name]).all()
        assert same_as_task == (name not in base), name


def test_values_lie_as_the_graph_reads_them(both: Bundle):
    shapes = {tensor.name: tuple(tensor.dims) for tensor in unadapted_graph(both, "dense").graph.initializer}
    for name, values in task_values(both, "dense", changed_names(both, "dense")).items():
        assert values.shape == shapes[name]
        assert values.flags.c_contiguous
