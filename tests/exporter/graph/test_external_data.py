"""Where an initializer's bytes lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL, Weight
from exporter.graph.external_data import load_graph, pointed
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import TensorFile


def graph_with(**shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model whose initializers lie nowhere yet."""
    weights = [
        TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        for name, shape in shapes.items()
    ]
    return helper.make_model(helper.make_graph([], "g", [], [], initializer=weights))


def weights(order: tuple[int, ...] | None = None, **shapes: tuple[int, ...]) -> dict[str, Weight]:
    """The weight map of ``graph_with`` the same shapes."""
    return {name: Weight(order, shape, "float32") for name, shape in shapes.items()}


def saved(path: Path, **tensors: np.ndarray) -> TensorFile:
    save_file(tensors, path)
    return TensorFile(path)


def locations(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }


@given(
    st.dictionaries(
        st.text("abcdef", min_size=1),
        hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5)),
        min_size=1,
        max_size=5,
    )
)
def test_onnx_reads_at_the_pointed_place_exactly_the_stored_values(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, np.ndarray]
):
    folder = tmp_path_factory.mktemp("external")
    file = saved(folder / "weights.safetensors", **tensors)
    shapes = {name: values.shape for name, values in tensors.items()}
    onnx.save(pointed(graph_with(**shapes), weights(**shapes), [file]), folder / "model.onnx")
    loaded = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "model.onnx").graph.initializer
    }
    for name, values in tensors.items():
        np.testing.assert_array_equal(loaded[name], values)


def test_of_two_files_the_later_wins(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", w=np.zeros((2, 3), np.float32), b=np.zeros(3, np.float32))
    task = saved(tmp_path / "task.safetensors", w=np.ones((2, 3), np.float32))
    places = locations(pointed(graph_with(w=(2, 3), b=(3,)), weights(w=(2, 3), b=(3,)), [base, task]))
    assert (places["w"]["location"], places["b"]["location"]) == ("task.safetensors", "base.safetensors")


def test_a_tensor_of_another_shape_is_passed_over(tmp_path: Path):
    base = saved(tmp_path / "base.safetensors", w=np.zeros((2, 3), np.float32))
    other_head = saved(tmp_path / "task.safetensors", w=np.ones((12, 3), np.float32))
    places = locations(pointed(graph_with(w=(2, 3)), weights(w=(2, 3)), [base, other_head]))
    assert places["w"]["location"] == "base.safetensors"


def test_a_transposed_weight_is_looked_up_under_its_axis_order(tmp_path: Path):
    file = saved(
        tmp_path / "base.safetensors", **{"w": np.zeros((3, 3), np.float32), "w@1,0": np.ones((3, 3), np.float32)}
    )
    place = locations(pointed(graph_with(w=(3, 3)), weights((1, 0), w=(3, 3)), [file]))["w"]
    assert int(place["offset"]) == file.spans["w@1,0"].offset


def test_pointing_again_replaces_the_former_place_and_leaves_the_given_graph_alone(tmp_path: Path):
    one, other = (saved(tmp_path / f"{name}.safetensors", w=np.zeros(3, np.float32)) for name in ("one", "other"))
    first = pointed(graph_with(w=(3,)), weights(w=(3,)), [one])
    second = pointed(first, weights(w=(3,)), [other])
    assert (locations(first)["w"]["location"], locations(second)["w"]["location"]) == (
        "one.safetensors",
        "other.safetensors",
    )
    assert len(second.graph.initializer[0].external_data) == 3


def test_an_initializer_that_is_no_weight_is_left_alone(tmp_path: Path):
    file = saved(tmp_path / "base.safetensors", w=np.zeros(3, np.float32), axes=np.zeros(3, np.float32))
    assert locations(pointed(graph_with(w=(3,), axes=(3,)), weights(w=(3,)), [file]))["axes"] == {}


@pytest.mark.parametrize("held", [{"other": (2, 3)}, {"w": (3, 2)}], ids=["absent", "other shape"])
def test_a_weight_that_no_file_holds_is_refused_by_name(tmp_path: Path, held: dict[str, tuple[int, ...]]):
    file = saved(tmp_path / "base.safetensors", **{name: np.zeros(shape, np.float32) for name, shape in held.items()})
    with pytest.raises(ExportError, match=r"weight 'w' of shape \(2, 3\) is neither in the base nor in the adapter"):
        pointed(graph_with(w=(2, 3)), weights(w=(2, 3)), [file])


def test_a_graph_is_loaded_without_its_weights(tmp_path: Path):
    file = saved(tmp_path / "weights.safetensors", w=np.zeros(3, np.float32))
    onnx.save(pointed(graph_with(w=(3,)), weights(w=(3,)), [file]), tmp_path / "model.onnx")
    file.path.unlink()
    assert load_graph(tmp_path / "model.onnx").graph.initializer[0].name == "w"


def test_a_file_that_is_no_onnx_model_is_refused(tmp_path: Path):
    (tmp_path / "task.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(BundleError, match=r"task\.onnx: not an ONNX model \("):
        load_graph(tmp_path / "task.onnx")


def test_polygraphy_and_the_checker_read_a_tasks_model_as_plain_onnx(tiny_bundle: Bundle):
    path = tiny_bundle.path / tiny_bundle.task("first").parts[MODEL].model.path
    onnx.checker.check_model(path, full_check=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("polygraphy"), "inspect", "model", path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(
        f"{name} [dtype=int64, shape=('batch', 'sequence')]" in done.stdout
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    assert "bert.encoder.layer.0.attention.self.query.weight" not in done.stderr
