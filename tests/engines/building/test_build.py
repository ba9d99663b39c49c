"""Building into a bundle: what is recorded, what is replaced, and what a failure leaves behind."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from engines.backends import AxisRange, BuildOptions, Model, Plan, backend
from engines.backends.onnxruntime import OnnxRuntime
from engines.building.build import Asked, Built, build, build_unadapted
from engines.building.refit_proof import _proven, prove
from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Manifest, encode
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import file_sha256
from lora.progress import Progress

DEFAULTS = BuildOptions()


def contents(folder: Path) -> dict[str, str]:
    """Every file in and beside the bundle, hidden ones too, by the hash of its bytes."""
    return {
        str(path.relative_to(folder.parent)): file_sha256(path) for path in folder.parent.rglob("*") if path.is_file()
    }


def plans(bundle: Path) -> list[str]:
    return sorted(str(path.relative_to(bundle)) for path in (bundle / "engines").iterdir())


def test_engine_is_recorded_with_version_target_and_model(rtx_bundle: Path):
    bundle = open_bundle(rtx_bundle)
    (engine,) = bundle.task("first").parts[MODEL].engines
    assert (engine.backend, engine.version, engine.target) == ("tensorrt-rtx", backend("tensorrt-rtx").version(), "8.9")
    assert engine.model_sha256 == bundle.task("first").parts[MODEL].model.sha256
    assert engine.file is not None
    assert bundle.checked(engine.file).stat().st_size == engine.file.size


def test_onnxruntime_engine_is_the_model_itself_and_adds_no_file(tiny_copy: Path):
    before = set(contents(tiny_copy))
    built = build(tiny_copy, "first", Asked("onnxruntime", DEFAULTS))
    assert (built.task, built.size, built.engine.file, built.engine.target) == (
        "first",
        0,
        None,
        "CPUExecutionProvider",
    )
    assert open_bundle(tiny_copy).task("first").parts[MODEL].engines == (built.engine,)
    assert set(contents(tiny_copy)) == before


def test_built_engine_reports_its_plans_size(tiny_copy: Path):
    pytest.importorskip("tensorrt_rtx")
    built = build(tiny_copy, "first", Asked("tensorrt-rtx", DEFAULTS))
    assert built.engine.target == "portable"
    assert [tiny_copy / path for path in plans(tiny_copy)] == [tiny_copy / built.engine.file.path]
    assert built.size == (tiny_copy / built.engine.file.path).stat().st_size


def test_engines_of_two_backends_stand_side_by_side(rtx_copy: Path):
    build(rtx_copy, "first", Asked("onnxruntime", DEFAULTS))
    engines = open_bundle(rtx_copy).task("first").parts[MODEL].engines
    assert [engine.backend for engine in engines] == ["onnxruntime", "tensorrt-rtx"]
    assert len(plans(rtx_copy)) == 1


def test_rebuild_replaces_the_old_plan_and_nothing_else(rtx_copy: Path):
    before, old = contents(rtx_copy), plans(rtx_copy)
    engine = build(rtx_copy, "first", Asked("tensorrt-rtx", replace(upto(63), compute_capabilities=("8.9",)))).engine
    assert plans(rtx_copy) == [engine.file.path] != old
    assert open_bundle(rtx_copy).task("first").parts[MODEL].engines == (engine,)
    assert engine.target == "8.9"
    after = contents(rtx_copy)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
        "bundle/manifest.json",
        *(f"bundle/{path}" for path in (*old, engine.file.path)),
    }


def test_same_build_again_changes_no_byte(rtx_copy: Path):
    before = contents(rtx_copy)
    build(rtx_copy, "first", Asked("tensorrt-rtx", BuildOptions(("8.9",))))
    assert contents(rtx_copy) == before


@pytest.mark.parametrize(
    ("task", "options", "error"),
    [
        ("first", BuildOptions(("9.0",)), EngineError),
        ("first", BuildOptions(("8.9",), ({"batch": AxisRange(1, 1, 1)},)), EngineError),
        ("first", BuildOptions(("7.5",)), EngineError),
        ("second", DEFAULTS, BundleError),
    ],
)
def test_failed_build_leaves_the_bundle_as_it_was(
    rtx_copy: Path, task: str, options: BuildOptions, error: type[Exception]
):
    before = contents(rtx_copy)
    with pytest.raises(error):
        build(rtx_copy, task, Asked("tensorrt-rtx", options))
    assert contents(rtx_copy) == before


def test_plan_that_cannot_be_written_leaves_the_bundle_as_it_was(rtx_copy: Path):
    before = contents(rtx_copy)
    with (
        files_of_at_most(1_000_000),
        pytest.raises(BundleError, match=r"can't be written \(File too large\); the bundle is as it was before"),
    ):
        build(rtx_copy, "first", Asked("tensorrt-rtx", BuildOptions(("12.0",))))
    assert contents(rtx_copy) == before


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses longer files, as a full disk would; Python ignores the signal and raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_damaged_weights_are_found_before_anything_is_built(tiny_copy: Path):
    weights = tiny_copy / open_bundle(tiny_copy).task("first").parts[MODEL].weights.path
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    steps: list[str] = []
    with pytest.raises(BundleError, match=r"first-\w+\.safetensors: content does not match"):
        build(tiny_copy, "first", Asked("onnxruntime", DEFAULTS), progress=lambda step, share=None: steps.append(step))
    assert steps == []


def test_default_ranges_stay_within_what_the_base_takes(rtx_copy: Path):
    """Seen from outside: with the defaults, the plan is that of a typical and largest length of the tiny base's 64
    tokens.
    """
    default, explicit, shorter = (
        build(rtx_copy, "first", Asked("tensorrt-rtx", options)).engine.file.sha256
        for options in (DEFAULTS, upto(64), upto(63))
    )
    assert default == explicit != shorter


def upto(longest: int) -> BuildOptions:
    return replace(DEFAULTS, profiles=({"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, longest, longest)},))


def test_task_exported_while_an_engine_is_built_stays_in_the_manifest(tiny_copy: Path, tiny_base: Path, write_adapter):
    request = Request(tiny_base, write_adapter(seed=1), "second")
    built = build(
        tiny_copy,
        "first",
        Asked("onnxruntime", DEFAULTS),
        progress=lambda step, share=None: export_task(request, tiny_copy),
    )
    tasks = open_bundle(tiny_copy).manifest.tasks
    assert (list(tasks), tasks["first"].parts[MODEL].engines) == (["first", "second"], (built.engine,))


def after_the_build(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """``meanwhile`` happens once the engine is built, before it is recorded."""
    through = OnnxRuntime.build

    def built(self: OnnxRuntime, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        plan = through(self, model, options, progress)
        meanwhile()
        return plan

    monkeypatch.setattr(OnnxRuntime, "build", built)


def test_a_task_that_is_removed_while_its_engine_is_built_is_named_and_stays_removed(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    after_the_build(monkeypatch, lambda: remove_task(tiny_copy, "first"))
    with pytest.raises(BundleError, match="no task 'first' in this bundle; it holds: none"):
        build(tiny_copy, "first", Asked("onnxruntime", DEFAULTS))
    assert open_bundle(tiny_copy).manifest.tasks == {}


def test_a_graph_that_goes_while_its_engine_is_built_is_named_and_stays_gone(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = open_bundle(tiny_copy).task("first").parts[MODEL].graph
    after_the_build(monkeypatch, lambda: remove_task(tiny_copy, "first"))
    with pytest.raises(BundleError, match=f"the graph {digest[:12]}… has gone meanwhile"):
        build_unadapted(tiny_copy, "first", Asked("onnxruntime", DEFAULTS))
    assert open_bundle(tiny_copy).manifest.graphs == {}


@pytest.mark.parametrize("builds", [build, build_unadapted])
def test_a_bundle_that_is_deleted_while_its_engine_is_built_is_not_created_anew(
    tiny_copy: Path, monkeypatch: pytest.MonkeyPatch, builds: Callable[..., Built]
):
    after_the_build(monkeypatch, lambda: shutil.rmtree(tiny_copy))
    with pytest.raises(BundleError, match="the bundle has gone meanwhile; create it again with 'lorafuse export'"):
        builds(tiny_copy, "first", Asked("onnxruntime", DEFAULTS))
    assert contents(tiny_copy) == {}


def recorded_proof(bundle: Path, meanwhile: Callable[[], object]) -> Manifest:
    """What a comparison that went well would record of a bundle in which ``meanwhile`` happened during it."""
    build_unadapted(bundle, "first", Asked("onnxruntime", DEFAULTS))
    part = task_part(open_bundle(bundle), "first")
    (shared,) = part.graph.engines
    meanwhile()
    return _proven(open_bundle(bundle), part, shared)


def test_a_task_that_is_removed_while_it_is_compared_is_named(tiny_copy: Path):
    with pytest.raises(BundleError, match="no task 'first' in this bundle"):
        recorded_proof(tiny_copy, lambda: remove_task(tiny_copy, "first"))


def test_an_engine_that_goes_while_it_is_compared_is_named(tiny_copy: Path, tiny_base: Path, write_adapter):
    def again() -> None:
        remove_task(tiny_copy, "first")
        export_task(Request(tiny_base, write_adapter(seed=1), "first"), tiny_copy)

    with pytest.raises(
        EngineError,
        match="the onnxruntime engine that tasks share was built again or removed meanwhile; compare it anew",
    ):
        recorded_proof(tiny_copy, again)


def test_a_comparison_without_a_shared_engine_says_how_to_build_one(tiny_copy: Path):
    with pytest.raises(
        EngineError,
        match=(
            "the graph of 'first' has no onnxruntime engine that tasks share; build it with 'lorafuse build --mode"
            " refit'"
        ),
    ):
        prove(tiny_copy, "first", Asked("onnxruntime", DEFAULTS))


def test_build_of_one_task_leaves_the_others_engines(rtx_copy: Path, tiny_base: Path, write_adapter):
    export_task(Request(tiny_base, write_adapter(seed=1), "second"), rtx_copy)
    first = open_bundle(rtx_copy).task("first")
    (engine,) = first.parts[MODEL].engines
    second = build(rtx_copy, "second", Asked("tensorrt-rtx", BuildOptions(("8.9",)))).engine
    assert open_bundle(rtx_copy).task("first") == first
    assert plans(rtx_copy) == sorted([engine.file.path, second.file.path])


def test_manifest_with_engines_reads_back_as_it_was_written(rtx_bundle: Path):
    bundle: Bundle = open_bundle(rtx_bundle)
    assert (rtx_bundle / "manifest.json").read_bytes() == encode(bundle.manifest)
    assert msgspec.json.decode(encode(bundle.manifest), type=type(bundle.manifest)) == bundle.manifest
