"""Arms on other backends: which engines they take, which they build, and what is said where there can be none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from command import BAD_INPUT, lorafuse

import engines.backends.tensorrt
from engines.backends import BuildOptions, NoDeviceError
from engines.building.build import Asked, build_unadapted
from engines.latency.arm_engines import opener
from engines.latency.arms import EXTRAS, arms_of
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from exporter.bundle.edits import with_graph_engine
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, encode
from exporter.bundle.task_part import task_part
from lora.errors import EngineError

pytest.importorskip("tensorrt_rtx")
RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def both(rtx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With an engine of the task and one of the base."""
    path = Path(shutil.copytree(rtx_bundle, tmp_path_factory.mktemp("both") / "bundle"))
    build_unadapted(path, "first", Asked(RTX, BuildOptions(("8.9",))))
    return open_bundle(path)


@pytest.fixture
def with_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as choosing and building go; opening still asks the driver."""
    monkeypatch.setattr(engines.backends.tensorrt.TensorRT, "runs", lambda self, target: None)


@pytest.mark.usefixtures("with_a_device", "no_device")
def test_every_form_is_a_plan_but_the_resident_one(both: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opener(RTX, 1) as opens:
        arms = arms_of(task_part(both, "first"), opens, EXTRAS)
        assert [arm.name for arm in arms.arms] == [BASE, AGAIN, MERGED, UNMERGED, "adapter-h", "adapter-l"]
        built = sorted(tmp_path.glob("*/*.plan"))
        assert len(built) == 3
        assert len({plan.read_bytes() for plan in built}) == 3
        for arm in arms.arms:
            with pytest.raises(NoDeviceError):
                arm.open()
    assert list(tmp_path.iterdir()) == []
    assert arms.digests[BASE] == arms.digests[AGAIN] == arms.digests[MERGED] == both.task("first").parts[MODEL].graph
    assert len(set(arms.digests.values())) == 4
    assert "exchanged by refitting; 'lorafuse build --price' measures what that costs" in arms.left_out["resident"]
    assert arms.on_device
    assert arms.backend.startswith(f"{RTX} 1.")


@pytest.mark.usefixtures("no_device")
def test_a_device_is_asked_for_before_anything_is_built(both: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines.backends.tensorrt.TensorRT, "build", lambda *_: pytest.fail("built"))
    with opener(RTX, 1) as opens, pytest.raises(NoDeviceError, match="CUDA error 35"):
        arms_of(task_part(both, "first"), opens)


def test_the_bases_engine_has_to_be_built_too(rtx_copy: Path):
    with opener(RTX, 1) as opens, pytest.raises(EngineError) as refused:
        arms_of(task_part(open_bundle(rtx_copy), "first"), opens)
    command = f"lorafuse build {rtx_copy} --task first --backend {RTX} --unadapted"
    assert str(refused.value) == f"{rtx_copy}: the base under task 'first' has no {RTX} engine; run '{command}'"


@pytest.mark.usefixtures("with_a_device")
def test_a_refittable_base_is_no_measure(both: Bundle, tmp_path: Path):
    path = Path(shutil.copytree(both.path, tmp_path / "bundle"))
    part = task_part(both, "first")
    (engine,) = part.graph.engines
    refittable = msgspec.structs.replace(engine, mode="refit")
    (path / "manifest.json").write_bytes(encode(with_graph_engine(both, part.part.graph, refittable)))
    with opener(RTX, 1) as opens, pytest.raises(EngineError) as refused:
        arms_of(task_part(open_bundle(path), "first"), opens)
    command = f"lorafuse build {path} --task first --backend {RTX} --unadapted"
    assert (
        str(refused.value)
        == f"{path}: the base's {RTX} engine is of mode refit, and the tasks' are not; build it as they were, with"
        f" '{command}'"
    )


@pytest.mark.usefixtures("with_a_device", "no_device")
@pytest.mark.parametrize("name", ["mine.plan", "missing.engine", "model.onnx"])
def test_a_file_of_ones_own_is_opened_before_the_run(both: Bundle, tmp_path: Path, name: str):
    (tmp_path / "mine.plan").write_bytes(b"a plan")
    path = both.path / both.task("first").parts[MODEL].model.path if name == "model.onnx" else tmp_path / name
    with opener(RTX, 1) as opens, pytest.raises(EngineError) as refused:
        arms_of(task_part(both, "first"), opens, brought={"mine": path})
    assert str(refused.value).startswith(f"{path}: no NVIDIA driver on this machine")


@pytest.mark.usefixtures("with_a_device")
def test_a_graph_that_the_builder_refuses_is_left_out_with_its_words(both: Bundle, monkeypatch: pytest.MonkeyPatch):
    plain = engines.backends.tensorrt.build_plan

    def refusing(*arguments: Any) -> Any:
        if "LoRA" in str(arguments) or b"lora" in arguments[1].graph:
            raise EngineError("tensorrt_rtx 1.7: no")
        return plain(*arguments)

    monkeypatch.setattr(engines.backends.tensorrt, "build_plan", refusing)
    with opener(RTX, 1) as opens:
        arms = arms_of(task_part(both, "first"), opens, ["adapter-l"])
    assert arms.left_out == {UNMERGED: "tensorrt_rtx 1.7: no"}
    assert [arm.name for arm in arms.arms][-1] == "adapter-l"


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (RTX, "no NVIDIA driver on this machine"),
        ("onnxruntime-cuda", "CUDAExecutionProvider was asked for, but this ONNX Runtime has"),
        ("tensorrt", "backend 'tensorrt' is not installed"),
    ],
)
def test_a_backend_that_can_not_run_here_is_said_in_one_line(both: Bundle, backend: str, said: str):
    done = lorafuse("bench", both.path, "--task", "first", "--length", "8", "--backend", backend)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (BAD_INPUT, "", 1)
    assert said in done.stderr


def test_a_report_says_which_backend_it_is_of(tiny_bundle: Bundle, tmp_path: Path):
    lorafuse(
        "bench",
        tiny_bundle.path,
        "--task",
        "first",
        "--length",
        "8",
        "--seconds",
        "0",
        "--out",
        tmp_path / "report.json",
    )
    machine = json.loads((tmp_path / "report.json").read_bytes())["machine"]
    assert machine["backend"] == f"onnxruntime {machine['onnxruntime']}"
