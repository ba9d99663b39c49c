"""The merged, the unadapted and the unmerged graph of a task, held against each other and against PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from float32_sums import engines_bound
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file

from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import TaskPart, task_part
from exporter.graph.digest import graph_digest
from exporter.variants.graphs import _add_branch, merged_graph, unadapted_graph, unmerged_graph
from lora.adapter import LowRank
from lora.errors import ExportError
from lora.files.tensorfile import Array
from lora.formats.peft import read_peft
from scripts.support.demo_tasks import MOVIES, SUPERSENSE, Task

TASKS = pytest.mark.parametrize("task", [MOVIES, SUPERSENSE], ids=lambda task: task.name)


def base_model(folder: Path, task: Task) -> torch.nn.Module:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(task.labels)).eval()


def torch_outputs(model: torch.nn.Module, inputs: dict[str, Array]) -> Array:
    with torch.no_grad():
        return model(**{name: torch.from_numpy(values) for name, values in inputs.items()})[0].numpy()


def bound(bundle: Bundle, task: str, length: int) -> float:
    """How far two engines may be apart on a task with its adapter left unmerged, as a share of the largest output."""
    return engines_bound(unmerged_graph(task_part(bundle, task)), length)


def assert_close(got: Array, want: Array, share: float) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=share * np.abs(want).max())


@TASKS
def test_merging_leaves_the_graph_as_it_was(real_bundle: Bundle, task: Task):
    part = task_part(real_bundle, task.name)
    merged, unadapted = merged_graph(part), unadapted_graph(part)
    assert graph_digest(merged) == graph_digest(unadapted) == part.part.graph
    assert merged.SerializeToString() != unadapted.SerializeToString()  # the weights lie elsewhere


def test_nothing_of_the_adapter_is_left_in_the_merged_graph(real_bundle: Bundle):
    part = task_part(real_bundle, "movies")
    graph = merged_graph(part).graph
    names = [name for node in graph.node for name in (node.name, *node.input, *node.output)] + [
        tensor.name for tensor in graph.initializer
    ]
    assert [name for name in names if "lora" in name.lower() or "adapter" in name.lower()] == []
    stored = {tensor.name for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}
    assert stored == set(part.graph.weights)


@TASKS
def test_the_unmerged_graph_has_two_products_and_a_sum_more_for_every_adapted_weight(real_bundle: Bundle, task: Task):
    part = task_part(real_bundle, task.name)
    merged, unmerged = (
        Counter(node.op_type for node in arm(part).graph.node) for arm in (merged_graph, unmerged_graph)
    )
    assert unmerged - merged == {"MatMul": 2 * 12, "Add": 12}
    assert graph_digest(unmerged_graph(part)) != part.part.graph


@pytest.mark.parametrize("arm", [unadapted_graph, unmerged_graph])
def test_an_arm_is_a_valid_onnx_model(tiny_copy: Path, arm: Callable[[TaskPart], onnx.ModelProto]):
    onnx.save(arm(task_part(open_bundle(tiny_copy), "first")), tiny_copy / "arm.onnx")
    onnx.checker.check_model(str(tiny_copy / "arm.onnx"), full_check=True)


@TASKS
def test_merged_and_unmerged_graph_compute_the_same_and_the_unadapted_another(
    real_bundle: Bundle, token_ids, run_graph, task: Task, shape: tuple[int, int]
):
    part, arms = task_part(real_bundle, task.name), (merged_graph, unmerged_graph, unadapted_graph)
    merged, unmerged, unadapted = (run_graph(arm(part), real_bundle.path, token_ids(shape)) for arm in arms)
    noise = bound(real_bundle, task.name, shape[1])
    assert_close(unmerged, merged, noise)
    assert np.abs(unadapted - merged).max() > 100 * noise * np.abs(merged).max()


@TASKS
def test_the_unmerged_graph_computes_what_peft_computes_without_merging(
    real_bundle: Bundle, real_base: Path, token_ids, run_graph, task: Task
):
    model = peft.PeftModel.from_pretrained(base_model(real_base, task), task.adapter).eval()
    for seed in range(3):
        inputs = token_ids((4, 24), seed)
        found = run_graph(unmerged_graph(task_part(real_bundle, task.name)), real_bundle.path, inputs)
        assert_close(found, torch_outputs(model, inputs), bound(real_bundle, task.name, 24))


@TASKS
def test_the_unadapted_graph_is_the_base_model_with_the_tasks_head(
    real_bundle: Bundle, real_base: Path, token_ids, run_graph, task: Task
):
    model = base_model(real_base, task)
    saved = load_file(task.adapter / "adapter_model.safetensors")
    head = {
        name: torch.from_numpy(saved[f"base_model.model.{name}"]) for name in ("classifier.weight", "classifier.bias")
    }
    assert model.load_state_dict(head, strict=False).unexpected_keys == []
    inputs = token_ids((4, 24))
    found = run_graph(unadapted_graph(task_part(real_bundle, task.name)), real_bundle.path, inputs)
    assert_close(found, torch_outputs(model, inputs), bound(real_bundle, task.name, 24))


def test_the_bundled_changes_are_those_of_the_adapter_that_was_given(real_bundle: Bundle):
    changes = [change for own in task_part(real_bundle, "movies").changes.values() for change in own]
    given = {change.module: change for change in read_peft(MOVIES.adapter).changes if isinstance(change, LowRank)}
    assert len(given) == 12
    assert all(np.array_equal(change.b, given[change.module].b) for change in changes if isinstance(change, LowRank))


# --- The branch itself, on graphs made by hand ---------------------------------------------------------------------


def graph_with(nodes: list[onnx.NodeProto], weight: Array) -> onnx.GraphProto:
    ports = [
        [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(weight.dtype), None)]
        for name in ("x", "y")
    ]
    return helper.make_graph(nodes, "g", *ports, [numpy_helper.from_array(weight, "layer.weight")])


def run(graph: onnx.GraphProto, x: Array) -> Array:
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])).run(
        None, {"x": x}
    )[0]


READERS = {
    "MatMul": ([helper.make_node("MatMul", ["x", "layer.weight"], ["y"])], (1, 0)),
    "Gemm": ([helper.make_node("Gemm", ["x", "layer.weight"], ["y"])], (1, 0)),
    "Gemm that transposes the weight": ([helper.make_node("Gemm", ["x", "layer.weight"], ["y"], transB=1)], (0, 1)),
    "two readers": (
        [
            helper.make_node("MatMul", ["x", "layer.weight"], ["a"]),
            helper.make_node("Neg", ["x"], ["n"]),
            helper.make_node("MatMul", ["n", "layer.weight"], ["b"]),
            helper.make_node("Sub", ["a", "b"], ["y"]),
        ],
        (1, 0),
    ),
}


@pytest.mark.parametrize(("nodes", "order"), READERS.values(), ids=READERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_branch_adds_what_merging_would_have(nodes: list[onnx.NodeProto], order: tuple[int, int], dtype: type):
    random = np.random.default_rng(0)
    weight, a, b, x = (random.normal(size=size).astype(dtype) for size in ((5, 3), (2, 3), (5, 2), (4, 3)))
    update = LowRank("layer", a.astype(np.float32), b.astype(np.float32), rank=2, scaling=2.5)
    unmerged = graph_with(nodes, weight.transpose(order))
    _add_branch(unmerged, "layer.weight", update)
    merged = run(graph_with(nodes, (weight + 2.5 * b @ a).astype(dtype).transpose(order)), x)
    np.testing.assert_allclose(run(unmerged, x), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Gather", ["layer.weight", "x"], ["y"]),
        helper.make_node("MatMul", ["layer.weight", "x"], ["y"]),
        helper.make_node("Gemm", ["x", "layer.weight"], ["y"], transA=1),
        helper.make_node("Gemm", ["x", "layer.weight"], ["y"], alpha=0.5),
    ],
    ids=["Gather", "on the left", "transposed input", "scaled product"],
)
def test_a_weight_that_is_read_in_a_way_the_branch_does_not_know_is_refused_by_name(node: onnx.NodeProto):
    update = LowRank("layer", np.ones((2, 3), np.float32), np.ones((5, 2), np.float32), rank=2, scaling=1.0)
    with pytest.raises(
        ExportError, match=rf"'layer\.weight' is read by a {node.op_type} .*; expected x · W by MatMul or Gemm"
    ):
        _add_branch(graph_with([node], np.ones((3, 5), np.float32)), "layer.weight", update)
