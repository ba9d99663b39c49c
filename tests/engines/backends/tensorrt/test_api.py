"""Our calls against the signatures of the vendor's real bindings; ``scripts/checks/tensorrt_api.py`` says how, and what
it can't see.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from scripts.checks import tensorrt_api

ROOT = Path(__file__).resolve().parents[4]
CACHE = ROOT / ".cache" / "tensorrt-bindings"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    if shutil.which("cc") is None or shutil.which("nm") is None:
        pytest.skip("a C compiler and binutils are needed")
    return tensorrt_api


@pytest.mark.parametrize("version", ["10.0.1", "10.16.1.11", "11.4.0.106", "rtx"])
def test_every_call_fits_the_bindings(check: ModuleType, version: str, tmp_path: Path):
    if version == "rtx":
        pytest.importorskip("tensorrt_rtx")
    assert check.problems_with(version, CACHE, tmp_path) == []


def test_calls_that_do_not_fit_are_found(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = Path(shutil.copytree(check.PACKAGE, tmp_path / "package"))
    for file, right, wrong in (
        ("session.py", "execute_async_v3(self._stream.handle)", "execute_async_v3()"),
        ("session.py", "trt.Runtime(log)", "trt.RunTime(log)"),
        ("refit.py", "get_missing_weights()", "get_missing_weights(engine)"),
        ("network.py", "BuilderFlag.__members__", "BuilderFlags.__members__"),
    ):
        text = (broken / file).read_text()
        assert right in text
        (broken / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(check, "PACKAGE", broken)
    pytest.importorskip("tensorrt_rtx")
    found = check.problems_with("rtx", CACHE, tmp_path)
    assert sorted(line.split(":")[0] for line in found) == [
        "checked_network.py",
        "checked_refit.py",
        "checked_session.py",
        "checked_session.py",
    ]


@pytest.mark.parametrize("version", ["10.0.1", "11.4.0.106"])
def test_names_in_quotes_are_the_apis(check: ModuleType, version: str, tmp_path: Path):
    from engines.backends.tensorrt.refit import DTYPES
    from engines.backends.tensorrt.session import DTYPES as TENSORS

    stub = check.wheel_stub(version, CACHE, tmp_path).read_text()
    for name in (*DTYPES.values(), *TENSORS):
        assert f" {name}: ClassVar[DataType]" in stub
    for name in ("STRIP_PLAN", "REFIT"):
        assert f" {name}: ClassVar[BuilderFlag]" in stub
    assert (" REFIT_INDIVIDUAL: ClassVar[BuilderFlag]" in stub) == (version != "10.0.1")
