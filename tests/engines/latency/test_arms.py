"""The arms of a task: every form it has, what it has not, and files of one's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.latency.arm_engines import OnnxRuntimeOpener
from engines.latency.arms import RESERVED, Arms, arms_of
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.task import add_task
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array


def outputs(arms: Arms, tokens: dict[str, Array]) -> dict[str, Array]:
    found = {}
    for arm in arms.arms:
        with arm.open() as session:
            found[arm.name] = session.run(tokens)["logits"]
    return found


def test_base_and_merged_have_one_digest_and_other_forms_have_others(tiny_bundle: Bundle):
    arms = arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), ["resident", "adapter-h", "adapter-l"])
    assert [arm.name for arm in arms.arms] == [BASE, AGAIN, MERGED, UNMERGED, "resident", "adapter-h", "adapter-l"]
    assert (
        arms.digests[BASE]
        == arms.digests[AGAIN]
        == arms.digests[MERGED]
        == tiny_bundle.task("first").parts[MODEL].graph
    )
    assert len(set(arms.digests.values())) == 5
    assert arms.left_out == {}


def test_every_form_computes_what_its_name_says(tiny_bundle: Bundle, tokens: dict[str, Array]):
    found = outputs(arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), ["resident", "adapter-h"]), tokens)
    np.testing.assert_array_equal(found[AGAIN], found[BASE])
    np.testing.assert_array_equal(found["resident"], found[MERGED])
    np.testing.assert_allclose(found[UNMERGED], found[MERGED], atol=1e-5)
    for other in (MERGED, "adapter-h"):
        assert np.abs(found[other] - found[BASE]).max() > 1e-4


def test_a_resident_engine_of_a_task_of_factors_is_fed_the_merged_tensors(
    stored_both_ways: Path, tokens: dict[str, Array]
):
    bundle = open_bundle(stored_both_ways)
    dense, factors = (
        outputs(arms_of(task_part(bundle, task), OnnxRuntimeOpener(1), ["resident"]), tokens)
        for task in ("dense", "factors")
    )
    np.testing.assert_array_equal(factors["resident"], dense["resident"])
    np.testing.assert_array_equal(factors["resident"], factors[MERGED])


def test_a_form_that_the_task_has_not_is_left_out_with_the_reason(tiny_copy: Path, write_adapter):
    modules = [
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}"
        for layer in (0, 1)
        for target in ("query", "value")
    ]
    dora = write_adapter(
        config={"use_dora": True}, tensors={f"{module}.lora_magnitude_vector": np.full(32, 0.7) for module in modules}
    )
    part = task_part(add_task(tiny_copy, dora, "dora").bundle, "dora")
    arms = arms_of(part, OnnxRuntimeOpener(1), ["adapter-l"])
    assert [arm.name for arm in arms.arms] == [BASE, AGAIN, MERGED, "adapter-l"]
    assert "is changed by more than a low-rank product" in arms.left_out[UNMERGED]


def test_a_file_of_ones_own_is_an_arm_with_its_data_beside_it(tiny_bundle: Bundle, tokens: dict[str, Array]):
    brought = tiny_bundle.path / tiny_bundle.task("first").parts[MODEL].model.path
    arms = arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), brought={"mine": brought})
    found = outputs(arms, tokens)
    np.testing.assert_array_equal(found["mine"], found[MERGED])
    assert arms.digests["mine"] == arms.digests[MERGED]


def other_model(path: Path, name: str) -> Path:
    """A model that takes one input called ``name``."""
    values = [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [2]) for value in (name, "out")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", [name], ["out"])], "other", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph), path)
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("plan.engine", "not an .onnx file; expected a model for ONNX Runtime, which runs all arms"),
        ("missing.onnx", "can't be read (No such file or directory); give a model in ONNX's format"),
        ("garbage.onnx", "not an ONNX model"),
        (
            "other.onnx",
            (
                "has the inputs pixels (float); expected attention_mask (int64), input_ids (int64), token_type_ids"
                " (int64), as the task has"
            ),
        ),
    ],
)
def test_a_file_that_cannot_be_an_arm_is_refused_by_name(tiny_bundle: Bundle, tmp_path: Path, name: str, said: str):
    (tmp_path / "plan.engine").write_bytes(b"plan")
    (tmp_path / "garbage.onnx").write_bytes(b"\x00garbage")
    other_model(tmp_path / "other.onnx", "pixels")
    with pytest.raises((EngineError, BundleError)) as refused:
        arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), brought={"mine": tmp_path / name})
    assert str(refused.value).startswith(f"{tmp_path / name}: {said}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_name_that_is_taken_is_refused(tiny_bundle: Bundle, name: str):
    brought = tiny_bundle.path / tiny_bundle.task("first").parts[MODEL].model.path
    with pytest.raises(
        EngineError, match=f"\\Aarm '{name}': the name of an arm that is there anyway; choose another\\Z"
    ):
        arms_of(task_part(tiny_bundle, "first"), OnnxRuntimeOpener(1), brought={name: brought})


def own_model(bundle: Bundle) -> Path:
    """The task's model file; its weights lie beside it."""
    return bundle.path / bundle.task("first").parts[MODEL].model.path


def edited(bundle: Bundle, path: Path, edit: Callable[[onnx.GraphProto], object]) -> Path:
    """The task's model with something changed, as ``path``."""
    model = onnx.load(own_model(bundle), load_external_data=False)
    edit(model.graph)
    onnx.save(model, path)
    return path


def refusal(bundle: Bundle, path: Path) -> str:
    with pytest.raises((EngineError, BundleError)) as refused:
        arms_of(task_part(bundle, "first"), OnnxRuntimeOpener(1), brought={"mine": path})
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).isprintable()  # and so is one line
    return str(refused.value)


def test_a_file_of_ones_own_is_read_in_its_own_folder(tiny_bundle: Bundle, tmp_path: Path, tokens: dict[str, Array]):
    """With other weights than the bundle's, so that it shows whose are read."""
    elsewhere = Path(shutil.copytree(tiny_bundle.path, tmp_path / "elsewhere"))
    for file in (
        own_model(tiny_bundle).name,
        *(file.path for file in tiny_bundle.task("first").parts[MODEL].own_weights),
    ):
        assert (elsewhere / file).is_file()
    weights = elsewhere / tiny_bundle.task("first").parts[MODEL].own_weights[0].path
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))  # zeros
    found = outputs(
        arms_of(
            task_part(tiny_bundle, "first"),
            OnnxRuntimeOpener(1),
            brought={"mine": elsewhere / own_model(tiny_bundle).name},
        ),
        tokens,
    )
    assert np.abs(found["mine"] - found[MERGED]).max() > 1e-3


def test_a_model_without_its_data_and_part_of_one_are_refused_before_anything_is_timed(
    tiny_bundle: Bundle, tmp_path: Path
):
    content = own_model(tiny_bundle).read_bytes()
    (tmp_path / "alone.onnx").write_bytes(content)
    assert "can't load the model (" in refusal(tiny_bundle, tmp_path / "alone.onnx")
    for size in (0, len(content) // 2, len(content) - 5):
        (tmp_path / "part.onnx").write_bytes(content[:size])
        refusal(tiny_bundle, tmp_path / "part.onnx")


def test_a_folder_is_no_model(tiny_bundle: Bundle, tmp_path: Path):
    (tmp_path / "folder.onnx").mkdir()
    assert "can't be read (Is a directory)" in refusal(tiny_bundle, tmp_path / "folder.onnx")


def narrow(graph: onnx.GraphProto) -> None:
    next(
        value for value in graph.input if value.name == "input_ids"
    ).type.tensor_type.elem_type = onnx.TensorProto.INT32


def rename(graph: onnx.GraphProto) -> None:
    graph.output[0].name = "scores"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            narrow,
            (
                "has the inputs attention_mask (int64), input_ids (int32), token_type_ids (int64); expected"
                " attention_mask (int64), input_ids (int64), "
            ),
        ),
        (rename, "has the outputs scores (float); expected logits (float), as the task has"),
        (lambda graph: graph.ClearField("output"), "has the outputs none; expected logits (float), as the task has"),
    ],
    ids=["another type", "another output", "no output"],
)
def test_a_model_of_other_types_or_outputs_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, edit: Callable[[onnx.GraphProto], object], said: str
):
    """A generation would stumble over them after the first set of sessions was opened."""
    assert said in refusal(tiny_bundle, edited(tiny_bundle, tmp_path / "other.onnx", edit))


def test_weights_that_are_listed_as_inputs_are_none(tiny_copy: Path, tokens: dict[str, Array]):
    def list_weights(graph: onnx.GraphProto) -> None:
        graph.input.extend(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in list(graph.initializer)
        )

    bundle = open_bundle(tiny_copy)
    edited(bundle, tiny_copy / "mine.onnx", list_weights)
    assert (
        arms_of(task_part(bundle, "first"), OnnxRuntimeOpener(1), brought={"mine": tiny_copy / "mine.onnx"})
        .arms[-1]
        .name
        == "mine"
    )
