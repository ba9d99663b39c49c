"""A graph says by itself where its weights lie. Whatever it says, nothing is served that the manifest does not name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends.onnxruntime import OnnxRuntime
from engines.serving.load import task_model
from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import open_bundle
from exporter.bundle.task_part import task_part
from lora.files.tensorfile import Array
from scripts.support.hand_made_bundle import LEFT, RIGHT, inputs
from scripts.support.resigned import edit_graph, external_data, initializer, manifest_of, part_of


def base_of(bundle: Path) -> Path:
    return bundle / manifest_of(bundle)["base"]["weights"][0]["path"]


def at(name: str, **values: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: external_data(initializer(model, name), **values)


def stray(bundle: Path, place: Path) -> None:
    """A copy of the base with other values: what would be served is not what was verified."""
    content = bytearray(base_of(bundle).read_bytes())
    content[-400:] = bytes(400)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def outside(bundle: Path) -> str:
    stray(bundle, bundle.parent / "outside" / "base.safetensors")
    return "../outside/base.safetensors"


def absolute(bundle: Path) -> str:
    return str(bundle / outside(bundle))


def unnamed(bundle: Path) -> str:
    stray(bundle, bundle / "stray.safetensors")
    return "stray.safetensors"


def link(bundle: Path) -> str:
    (bundle / "link.safetensors").symlink_to(outside(bundle))
    return "link.safetensors"


def deeper(bundle: Path) -> str:
    stray(bundle, bundle / "base" / "deeper.safetensors")
    return "base/deeper.safetensors"


def dotted(bundle: Path) -> str:
    return f"./{base_of(bundle).name}"


def anothers(bundle: Path) -> str:
    return str(part_of(bundle, "right")["weights"]["path"])


PLACES = [outside, absolute, unnamed, link, deeper, dotted, anothers]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_weight_in_a_file_that_is_not_the_tasks_is_refused(served, bundle: Path, place: Callable[[Path], str]):
    location = place(bundle)
    edit_graph(bundle, "left", at(RIGHT, location=location))
    served.refuses(bundle, "left", RIGHT, location)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_bundle_check_finds_it(bundle: Path, place: Callable[[Path], str]):
    edit_graph(bundle, "left", at(RIGHT, location=place(bundle)))
    assert part_of(bundle, "left")["model"]["path"] in [finding.path for finding in check_bundle(bundle)]


@pytest.mark.parametrize(
    "change", [{"offset": 0}, {"length": 252}, {"length": 10**12}, {"offset": -8}, {"offset": "a"}]
)
def test_a_range_that_is_not_the_tensors_is_refused(served, bundle: Path, change: dict[str, object]):
    edit_graph(bundle, "left", at(RIGHT, **change))
    served.refuses(bundle, "left", RIGHT)


def test_a_weight_of_another_name_is_refused(served, bundle: Path):
    def swap(model: onnx.ModelProto) -> None:
        left, right = (initializer(model, name) for name in (LEFT, RIGHT))
        left.external_data[0].value, right.external_data[0].value = (
            right.external_data[0].value,
            left.external_data[0].value,
        )

    edit_graph(bundle, "both", swap)
    swapped = served(bundle)
    shown = swapped.pop("both")
    assert isinstance(shown, str) or np.abs(shown - served.good["both"]).max() < 1e-4  # one file holds both
    served.right(swapped)


def constant(model: onnx.ModelProto) -> None:
    """A node that carries a tensor of a file."""
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=(8, 8), data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "stray.safetensors"), ("offset", "0"), ("length", "256")):
        tensor.external_data.add(key=key, value=value)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], value=tensor))


def branch(model: onnx.ModelProto) -> None:
    """The same inside a graph inside a node."""
    inner = onnx.ModelProto()
    constant(inner)
    node = helper.make_node("If", ["x"], ["y"])
    node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner.graph)
    model.graph.node.append(node)


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def compiled(model: onnx.ModelProto) -> None:
    """A node whose engine lies in a file of its own."""
    model.graph.node.append(helper.make_node("EPContext", [], ["z"], domain="com.microsoft", ep_cache_context="a"))


def twice(model: onnx.ModelProto) -> None:
    initializer(model, LEFT).external_data.add(key="location", value="stray.safetensors")


def checksummed(model: onnx.ModelProto) -> None:
    initializer(model, LEFT).external_data.add(key="prepacked_0", value="0|4|x")


@pytest.mark.parametrize(
    "hide", [constant, branch, sparse, compiled, twice, checksummed], ids=lambda hide: hide.__name__
)
def test_what_reads_a_file_elsewhere_in_the_graph_is_refused(served, bundle: Path, hide: Callable[..., None]):
    stray(bundle, bundle / "stray.safetensors")
    edit_graph(bundle, "left", hide)
    served.refuses(bundle, "left", "not an ONNX model that can be served")


def test_the_backend_opens_no_file(bundle: Path, good: dict[str, Array]):
    model = task_model(task_part(open_bundle(bundle), "both"))
    shutil.rmtree(bundle)
    with OnnxRuntime(1).load(model, None) as session:
        np.testing.assert_array_equal(session.run(inputs())["logits"], good["both"])


def test_a_file_that_is_swapped_after_its_hash_is_not_served(bundle: Path, good: dict[str, Array]):
    model = task_model(task_part(open_bundle(bundle), "both"))
    for path in bundle.glob("*.safetensors"):
        (bundle / "swapped").write_bytes(path.read_bytes()[:-256] + bytes(256))
        (bundle / "swapped").replace(path)
    with OnnxRuntime(1).load(model, None) as session:
        np.testing.assert_array_equal(session.run(inputs())["logits"], good["both"])
