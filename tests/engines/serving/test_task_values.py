"""What moves when an engine goes from one task to another."""

from __future__ import annotations

import numpy as np
import pytest

from engines.serving.task_values import task_values
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import task_part
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
    dense, factors = (task_part(both, task).changed_names for task in ("dense", "factors"))
    assert dense == factors
    assert any("query" in name for name in dense)
    assert_same(task_values(task_part(both, "dense"), dense), task_values(task_part(both, "factors"), dense))


def test_what_only_the_former_task_changed_goes_back_to_the_base(both: Bundle):
    untouched = next(
        name
        for name in task_part(both, "dense").base
        if name not in task_part(both, "dense").changed_names and "LayerNorm" in name
    )
    (values,) = task_values(task_part(both, "dense"), [untouched]).values()
    np.testing.assert_array_equal(values, task_part(both, "dense").base[untouched])


def test_from_a_to_b_and_back_is_what_a_was(both: Bundle):
    """Held in a dictionary as an engine holds it: nothing of the task between is left."""
    first, second = task_part(both, "first").changed_names, task_part(both, "dense").changed_names
    held = task_values(task_part(both, "first"), task_part(both, "first").graph.weights)
    before = dict(held)
    held |= task_values(task_part(both, "dense"), first | second)
    assert any((held[name] != before[name]).any() for name in second)
    held |= task_values(task_part(both, "first"), first | second)
    assert_same(held, before)


def test_without_the_adapter_the_base_is_left_and_the_tasks_own_head(both: Bundle):
    names = task_part(both, "dense").changed_names
    base, values = task_part(both, "dense").base, task_values(task_part(both, "dense"), names, adapted=False)
    adapted = task_values(task_part(both, "dense"), names)
    for name in names:
        same_as_task = (values[name] == adapted[name]).all()
        assert same_as_task == (name not in base), name


def test_values_lie_as_the_graph_reads_them(both: Bundle):
    shapes = {tensor.name: tuple(tensor.dims) for tensor in unadapted_graph(task_part(both, "dense")).graph.initializer}
    for name, values in task_values(task_part(both, "dense"), task_part(both, "dense").changed_names).items():
        assert values.shape == shapes[name]
        assert values.flags.c_contiguous
