"""What only a device can show.

``scripts/gpu-check`` runs these on the first machine that has one; elsewhere they are skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np
import pytest

import engines
from engines.backends import BACKENDS, BackendName, BuildOptions, backend
from engines.building.build import Asked, build, build_unadapted
from engines.building.layer_diff import compared
from engines.building.refit_proof import prove
from engines.feeds.inputs import random_inputs, sizes
from engines.latency.arm_engines import opener
from engines.latency.arms import arms_of
from engines.latency.harness import Protocol
from engines.latency.price import price
from engines.latency.report import Load
from engines.latency.run import run
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, encode
from exporter.bundle.task_part import task_part
from lora.errors import EngineError
from lora.files.tensorfile import Array

pytestmark = pytest.mark.gpu
FLAVOURS: tuple[BackendName, ...] = ("tensorrt", "tensorrt-rtx")
SHAPES = ((1, 1), (1, 16), (3, 7))
CLOSE = 2e-3  # of the largest output: TF32 products


@pytest.fixture(
    params=[name for name in BACKENDS if name != "onnxruntime"]
)  # which runs on the CPU, and is what the others are compared with
def name(request: pytest.FixtureRequest) -> BackendName:
    try:
        from engines.backends.tensorrt.cuda import require_device

        require_device()
        backend(request.param)
    except EngineError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def flavour(name: BackendName) -> BackendName:
    if name not in FLAVOURS:
        pytest.skip(f"{name} has no engines of its own")
    return name


@pytest.fixture
def built(name: BackendName, tiny_copy: Path) -> Path:
    build(tiny_copy, "first", Asked(name, BuildOptions()))
    return tiny_copy


def inputs_of(bundle: Bundle) -> Iterator[dict[str, Array]]:
    graph = task_part(bundle, "first").graph
    for shape in SHAPES:
        yield random_inputs(graph, bundle.manifest.base.vocabulary, sizes(*shape), seed=0)


def outputs(path: Path, name: BackendName, times: int = 1) -> list[Array]:
    with engines.load(path, "first", name) as session:
        return [session.run(inputs)["logits"] for inputs in inputs_of(open_bundle(path)) for _ in range(times)]


def assert_close(one: list[Array], other: list[Array]) -> None:
    for left, right in zip(one, other, strict=True):
        assert np.abs(left - right).max() <= CLOSE * np.abs(right).max()


def test_answers_as_onnx_runtime_does_on_the_cpu(built: Path, name: BackendName):
    assert_close(outputs(built, name), outputs(built, "onnxruntime"))


def test_a_recorded_cuda_graph_answers_as_the_first_run(built: Path, flavour: BackendName):
    """The first run of a shape is plain, the second is recorded, the third launches the record."""
    found = outputs(built, flavour, times=3)
    for first, second, third in zip(found[::3], found[1::3], found[2::3], strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


def test_shapes_that_change_from_run_to_run_never_meet_a_graph_of_others(built: Path, flavour: BackendName):
    given = list(inputs_of(open_bundle(built)))
    wanted = outputs(built, flavour)
    with engines.load(built, "first", flavour) as session:
        for order in ((0, 1, 0, 0, 0, 1, 1, 1, 2, 0, 0), (2, 1, 2, 1, 2, 2, 2)):
            for index in order:
                np.testing.assert_array_equal(session.run(given[index])["logits"], wanted[index])


def test_contexts_over_one_engine_answer_alike(built: Path, flavour: BackendName):
    with engines.load(built, "first", flavour) as session, session.part().sibling() as other:
        for inputs in inputs_of(open_bundle(built)):
            np.testing.assert_array_equal(session.run(inputs)["logits"], other.run(inputs)["logits"])


def test_an_engine_that_was_built_for_no_such_shape_refuses_it(built: Path, flavour: BackendName):
    bundle = open_bundle(built)
    long = random_inputs(task_part(bundle, "first").graph, 9, sizes(1, 4000), seed=0)
    with (
        engines.load(built, "first", flavour) as session,
        pytest.raises(EngineError, match=r"no optimization profile of this engine takes .*1x4000"),
    ):
        session.run(long)


@pytest.mark.parametrize("content", [b"", b"garbage " * 50, None], ids=["empty", "garbage", "truncated"])
def test_a_plan_that_is_none_is_refused_in_one_line(
    built: Path, flavour: BackendName, content: bytes | None, tmp_path: Path
):
    bundle = open_bundle(built)
    (engine,) = bundle.task("first").parts[MODEL].engines
    whole = bundle.checked(engine.file).read_bytes()
    (tmp_path / "plan").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(EngineError, match="the plan was refused: ") as refused:
        backend(flavour).load(engines.backends.Model(b"", tmp_path), tmp_path / "plan")
    assert "\n" not in str(refused.value)


def test_the_tasks_engine_and_the_bases_have_the_same_layers_and_tactics(built: Path, flavour: BackendName):
    """With the timing cache that the first build leaves in the bundle."""
    build_unadapted(built, "first", Asked(flavour, BuildOptions()))
    found = compared(task_part(open_bundle(built), "first"), flavour)
    assert (found.layers > 5, found.differences) == (True, ())


@pytest.mark.parametrize("mode", ["refit", "stripped"])
def test_a_shared_engine_is_proven_and_then_answers_as_a_built_one(built: Path, flavour: BackendName, mode: str):
    options = BuildOptions(mode=mode)
    own = outputs(built, flavour)
    build_unadapted(built, "first", Asked(flavour, options))
    proof = prove(built, "first", Asked(flavour, options))
    assert proof.moved > 10 * proof.difference
    manifest = open_bundle(built).manifest
    task = manifest.tasks["first"]
    part = msgspec.structs.replace(task.parts[MODEL], engines=())  # so that the shared one is loaded
    manifest.tasks["first"] = msgspec.structs.replace(task, parts={MODEL: part})
    (built / "manifest.json").write_bytes(encode(manifest))
    assert_close(outputs(built, flavour), own)


def test_a_second_build_takes_the_timings_of_the_first(built: Path, name: BackendName):
    if name != "tensorrt":
        pytest.skip(f"{name} keeps no timing cache in the bundle")
    (cache,) = open_bundle(built).manifest.timing_caches.values()
    build_unadapted(built, "first", Asked(name, BuildOptions()))
    assert len(open_bundle(built).manifest.timing_caches) == 1
    assert cache.size > 0


def test_every_way_to_an_engine_has_its_price(built: Path, flavour: BackendName, capsys: pytest.CaptureFixture[str]):
    priced = price(task_part(open_bundle(built), "first"), Asked(flavour, BuildOptions()))
    failed = [one for one in priced if one.note and one.note.startswith("not on this machine")]
    assert failed == [], [asdict(one) for one in failed]


def test_a_tasks_latency_is_measured_with_the_devices_own_times(built: Path, flavour: BackendName):
    build_unadapted(built, "first", Asked(flavour, BuildOptions()))
    part, load = task_part(open_bundle(built), "first"), Load(1, 16)
    with opener(flavour, 1) as opens:
        arms = arms_of(part, opens, ["adapter-h"])
        [report] = run(part, arms, [load], Protocol(5.0), 1)
    [point] = report.points
    assert (
        [times.arm for times in point.device]
        == [reading.arm for reading in point.readings]
        == ["base", "base again", "merged", "unmerged", "adapter-h"]
    )
    for times in point.device:
        assert 0 < times.engine < point.reading(times.arm).p50 * 10
        assert min(times.copies_there, times.copies_back) > 0


def test_a_runtime_serves_plans_to_many_threads(built: Path, flavour: BackendName):
    build_unadapted(built, "first", Asked(flavour, BuildOptions()))
    given = list(inputs_of(open_bundle(built))) * 4
    wanted = outputs(built, flavour) * 4
    with engines.open(built, backend_name=flavour) as runtime, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: runtime.run("first", inputs)["logits"], given))
        base = runtime.run("first", given[0], adapted=False)["logits"]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (base != wanted[0]).any()
