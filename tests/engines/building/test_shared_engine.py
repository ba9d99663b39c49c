"""An engine that tasks share by refitting: when it is refused, and by which words. Refitting itself needs a device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import engines
from engines.backends import BuildOptions, NoDeviceError, backend
from engines.building.build import Asked, build_unadapted
from exporter.bundle.check import check_bundle
from exporter.bundle.edits import remove_task, with_graph_engine
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.pack import pack_bundle
from exporter.bundle.records import Engine, encode
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from lora.errors import EngineError

pytest.importorskip("tensorrt_rtx")
RTX = "tensorrt-rtx"


@pytest.fixture
def shared(tiny_copy: Path) -> Bundle:
    """The tiny bundle with an engine of its unadapted graph."""
    build_unadapted(tiny_copy, "first", Asked(RTX, BuildOptions(("8.9",))))
    return open_bundle(tiny_copy)


def engine_of(bundle: Bundle) -> Engine:
    (engine,) = task_part(bundle, "first").graph.engines
    return engine


def recorded(bundle: Bundle, **changes: Any) -> Bundle:
    """As a machine with a device would have recorded its refittable engine."""
    part = task_part(bundle, "first")
    refittable = {
        "mode": "refit",
        "refittable": tuple(sorted(part.changed_names)),
        "proven": {"first": part.weights_sha256()},
    }
    engine = msgspec.structs.replace(engine_of(bundle), **{**refittable, **changes})
    (bundle.path / "manifest.json").write_bytes(encode(with_graph_engine(bundle, part.part.graph, engine)))
    return open_bundle(bundle.path)


def test_the_unadapted_engine_is_recorded_with_its_graph(shared: Bundle):
    engine, part = engine_of(shared), task_part(shared, "first")
    digest = part.part.graph
    assert (engine.backend, engine.mode, engine.target, engine.model_sha256) == (RTX, "rebuild", "8.9", digest)
    assert engine.weights_sha256 == part.weights_sha256(adapted=False) != part.weights_sha256()
    assert shared.checked(engine.file).name.startswith(f"unadapted-{digest[:8]}-{RTX}-")


def test_an_engine_whose_weights_cannot_be_exchanged_is_no_tasks(shared: Bundle):
    with pytest.raises(
        EngineError,
        match=f"task 'first' has no {RTX} engine; run 'lorafuse build {shared.path} --task first --backend {RTX}'",
    ):
        engines.load(shared.path, "first", RTX)


@pytest.mark.usefixtures("no_device")
def test_a_proven_engine_asks_for_a_device(shared: Bundle):
    recorded(shared)
    with pytest.raises(NoDeviceError, match="CUDA error 35"):
        engines.load(shared.path, "first", RTX)


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": "0.1"}, "it was built by version 0.1, and this is "),
        ({"refittable": ()}, "the task changes 'bert."),
    ],
)
def test_a_stale_one_is_refused_by_name(shared: Bundle, changes: dict[str, Any], said: str):
    recorded(shared, **changes)
    with pytest.raises(EngineError) as refused:
        engines.load(shared.path, "first", RTX)
    assert str(refused.value).startswith(f"{shared.path}: the {RTX} engine of 'first' can't be used: {said}")
    assert str(refused.value).endswith(
        f"; run 'lorafuse build {shared.path} --task first --backend {RTX} --mode refit'"
    )


@pytest.mark.parametrize(
    "proven", [{}, {"first": "0" * 64}, {"second": "0" * 64}], ids=["never", "of other weights", "of another task"]
)
def test_one_that_was_not_compared_is_not_trusted(
    shared: Bundle, monkeypatch: pytest.MonkeyPatch, proven: dict[str, str]
):
    recorded(shared, proven=proven)
    monkeypatch.setattr(type(backend(RTX)), "runs", lambda self, target: None)  # as on a machine with the device
    with pytest.raises(
        EngineError,
        match=(
            "its outputs with this task's weights were not yet compared with those of an engine built from them; run "
        ),
    ):
        engines.load(shared.path, "first", RTX)


def test_an_engine_for_another_device_is_refused_with_both(shared: Bundle, monkeypatch: pytest.MonkeyPatch):
    recorded(shared)
    monkeypatch.setattr(
        "engines.backends.tensorrt.cuda.device", lambda: engines_device("NVIDIA GeForce RTX 3060", 8, 6)
    )
    with pytest.raises(
        EngineError, match=re.escape("it was built for 8.9, and this is an NVIDIA GeForce RTX 3060 (8.6); run ")
    ):
        engines.load(shared.path, "first", RTX)


def engines_device(name: str, major: int, minor: int) -> object:
    from engines.backends.tensorrt.cuda import Device

    return Device(name, major, minor)


def test_it_is_checked_packed_and_goes_with_the_last_task_of_its_graph(shared: Bundle, tmp_path: Path):
    assert check_bundle(shared.path) == []
    plan = shared.checked(engine_of(shared).file)
    assert pack_bundle(shared.path, tmp_path / "packed.tar") > plan.stat().st_size
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    assert [finding.path for finding in check_bundle(shared.path)] == [f"engines/{plan.name}"]
    remove_task(shared.path, "first")
    assert not plan.exists()


def test_another_tasks_export_leaves_it(shared: Bundle, tiny_base: Path, write_adapter):
    before = engine_of(shared)
    export_task(Request(tiny_base, write_adapter(seed=1), "second"), shared.path)
    assert engine_of(open_bundle(shared.path)) == before
