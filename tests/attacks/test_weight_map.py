"""The weight map is the way to a tensor. Where it, the graph and the files disagree, no task answers as another."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save

from exporter.bundle.check import check_bundle
from lora.files.tensorfile import Array, TensorFile
from scripts.support.hand_made_bundle import HEAD, LEFT, RIGHT, TASKS
from scripts.support.resigned import (
    edit_graph,
    edit_manifest,
    external_data,
    initializer,
    manifest_of,
    part_of,
    replace_content,
    weights_of,
)

Attack = Callable[[Path], Path]


def map_without(name: str) -> Attack:
    return lambda bundle: edit_manifest(bundle, lambda manifest: weights_of(manifest, "left").pop(name))


def map_with(name: str, **change: object) -> Attack:
    return lambda bundle: edit_manifest(bundle, lambda manifest: weights_of(manifest, "left")[name].update(change))


def map_with_another(bundle: Path) -> Path:
    def add(manifest: dict) -> None:
        weights_of(manifest, "left")["absent.weight"] = {"order": None, "shape": [8], "dtype": "float32"}

    return edit_manifest(bundle, add)


ALL = {
    "no entry for what left changes": map_without(LEFT),
    "no entry for what right changes": map_without(RIGHT),
    "no entry for what no task changes": map_without("embed.weight"),
    "no entry for the head": map_without(HEAD),
    "another order": map_with(LEFT, order=[0, 1]),
    "another order of what right changes": map_with(RIGHT, order=[0, 1]),
    "no order": map_with(LEFT, order=None),
    "another shape": map_with(LEFT, shape=[4, 16]),
    "another dtype": map_with(LEFT, dtype="int32"),
    "an entry of nothing": map_with_another,
}


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_a_map_that_is_not_the_files_is_refused_whatever_was_loaded_before(served, bundle: Path, attack: Attack):
    attack(bundle)
    for order in (("left", "right"), ("right", "left"), ("both", "merged", "left"), ("merged", "right")):
        for task, found in served(bundle, *order).items():
            assert isinstance(found, str), f"{task} of {order} answered"


@pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
def test_bundle_check_finds_it(bundle: Path, attack: Attack):
    assert check_bundle(attack(bundle)) != []


def tensors_of(bundle: Path, task: str) -> tuple[str, dict[str, Array]]:
    path = part_of(bundle, task)["weights"]["path"]
    return path, load_file(bundle / path)


def pointed_anew(bundle: Path, task: str) -> Path:
    """The graph follows its tensors to where they lie now; of those that are gone it says what it said."""
    path, _ = tensors_of(bundle, task)
    spans = TensorFile(bundle / path).spans

    def follow(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            span = next((span for stored, span in spans.items() if stored.partition("@")[0] == tensor.name), None)
            if span is not None:
                external_data(tensor, location=path, offset=span.offset, length=span.length)

    return edit_graph(bundle, task, follow)


def add_unclaimed(tensors: dict[str, Array]) -> None:
    tensors["unclaimed.weight"] = np.ones((8, 8), np.float32)


def rename(tensors: dict[str, Array]) -> None:
    tensors["left.weight"] = tensors.pop("left.weight@1,0")


def reshape(tensors: dict[str, Array]) -> None:
    tensors["left.weight@1,0"] = tensors["left.weight@1,0"].reshape(4, 16)


def retype(tensors: dict[str, Array]) -> None:
    tensors["left.weight@1,0"] = tensors["left.weight@1,0"].view(np.int32)


@pytest.mark.parametrize("change", [add_unclaimed, rename, reshape, retype], ids=lambda change: change.__name__)
def test_a_tensor_of_a_tasks_file_that_the_map_does_not_claim_is_refused(served, bundle: Path, change):
    path, tensors = tensors_of(bundle, "left")
    change(tensors)
    replace_content(bundle, path, save(tensors))
    served.refuses(pointed_anew(bundle, "left"), "left", path)
    assert check_bundle(bundle) != []


def test_a_graph_that_leaves_out_a_tensor_of_the_tasks_is_refused(served, bundle: Path):
    """By itself it would answer as the base; with others, in resident mode, as the task."""
    base = manifest_of(bundle)["base"]["weights"][0]["path"]
    span = TensorFile(bundle / base).spans["left.weight@1,0"]
    values = {"location": base, "offset": span.offset, "length": span.length}
    edit_graph(bundle, "left", lambda model: external_data(initializer(model, LEFT), **values))
    served.refuses(bundle, "left", LEFT, base)


def test_graphs_that_differ_under_one_digest_answer_each_as_it_does_alone(served, bundle: Path, good: dict[str, Array]):
    """The digest is a word of the manifest's."""

    def straighten(model: onnx.ModelProto) -> None:
        model.graph.node[2].op_type = "Identity"

    edit_graph(bundle, "left", straighten)
    alone = served(bundle, "left")["left"]
    assert np.abs(alone - good["left"]).max() > 0.1
    for order in permutations(("left", "right", "both")):
        found = served(bundle, *order)
        np.testing.assert_allclose(found.pop("left"), alone, atol=1e-4)
        served.right(found)


def test_the_bundle_as_it_was_made_answers_right(served, bundle: Path):
    for order in permutations(TASKS):
        served.right(served(bundle, *order))
    assert check_bundle(bundle) == []
