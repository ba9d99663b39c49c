"""The C++ runtime with TensorRT, linked with the real library: which plan it takes, and by which words it refuses one;
running needs a device.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from compiled import Built, configured, run

import engines
from engines.backends import BuildOptions
from engines.backends.tensorrt.target import runs_on
from engines.building.build import Asked, build, build_unadapted
from engines.serving.load import plan_of
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Engine, encode
from exporter.bundle.task_part import task_part
from lora.errors import LorafuseError

RTX = "tensorrt-rtx"
IDS = (101, 2307, 3185, 2003, 102)


def ask(folder: Path, bundle: Path, *arguments: str, task: str = "first", status: int = 3) -> str:
    command = (folder / "lorafuse-ask", bundle, "--task", task, "--ids", ",".join(map(str, IDS)), "--backend", RTX)
    return run(*command, *arguments, status=status).removeprefix("lorafuse-ask: ")


@dataclass(frozen=True)
class Library:
    """As much of a backend as a plan asks for: a version, and a device."""

    at: str
    major: int
    minor: int

    def version(self) -> str:
        return self.at

    def runs(self, target: str) -> str | None:
        fits = runs_on(target, (self.major, self.minor))
        return None if fits else f"it was built for {target}, and this is an A GPU ({self.major}.{self.minor})"


def in_python(bundle: Bundle, library: Library, adapted: bool = True) -> str:
    try:
        return str(plan_of(task_part(bundle, "first"), RTX, library, adapted))  # type: ignore[arg-type]  # no builder
    except LorafuseError as error:
        return str(error)


def in_cpp(built: Built, bundle: Bundle, library: Library, adapted: bool = True) -> str:
    return built.probe(
        "plan",
        bundle.path,
        "first",
        "adapted" if adapted else "unadapted",
        library.at,
        str(library.major),
        str(library.minor),
    ).rstrip("\n")


def with_engines(path: Path, *engines: Engine) -> Bundle:
    """The bundle whose manifest says that the task has these engines."""
    manifest = open_bundle(path).manifest
    part = msgspec.structs.replace(manifest.tasks["first"].parts[MODEL], engines=engines)
    manifest.tasks["first"] = msgspec.structs.replace(manifest.tasks["first"], parts={MODEL: part})
    (path / "manifest.json").write_bytes(encode(manifest))
    return open_bundle(path)


def the_engine(bundle: Bundle) -> Engine:
    (engine,) = bundle.task("first").parts[MODEL].engines
    return engine


def recorded(path: Path, **changes: Any) -> Bundle:
    """The bundle whose manifest says something else of the engine."""
    return with_engines(path, msgspec.structs.replace(the_engine(open_bundle(path)), **changes))


def this_version(bundle: Bundle) -> str:
    return the_engine(bundle).version


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


STALE: dict[str, dict[str, Any]] = {
    "another graph": {"model_sha256": "0" * 64},
    "other weights": {"weights_sha256": "0" * 64},
    "another version": {"version": "0.9"},
    "no plan": {"file": None},
    "no weights": {"mode": "stripped"},
    "another mode and version": {"mode": "refit", "version": "0.9"},
}


@pytest.mark.parametrize("changes", STALE.values(), ids=STALE)
def test_an_engine_that_is_stale_is_refused_in_the_same_words(built: Built, rtx_copy: Path, changes: dict[str, Any]):
    bundle = recorded(rtx_copy, **changes)
    library = Library(this_version(open_bundle(rtx_copy)) if "version" not in changes else "1.7", 8, 9)
    assert in_cpp(built, bundle, library) == in_python(bundle, library)
    assert "can't be used: " in in_python(bundle, library)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["flipped", "missing"])
def test_a_plan_that_is_damaged_is_refused_in_the_same_words(
    built: Built, rtx_copy: Path, damage: Callable[[Path], object]
):
    (plan,) = (rtx_copy / "engines").iterdir()
    damage(plan)
    bundle = open_bundle(rtx_copy)
    said = in_cpp(built, bundle, Library(this_version(bundle), 8, 9))
    assert said == in_python(bundle, Library(this_version(bundle), 8, 9))
    assert said.startswith(f"{plan}: ")


@pytest.mark.parametrize("target", ["portable", "8.0+", "8.9", "8.6, 8.9", "", "8.9,8.6"])
def test_a_device_takes_the_same_targets(built: Built, rtx_copy: Path, target: str):
    bundle = recorded(rtx_copy, target=target)
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (18, 9), (8, 90)):
        library = Library(this_version(bundle), *capability)
        assert in_cpp(built, bundle, library) == in_python(bundle, library)


def test_of_several_engines_the_one_that_fits_the_device_is_taken(built: Built, rtx_copy: Path):
    """By the backend and the target; where none fits, each target is named."""
    engine = the_engine(open_bundle(rtx_copy))
    assert engine.file is not None
    newer = rtx_copy / "engines" / "newer.plan"
    shutil.copyfile(rtx_copy / engine.file.path, newer)
    other = msgspec.structs.replace(engine.file, path="engines/newer.plan")
    bundle = with_engines(
        rtx_copy,
        msgspec.structs.replace(engine, backend="tensorrt", target="portable"),
        engine,
        msgspec.structs.replace(engine, target="9.0, 12.0", file=other),
    )
    wanted = {(8, 9): str(rtx_copy / engine.file.path), (9, 0): str(newer), (12, 0): str(newer)}
    for capability in ((8, 9), (9, 0), (12, 0), (8, 6)):
        library = Library(engine.version, *capability)
        said = in_cpp(built, bundle, library)
        assert said == in_python(bundle, library)
        assert said == wanted.get(capability, said)
    assert "it was built for 8.9, and this is an A GPU (8.6) (others were built for 9.0, 12.0); run" in said


@pytest.mark.parametrize("version", ["10.0.1", "10.0.1.post1", "10.0.1.6", "10.0", "10.0.1.60", "10.0.10", "10.0.2"])
def test_the_version_of_a_package_is_that_of_its_library(built: Built, rtx_copy: Path, version: str):
    """Packages up to TensorRT 10.7 say three parts of four."""
    fits = version in ("10.0.1", "10.0.1.post1", "10.0.1.6")
    (plan,) = (rtx_copy / "engines").iterdir()
    said = in_cpp(built, recorded(rtx_copy, version=version), Library("10.0.1.6", 8, 9))
    assert said == str(plan) if fits else f"it was built by version {version}, and this is 10.0.1.6; run" in said


def test_a_path_that_a_shell_would_read_is_quoted_in_the_same_way(built: Built, rtx_copy: Path, tmp_path: Path):
    odd = rtx_copy.rename(tmp_path / "it's a $bundle")
    bundle = recorded(odd, version="0.9")
    assert in_cpp(built, bundle, Library("1.7", 8, 9)) == in_python(bundle, Library("1.7", 8, 9))


def test_the_bases_engine_is_its_graphs(built: Built, tiny_copy: Path):
    def said(library: Library, adapted: bool = False) -> str:
        in_both = in_cpp(built, open_bundle(tiny_copy), library, adapted)
        assert in_both == in_python(open_bundle(tiny_copy), library, adapted)
        return in_both

    missing = (
        f"{tiny_copy}: the base under task 'first' has no {RTX} engine; run 'lorafuse build {tiny_copy} --task first"
        f" --backend {RTX} --unadapted'"
    )
    assert said(Library("1.7", 8, 9)) == missing
    build_unadapted(tiny_copy, "first", Asked(RTX, BuildOptions(("8.9",))))
    bundle = open_bundle(tiny_copy)
    graph = task_part(bundle, "first").graph
    (engine,) = graph.engines
    library = Library(engine.version, 8, 9)
    assert engine.file is not None
    assert said(library) == str(tiny_copy / engine.file.path)
    assert said(library, adapted=True).startswith(f"{tiny_copy}: task 'first' has no {RTX} engine; run ")
    for changes in (
        {"weights_sha256": "0"},
        {"mode": "stripped"},
        {"mode": "refit", "version": "0"},
        {"target": "9.0"},
    ):
        changed = msgspec.structs.replace(graph, engines=(msgspec.structs.replace(engine, **changes),))
        (tiny_copy / "manifest.json").write_bytes(
            encode(msgspec.structs.replace(bundle.manifest, graphs={bundle.task("first").parts[MODEL].graph: changed}))
        )
        assert said(library).startswith(f"{tiny_copy}: the {RTX} engine of the base under 'first' can't be used: ")


@pytest.mark.usefixtures("no_device")
def test_the_real_library_is_asked_for_its_version_and_then_for_a_device(built: Built, rtx_copy: Path):
    with pytest.raises(LorafuseError) as refused:
        engines.load(rtx_copy, "first", RTX)
    assert ask(built.tensorrt, rtx_copy) == f"{refused.value}\n"
    assert "(CUDA error 35: " in str(refused.value)
    recorded(rtx_copy, version="0.9")
    with pytest.raises(LorafuseError) as refused:
        engines.load(rtx_copy, "first", RTX)
    assert ask(built.tensorrt, rtx_copy) == f"{refused.value}\n"


@pytest.mark.usefixtures("no_device")
def test_a_task_stored_as_factors_has_a_plan_too(built: Built, stored_both_ways: Path):
    assert "no NVIDIA driver" not in ask(built.tensorrt, stored_both_ways, task="factors")
    build(stored_both_ways, "factors", Asked(RTX, BuildOptions(("8.9",))))
    assert ask(built.tensorrt, stored_both_ways, task="factors").startswith("no NVIDIA driver on this machine")


def test_a_task_without_an_engine_gives_the_command_that_builds_it(built: Built, tiny_copy: Path):
    with pytest.raises(LorafuseError) as refused:
        engines.load(tiny_copy, "first", RTX)
    assert ask(built.tensorrt, tiny_copy) == f"{refused.value}\n"


def test_a_plan_counts_as_a_whole(built: Built, rtx_copy: Path):
    (plan,) = (rtx_copy / "engines").iterdir()
    said = ask(built.tensorrt, rtx_copy, "--memory", "100")
    assert (
        said == f"{plan.stat().st_size} bytes of weights are needed at once, and the memory budget is 100; raise it\n"
    )


def test_what_a_build_can_not_do_is_refused(built: Built, tiny_copy: Path):
    assert (
        ask(built.shared, tiny_copy)
        == "this library was built without TensorRT; build it with TENSORRT_ROOT, as docs/cpp.md says\n"
    )
    assert (
        ask(built.tensorrt, tiny_copy, "--backend", "tensorrt")
        == "this library was built with tensorrt-rtx, not with tensorrt\n"
    )
    assert (
        ask(built.tensorrt, tiny_copy, "--mode", "resident")
        == "TensorRT's plans are each a task's own; choose Mode::dedicated\n"
    )
    assert (
        ask(built.tensorrt, tiny_copy, "--backend", "both")
        == "backend 'both' is not known; expected onnxruntime, tensorrt or tensorrt-rtx\n"
    )


def test_an_installed_library_finds_tensorrt_where_it_was_built_with_it(built: Built):
    run("cmake", "--install", built.tensorrt)
    (library,) = (built.tensorrt.parent / "with-tensorrt").rglob("liblorafuse.so.0")
    needed = {
        name: place for name, _, place in (line.strip().partition(" => ") for line in run("ldd", library).splitlines())
    }
    for name, root in (("libtensorrt_rtx.so.1", "tensorrt"), ("libcudart.so.13", "cuda")):
        assert needed[name].startswith(str(built.tensorrt.parent / "roots" / root))


def test_a_build_with_tensorrt_still_runs_on_onnx_runtime(built: Built, tiny_copy: Path):
    said = [
        run(folder / "lorafuse-ask", tiny_copy, "--task", "first", "--ids", "101,7,102", "--raw")
        for folder in (built.shared, built.tensorrt)
    ]
    assert said[0] == said[1] != ""


@pytest.mark.gpu
def test_a_device_answers_as_in_python(tiny_copy: Path, tmp_path: Path):
    """With NVIDIA's own headers: TENSORRT_ROOT, and CUDA_ROOT where it is not /usr/local/cuda."""
    root = os.environ.get("TENSORRT_ROOT")
    if root is None or not any(Path(root, "include").rglob("NvInferRuntime.h")):
        pytest.skip("TENSORRT_ROOT names no release of TensorRT with its headers")
    folder = configured(
        tmp_path / "build", f"-DTENSORRT_ROOT={root}", f"-DCUDA_ROOT={os.environ.get('CUDA_ROOT', '/usr/local/cuda')}"
    )
    flavour: Any = "tensorrt-rtx" if any(Path(root, "lib").glob("*tensorrt_rtx*")) else "tensorrt"
    build(tiny_copy, "first", Asked(flavour, BuildOptions()))
    row = np.array([IDS], np.int64)
    inputs = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    with engines.load(tiny_copy, "first", flavour) as session:
        wanted = session.run(inputs)["logits"]
    said = ask(folder, tiny_copy, "--backend", flavour, "--raw", status=0)
    assert said == f"logits {wanted.tobytes().hex()}\n"
