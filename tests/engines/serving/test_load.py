"""Loading a task's engine: the right outputs, after every file was checked."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnxruntime
import pytest

import engines
from engines.backends import NoDeviceError
from engines.feeds.text import TextEncoder, predictions
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, encode
from exporter.bundle.task_part import task_part
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def file_of(bundle: Path, kind: str) -> Path:
    manifest = open_bundle(bundle).manifest
    task = manifest.tasks["first"]
    return (
        bundle
        / {
            "base weights": manifest.base.weights[0],
            "task weights": task.parts[MODEL].weights,
            "graph": task.parts[MODEL].model,
        }[kind].path
    )


@pytest.mark.parametrize("as_text", [str, Path])
def test_outputs_are_those_of_stock_onnxruntime_on_the_file(
    tiny_bundle: Bundle, tokens: dict[str, Array], as_text: type
):
    graph = tiny_bundle.path / tiny_bundle.task("first").parts[MODEL].model.path
    stock = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(["logits"], tokens)[0]
    with engines.load(as_text(tiny_bundle.path), "first") as session:
        np.testing.assert_allclose(session.run(tokens)["logits"], stock, atol=1e-6)


def test_real_task_tells_good_films_from_bad(real_bundle: Bundle):
    record = real_bundle.task("movies")
    inputs = TextEncoder(real_bundle).encode(
        ["A moving, funny and beautiful film.", "A dull, stupid and boring mess."],
        task_part(real_bundle, "movies").graph,
    )
    with engines.load(real_bundle.path, "movies", threads=1) as session:
        found = predictions(session.run(inputs)["logits"], record.labels)
    assert [prediction.label for prediction in found] == ["positive", "negative"]
    assert min(prediction.score for prediction in found) > 0.9


def test_tasks_loaded_together_keep_their_own_weights(real_bundle: Bundle):
    text = ["a small tree with yellow flowers"]
    with engines.load(real_bundle.path, "movies") as movies, engines.load(real_bundle.path, "supersense") as supersense:
        for session, name, outputs in ((movies, "movies", 2), (supersense, "supersense", 12), (movies, "movies", 2)):
            record = real_bundle.task(name)
            logits = session.run(TextEncoder(real_bundle).encode(text, task_part(real_bundle, name).graph))["logits"]
            assert logits.shape == (1, outputs)
            assert predictions(logits, record.labels)[0].label in {"plant", "positive"}


@pytest.mark.parametrize("kind", ["base weights", "task weights", "graph"])
def test_file_with_a_flipped_byte_is_refused_by_name(tiny_copy: Path, kind: str):
    damaged = file_of(tiny_copy, kind)
    flip_a_byte(damaged)
    with pytest.raises(BundleError) as error:
        engines.load(tiny_copy, "first")
    assert str(error.value) == f"{damaged}: content does not match the manifest's SHA-256; export the task again"


@pytest.mark.parametrize("kind", ["base weights", "task weights", "graph"])
def test_truncated_file_is_refused_with_both_sizes(tiny_copy: Path, kind: str):
    damaged = file_of(tiny_copy, kind)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-4])
    with pytest.raises(BundleError, match=f"{damaged}: {len(content) - 4} bytes, but the manifest says {len(content)}"):
        engines.load(tiny_copy, "first")


def test_unknown_task_lists_those_there_are(real_bundle: Bundle):
    with pytest.raises(BundleError, match="no task 'tweets' in this bundle; it holds: movies, supersense"):
        engines.load(real_bundle.path, "tweets")


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match=f"{tmp_path}: not a bundle"):
        engines.load(tmp_path, "first")


def test_missing_engine_gives_the_command_that_builds_it(tiny_bundle: Bundle):
    with pytest.raises(EngineError, match="has no tensorrt-rtx engine") as error:
        engines.load(tiny_bundle.path, "first", "tensorrt-rtx")
    assert f"'lorafuse build {tiny_bundle.path} --task first --backend tensorrt-rtx'" in str(error.value)


@pytest.mark.usefixtures("no_device")
def test_sound_engine_says_that_no_device_is_there(rtx_bundle: Path):
    with pytest.raises(NoDeviceError, match="on this machine"):
        engines.load(rtx_bundle, "first", "tensorrt-rtx")


def test_damaged_plan_is_refused_before_it_is_loaded(rtx_copy: Path):
    """Before: without a device, loading would answer NoDeviceError, as the test above shows."""
    (plan,) = (rtx_copy / "engines").iterdir()
    flip_a_byte(plan)
    with pytest.raises(BundleError, match=f"{plan}: content does not match"):
        engines.load(rtx_copy, "first", "tensorrt-rtx")


def test_missing_plan_is_refused_by_name(rtx_copy: Path):
    (plan,) = (rtx_copy / "engines").iterdir()
    plan.unlink()
    with pytest.raises(BundleError, match=f"{plan}: missing from the bundle"):
        engines.load(rtx_copy, "first", "tensorrt-rtx")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_sha256": "0" * 64}, "it was built from an earlier export of the task"),
        ({"weights_sha256": "0" * 64}, "it was built from an earlier export of the task"),
        ({"version": "0.9"}, r"it was built by version 0\.9, and this is \d+\.\d+[\d.]*"),
        ({"file": None}, "the manifest names no plan"),
    ],
)
def test_engine_of_another_export_or_version_is_refused_by_name(
    rtx_copy: Path, change: dict[str, str | None], said: str
):
    """What a build that ran beside an export leaves behind, and what an update of the library does."""
    manifest = open_bundle(rtx_copy).manifest
    record = manifest.tasks["first"]
    (engine,) = record.parts[MODEL].engines
    part = msgspec.structs.replace(record.parts[MODEL], engines=(msgspec.structs.replace(engine, **change),))
    manifest.tasks["first"] = msgspec.structs.replace(record, parts={MODEL: part})
    (rtx_copy / "manifest.json").write_bytes(encode(manifest))
    command = f"lorafuse build {rtx_copy} --task first --backend tensorrt-rtx"
    with pytest.raises(
        EngineError,
        match=f"\\A{rtx_copy}: the tensorrt-rtx engine of 'first' can't be used: {said}; run '{command}'\\Z",
    ):
        engines.load(rtx_copy, "first", "tensorrt-rtx")


def test_package_has_no_other_attributes():
    with pytest.raises(AttributeError, match="no attribute 'unload'"):
        _ = engines.unload
