"""Verifying a task: what passes, and what must not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

from exporter.bundle.layout import key, to_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, encode
from exporter.bundle.staging import describe
from exporter.bundle.task_part import task_part
from exporter.proof.reference import base_values
from exporter.proof.verify import LEAST_MOVE, OUTPUT_BOUND, Stage, Verification, verify
from exporter.task import Request, export_task
from exporter.variants.graphs import unmerged_graph
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array, TensorFile

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture(scope="module")
def batches(token_ids) -> list[dict[str, Array]]:
    return [token_ids((3, 7), seed=1), token_ids((2, 12), seed=2)]


@pytest.fixture(scope="module")
def good(tiny_bundle: Bundle, batches: list[dict[str, Array]]) -> Verification:
    return verify(task_part(tiny_bundle, "first"), batches, {"ONNX graph": onnx_runner(tiny_bundle)})


def onnx_runner(bundle: Bundle, task: str = "first") -> Callable[[dict[str, Array]], Array]:
    session = onnxruntime.InferenceSession(str(bundle.path / bundle.task(task).parts[MODEL].model.path))
    return lambda inputs: session.run(None, inputs)[0]


def stage(verification: Verification, name: str) -> Stage:
    return next(stage for stage in verification.stages if stage.name == name)


def test_a_good_task_passes_at_every_stage(good: Verification):
    assert [(stage.name, stage.passed) for stage in good.stages] == [
        ("stored weights", True),
        ("merged torch", True),
        ("ONNX graph", True),
    ]
    assert good.passed
    assert (good.task, good.inputs) == ("first", 5)
    assert all(stage.difference <= stage.bound and stage.where for stage in good.stages)


def test_a_good_task_differs_from_its_base_and_has_its_graph(good: Verification, tiny_bundle: Bundle):
    assert good.differs
    assert good.moved > good.least_move > 0
    assert good.digest == good.unadapted_digest == tiny_bundle.task("first").parts[MODEL].graph


def test_bounds_are_relative_to_the_largest_output(good: Verification):
    bound = stage(good, "ONNX graph").bound
    assert bound == stage(good, "merged torch").bound == pytest.approx(good.least_move / LEAST_MOVE["float32"])
    assert bound / OUTPUT_BOUND["float32"] > abs(stage(good, "ONNX graph").want)


@pytest.mark.parametrize("task", ["movies", "supersense"])
def test_a_trained_task_passes(real_bundle: Bundle, token_ids, task: str):
    assert verify(
        task_part(real_bundle, task), [token_ids((2, 9))], {"ONNX graph": onnx_runner(real_bundle, task)}
    ).passed


def test_a_task_that_was_exported_onto_saved_biases_passes(
    tiny_copy: Path, tiny_base: Path, write_adapter, batches: list[dict[str, Array]]
):
    bias = "base_model.model.bert.encoder.layer.0.attention.self.query.bias"
    adapter = write_adapter(config={"bias": "all"}, tensors={bias: np.full(32, 0.5)})
    bundle = export_task(Request(tiny_base, adapter, "second"), tiny_copy).bundle
    assert verify(task_part(bundle, "second"), batches, {"ONNX graph": onnx_runner(bundle, "second")}).passed


# --- Tensors that are not what the formula says, under a manifest that agrees with them ----------------------------


def stored(bundle: Path, name: str, change: Callable[[Array], Array]) -> Bundle:
    """``bundle`` with the task's tensor ``name``, in the graph's order, replaced by ``change`` of it, and its hash
    corrected.
    """
    part = task_part(open_bundle(bundle), "first")
    file, name = TensorFile(bundle / part.part.weights.path), key(name, part.graph.weights[name].order)
    values, span = change(np.array(file[name])), file.spans[name]
    with file.path.open("r+b") as target:
        target.seek(span.offset)
        target.write(values.astype(span.dtype).tobytes())
    return with_corrected_hashes(bundle)


def with_corrected_hashes(bundle: Path) -> Bundle:
    manifest = open_bundle(bundle).manifest
    task = manifest.tasks["first"]
    part = task.parts[MODEL]
    part = msgspec.structs.replace(
        part, model=describe(bundle, part.model.path), weights=describe(bundle, part.weights.path)
    )
    task = msgspec.structs.replace(task, parts={MODEL: part})
    (bundle / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, tasks={"first": task})))
    return open_bundle(bundle)


def at(place: tuple[int, ...], change: Callable[[float], float]) -> Callable[[Array], Array]:
    def changed(values: Array) -> Array:
        values[place] = change(values[place])
        return values

    return changed


PERTURBED = {
    "a last bit of the head": (
        "classifier.bias",
        at((1,), lambda value: np.nextafter(value, np.float32(np.inf))),
        "classifier.bias[1]",
    ),
    "one element of a merged weight": (QUERY, at((3, 5), lambda value: value + 1e-4), f"{QUERY}[5, 3]"),
    "NaN in a merged weight": (QUERY, at((3, 5), lambda value: np.nan), f"{QUERY}[5, 3]"),
    "infinity in the head": ("classifier.weight", at((0, 4), lambda value: np.inf), "classifier.weight[0, 4]"),
}


@pytest.mark.parametrize(("name", "change", "where"), PERTURBED.values(), ids=PERTURBED)
def test_a_stored_tensor_that_is_not_the_formulas_fails_and_is_named(
    tiny_copy: Path, batches: list[dict[str, Array]], name: str, change, where: str
):
    result = verify(task_part(stored(tiny_copy, name, change), "first"), batches, {})
    assert not result.passed
    assert stage(result, "stored weights").passed is False
    assert stage(result, "stored weights").where == where


def test_the_last_bit_of_a_merged_weight_is_within_its_rounding(tiny_copy: Path, batches: list[dict[str, Array]]):
    bundle = stored(tiny_copy, QUERY, at((3, 5), lambda value: np.nextafter(value, np.float32(9))))
    assert verify(task_part(bundle, "first"), batches, {}).passed


@pytest.mark.parametrize("values", ["base's", "transposed"])
def test_a_merged_weight_that_is_another_matrix_fails_in_weights_and_outputs(
    tiny_copy: Path, batches: list[dict[str, Array]], values: str
):
    base = to_graph(base_values(task_part(open_bundle(tiny_copy), "first"))[QUERY], (1, 0))
    bundle = stored(tiny_copy, QUERY, lambda merged: base if values == "base's" else merged.T.copy())
    result = verify(task_part(bundle, "first"), batches, {"ONNX graph": onnx_runner(bundle)})
    assert {stage.name: stage.passed for stage in result.stages} == {
        "stored weights": False,
        "merged torch": False,
        "ONNX graph": False,
    }


def test_a_task_on_its_bases_values_fails(tiny_copy: Path, batches: list[dict[str, Array]]):
    part = task_part(open_bundle(tiny_copy), "first")
    base, weights = base_values(part), part.graph.weights
    for name in [name for name in base if name.endswith(("query.weight", "value.weight"))]:
        bundle = stored(tiny_copy, name, lambda _, name=name: to_graph(base[name], weights[name].order))
    result = verify(task_part(bundle, "first"), batches, {})
    assert (result.passed, stage(result, "stored weights").passed, stage(result, "merged torch").passed) == (
        False,
        False,
        False,
    )


def test_a_task_that_does_next_to_nothing_fails_though_every_stage_agrees(
    tiny_copy: Path, tiny_base: Path, write_adapter, batches: list[dict[str, Array]]
):
    modules = [
        f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}"
        for layer in (0, 1)
        for target in ("query", "value")
    ]
    tiny = {f"{module}.lora_B.weight": np.full((32, 4), 1e-7) for module in modules}
    bundle = export_task(Request(tiny_base, write_adapter(tensors=tiny), "second"), tiny_copy).bundle
    result = verify(task_part(bundle, "second"), batches, {})
    assert [stage.passed for stage in result.stages] == [True, True]
    assert (result.differs, result.passed) == (False, False)


def test_a_graph_that_is_not_the_bases_fails_though_it_computes_the_same(
    tiny_copy: Path, batches: list[dict[str, Array]]
):
    bundle = open_bundle(tiny_copy)
    path = tiny_copy / bundle.task("first").parts[MODEL].model.path
    path.write_bytes(unmerged_graph(task_part(bundle, "first")).SerializeToString())
    bundle = with_corrected_hashes(tiny_copy)
    result = verify(task_part(bundle, "first"), batches, {"ONNX graph": onnx_runner(bundle)})
    assert all(stage.passed for stage in result.stages)
    assert result.digest != result.unadapted_digest
    assert not result.passed


def test_a_file_that_does_not_match_its_hash_is_an_error_not_an_answer(
    tiny_copy: Path, batches: list[dict[str, Array]]
):
    bundle = open_bundle(tiny_copy)
    path = tiny_copy / bundle.task("first").parts[MODEL].weights.path
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match="content does not match the manifest's SHA-256"):
        verify(task_part(bundle, "first"), batches, {})


# --- Runners -------------------------------------------------------------------------------------------------------


def spoilt(
    run: Callable[[dict[str, Array]], Array], place: tuple[int, int], value: float
) -> Callable[[dict[str, Array]], Array]:
    """``run``, whose second batch (of two rows) has ``value`` at ``place``."""

    def changed(inputs: dict[str, Array]) -> Array:
        outputs = run(inputs).copy()
        if len(outputs) == 2:
            outputs[place] = value
        return outputs

    return changed


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 1)])
def test_an_engine_with_one_wrong_output_fails_and_its_place_is_named(
    tiny_bundle: Bundle, batches, value: float, place: tuple[int, int]
):
    result = verify(
        task_part(tiny_bundle, "first"), batches, {"engine": spoilt(onnx_runner(tiny_bundle), place, value)}
    )
    assert not result.passed
    found = stage(result, "engine")
    assert (found.passed, found.where) == (False, f"input {3 + place[0]}, output [{place[1]}]")
    np.testing.assert_equal(found.got, value)


def test_an_engine_of_another_task_fails(
    tiny_copy: Path, tiny_base: Path, write_adapter, batches: list[dict[str, Array]]
):
    bundle = export_task(Request(tiny_base, write_adapter(seed=4), "second"), tiny_copy).bundle
    result = verify(task_part(bundle, "first"), batches, {"engine": onnx_runner(bundle, "second")})
    assert stage(result, "engine").passed is False


def refuse(inputs: dict[str, Array]) -> Array:
    raise EngineError("no device of compute capability 9.0")


def test_an_engine_that_can_not_run_here_is_reported_as_not_run_with_the_reason(
    tiny_bundle: Bundle, batches: list[dict[str, Array]]
):
    result = verify(
        task_part(tiny_bundle, "first"), batches, {"engine": refuse, "ONNX graph": onnx_runner(tiny_bundle)}
    )
    assert (stage(result, "engine").passed, stage(result, "engine").note) == (
        None,
        "no device of compute capability 9.0",
    )
    assert stage(result, "ONNX graph").passed is True
    assert result.passed


def test_a_bug_in_a_runner_is_not_taken_for_an_answer(tiny_bundle: Bundle, batches: list[dict[str, Array]]):
    with pytest.raises(ZeroDivisionError):
        verify(task_part(tiny_bundle, "first"), batches, {"engine": lambda inputs: 1 / 0})


def test_a_verification_can_be_written_as_json(good: Verification):
    assert json.loads(json.dumps(dataclasses.asdict(good)))["stages"][0]["name"] == "stored weights"
