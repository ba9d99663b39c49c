"""What a machine without a device can measure of the ways to an engine, and what it says of the others."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
from command import answer, lorafuse, refusal

from engines.backends import BuildOptions
from engines.building.build import Asked
from engines.latency.price import price
from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from lora.errors import BundleError

pytest.importorskip("tensorrt_rtx")
PRICE = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--price")


@pytest.mark.usefixtures("no_device")
def test_the_rebuild_is_measured_and_the_rest_named_with_its_reason(tiny_bundle: Bundle):
    before = (tiny_bundle.path / "manifest.json").read_bytes()
    priced = {one["way"]: one for one in answer("build", tiny_bundle.path, *PRICE)}
    assert priced["rebuild"]["seconds"] > 0
    assert priced["rebuild"]["size"] > 100_000
    assert priced["rebuild with timing cache"]["note"] == "this backend takes no timing cache"
    for way in ("refittable build", "all weights refittable build"):
        assert "CUDA error 35" in priced[way]["note"]
    for way in ("refit of what the task changes", "stripped plan, refitted whole", "latency of the refittable engine"):
        assert priced[way]["note"] == "not on this machine: its engine could not be built here"
    assert (tiny_bundle.path / "manifest.json").read_bytes() == before
    assert open_bundle(tiny_bundle.path).task("first").parts[MODEL].engines == ()
    assert not list(tiny_bundle.path.parent.glob(".*"))


def test_a_bundle_on_a_disk_that_cannot_be_written_is_named(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    def read_only(*arguments: object, **options: object) -> str:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    with pytest.raises(
        BundleError,
        match=re.escape(
            f"{tiny_bundle.path}: can't be written (Read-only file system); the bundle is as it was before"
        ),
    ):
        price(task_part(tiny_bundle, "first"), Asked("onnxruntime", BuildOptions()))


def test_a_bundle_without_tasks_has_no_price(tiny_copy: Path):
    remove_task(tiny_copy, "first")
    assert (
        refusal("build", tiny_copy, "--price")
        == f"{tiny_copy}: holds no task whose engine could be priced; add one with 'lorafuse export'"
    )


def test_the_price_list_is_a_table_for_people(tiny_bundle: Bundle):
    done = lorafuse("build", tiny_bundle.path, *PRICE)
    assert done.returncode == 0, done.stderr
    assert "first on tensorrt-rtx" in done.stdout


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("mode", ["refit", "stripped"])
def test_building_an_engine_that_tasks_share_needs_a_device_and_leaves_the_bundle(tiny_copy: Path, mode: str):
    before = {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()}
    assert "CUDA error 35" in refusal("build", tiny_copy, "--backend", "tensorrt-rtx", "--mode", mode)
    assert {path: path.read_bytes() for path in tiny_copy.rglob("*") if path.is_file()} == before


def test_onnx_runtime_exchanges_no_weights_in_an_engine(tiny_bundle: Bundle):
    assert (
        refusal("build", tiny_bundle.path, "--mode", "refit")
        == "--mode refit: onnxruntime exchanges no weights in an engine; choose a TensorRT backend"
    )


def test_profiles_and_the_unadapted_base_are_built_by_the_command(tiny_copy: Path):
    arguments = (
        "--backend",
        "tensorrt-rtx",
        "--unadapted",
        "--profile",
        "input_ids=1x1,1x8,2x32",
        "--profile",
        "attention_mask=1x1,1x8,2x32",
    )
    built = answer("build", tiny_copy, *arguments)
    digest = open_bundle(tiny_copy).task("first").parts[MODEL].graph
    assert [one["task"] for one in built] == [f"unadapted {digest[:8]}", "first"]
    assert built[0]["bytes"] == built[1]["bytes"]
    assert "expected INPUT=SMALLEST,TYPICAL,LARGEST" in refusal(
        "build", tiny_copy, "--backend", "tensorrt-rtx", "--profile", "input_ids=1"
    )


def test_a_task_that_is_stored_as_factors_is_built_from_what_its_dense_twin_holds(stored_both_ways: Path):
    """RTX numbers its inner values anew in each build; sizes are equal, and so are all but a few bytes."""
    built = {
        one["task"]: one
        for one in answer(
            "build", stored_both_ways, "--backend", "tensorrt-rtx", "--task", "dense", "--task", "factors"
        )
    }
    assert built["dense"]["bytes"] == built["factors"]["bytes"]
    bundle = open_bundle(stored_both_ways)
    engines = [bundle.task(task).parts[MODEL].engines for task in ("dense", "factors")]
    dense, factors = (bundle.checked(engine.file).read_bytes() for (engine,) in engines)
    assert sum(one != other for one, other in zip(dense, factors, strict=True)) < len(dense) / 200
