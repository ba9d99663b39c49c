"""What moves when an engine goes from one task to another."""

from __future__ import annotations

import numpy as np
import pytest

from engines.serving.task_values import task_values
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import TaskPart, task_part
from exporter.variants.graphs import unadapted_graph
from lora.files.tensorfile import Array


@pytest.fixture
def both(stored_both_ways) -> Bundle:
    return open_bundle(stored_both_ways)


@pytest.fixture
def dense(both: Bundle) -> TaskPart:
    return task_part(both, "dense")


def assert_same(one: dict[str, Array], other: dict[str, Array]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def test_a_task_changes_the_same_tensors_however_it_is_stored(both: Bundle):
    dense, factors = (task_part(both, task) for task in ("dense", "factors"))
    names = dense.changed_names
    assert names == factors.changed_names
    assert any("query" in name for name in names)
    assert_same(task_values(dense, names), task_values(factors, names))


def test_what_only_the_former_task_changed_goes_back_to_the_base(dense: TaskPart):
    changed = dense.changed_names
    untouched = next(name for name in dense.base if name not in changed and "LayerNorm" in name)
    (values,) = task_values(dense, [untouched]).values()
    np.testing.assert_array_equal(values, dense.base[untouched])


def test_from_a_to_b_and_back_is_what_a_was(both: Bundle):
    """Held in a dictionary as an engine holds it: nothing of the task between is left."""
    first, second = task_part(both, "first"), task_part(both, "dense")
    held = task_values(first, first.graph.weights)
    before = dict(held)
    held |= task_values(second, first.changed_names | second.changed_names)
    assert any((held[name] != before[name]).any() for name in second.changed_names)
    held |= task_values(first, first.changed_names | second.changed_names)
    assert_same(held, before)


def test_without_the_adapter_the_base_is_left_and_the_tasks_own_head(dense: TaskPart):
    names = dense.changed_names
    values, adapted = task_values(dense, names, adapted=False), task_values(dense, names)
    for name in names:
        same_as_task = (values[name] == adapted[name]).all()
        assert same_as_task == (name not in dense.base), name


def test_values_lie_as_the_graph_reads_them(dense: TaskPart):
    shapes = {tensor.name: tuple(tensor.dims) for tensor in unadapted_graph(dense).graph.initializer}
    for name, values in task_values(dense, dense.changed_names).items():
        assert values.shape == shapes[name]
        assert values.flags.c_contiguous
