"""Engines for a mixed fleet: of one backend a task has a plan for each target, and a device loads the one it runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from engines.backends import BuildOptions, NoDeviceError, backend
from engines.backends.tensorrt.target import runs_on
from engines.building.build import Asked, build, build_unadapted
from engines.serving.load import plan_of
from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from lora.errors import EngineError

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def fleet(rtx_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plans of its task for 8.9, for 8.6, and one for 8.9 and 12.0; of the base for 8.6 and 8.9."""
    path = Path(shutil.copytree(rtx_bundle, tmp_path_factory.mktemp("fleet") / "bundle"))
    for capabilities in (("8.6",), ("8.9", "12.0")):
        build(path, "first", Asked(RTX, BuildOptions(capabilities)))
    for capability in ("8.6", "8.9"):
        build_unadapted(path, "first", Asked(RTX, BuildOptions((capability,))))
    return path


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch):
    """Pretends to be a machine with a device of this compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        refusal = "it was built for {}, and this is an NVIDIA GPU of {}.{}"
        monkeypatch.setattr(
            type(backend(RTX)),
            "runs",
            lambda self, target: None if runs_on(target, capability) else refusal.format(target, *capability),
        )

    return pretend


def test_a_build_for_another_target_leaves_the_former_plan(fleet: Path):
    engines = open_bundle(fleet).task("first").parts[MODEL].engines
    assert [engine.target for engine in engines] == ["8.6", "8.9", "8.9, 12.0"]
    assert len({engine.file.path for engine in engines}) == 3
    assert check_bundle(fleet) == []


@pytest.mark.parametrize(("capability", "target"), [((8, 6), "8.6"), ((8, 9), "8.9"), ((12, 0), "8.9, 12.0")])
def test_a_device_loads_the_plan_that_it_can_run(fleet: Path, on, capability: tuple[int, int], target: str):
    on(capability)
    part = task_part(open_bundle(fleet), "first")
    wanted = next(engine for engine in part.part.engines if engine.target == target)
    assert plan_of(part, RTX, backend(RTX)) == fleet / wanted.file.path


@pytest.mark.parametrize("adapted", [True, False])
def test_a_device_that_can_run_none_is_told_the_targets_there_are(fleet: Path, on, adapted: bool):
    on((7, 5))
    others = "8.9; 8.9, 12.0" if adapted else "8.9"
    words = f"it was built for 8.6, and this is an NVIDIA GPU of 7.5 (others were built for {others}); run 'lorafuse"
    with pytest.raises(EngineError, match=re.escape(words)):
        plan_of(task_part(open_bundle(fleet), "first"), RTX, backend(RTX), adapted)


@pytest.mark.usefixtures("no_device")
def test_without_a_device_there_is_nothing_to_choose_by(fleet: Path):
    with pytest.raises(NoDeviceError):
        plan_of(task_part(open_bundle(fleet), "first"), RTX, backend(RTX))


def test_a_build_for_the_same_target_replaces_its_plan(rtx_copy: Path):
    (before,) = open_bundle(rtx_copy).task("first").parts[MODEL].engines
    build(rtx_copy, "first", Asked(RTX, BuildOptions(("8.9",)), ["input_ids=1x8,1x8,2x8"]))
    (after,) = open_bundle(rtx_copy).task("first").parts[MODEL].engines
    assert (after.target, after.file.path != before.file.path) == ("8.9", True)
    assert not (rtx_copy / before.file.path).exists()
