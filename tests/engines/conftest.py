"""Shared by the engines' tests: inputs that fit both bases, and bundles that hold a real TensorRT-RTX engine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import engines.commands.main
from engines.backends import BuildOptions
from engines.building.build import Asked, build
from exporter.bundle.manifest import Bundle
from lora.files.tensorfile import Array


@pytest.fixture
def tokens() -> dict[str, Array]:
    """Two sentences as BERT's token ids, the second one padded."""
    ids = np.array([[101, 2023, 3185, 2003, 102], [101, 2307, 102, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64), "token_type_ids": np.zeros_like(ids)}


@pytest.fixture(scope="session")
def rtx_bundle(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a TensorRT-RTX engine of its task, for 8.9. Tests that change it use ``rtx_copy``."""
    pytest.importorskip("tensorrt_rtx")
    path = Path(shutil.copytree(tiny_bundle.path, tmp_path_factory.mktemp("rtx") / "bundle"))
    build(path, "first", Asked("tensorrt-rtx", BuildOptions(("8.9",))))
    return path


@pytest.fixture
def rtx_copy(rtx_bundle: Path, tmp_path: Path) -> Path:
    """A copy of ``rtx_bundle`` that a test may change."""
    return Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def no_device() -> None:
    """Skips where there is an NVIDIA GPU; asked of the system, not of the code under test."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA GPU")


@pytest.fixture
def fill(tiny_bundle: Bundle, tmp_path: Path) -> Callable[..., list[str]]:
    """Fills in the paths that a command line names."""
    return lambda arguments: [argument.format(bundle=tiny_bundle.path, tmp=tmp_path) for argument in arguments]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A command in this process, which has torch loaded already: its exit status and what it prints."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lorafuse", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            engines.commands.main.main()
        return end.value.code, capsys.readouterr().out

    return run
