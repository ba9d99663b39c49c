"""ONNX Runtime's execution providers: one that was asked for and is not in use is an error; caches never mix tasks."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import engines
from engines.backends import Model, NoDeviceError
from engines.backends.providers import PLUGIN, cache_options
from exporter.bundle.manifest import Bundle
from lora.errors import EngineError

ON_CPU = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has GPU providers"
)


@ON_CPU
@pytest.mark.parametrize(
    ("name", "provider"),
    [("onnxruntime-cuda", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", "TensorrtExecutionProvider")],
)
def test_a_provider_that_this_onnx_runtime_lacks_is_refused(tiny_bundle: Bundle, name: str, provider: str):
    """ONNX Runtime itself would warn and take the CPU's."""
    has = ", ".join(onnxruntime.get_available_providers())
    with pytest.raises(EngineError) as refused:
        engines.load(tiny_bundle.path, "first", name)
    assert str(refused.value) == f"{provider} was asked for, but this ONNX Runtime has {has}; install lorafuse[gpu]"


@pytest.mark.skipif(find_spec(PLUGIN) is not None, reason="the plugin is installed here")
def test_a_plugin_that_is_not_installed_is_refused(tiny_bundle: Bundle):
    with pytest.raises(
        EngineError,
        match=(
            r"\ANvTensorRTRTXExecutionProvider is not installed \(No module .*\); install"
            r" onnxruntime-ep-nv-tensorrt-rtx"
        ),
    ):
        engines.load(tiny_bundle.path, "first", "onnxruntime-rtx")


@pytest.mark.skipif(find_spec(PLUGIN) is None, reason="the plugin is not installed here")
@pytest.mark.usefixtures("no_device")
def test_a_plugin_without_a_device_says_so(tiny_bundle: Bundle):
    with pytest.raises(
        NoDeviceError, match=r"NvTensorRTRTXExecutionProvider (finds no device|can't be registered .*libcuda)"
    ):
        engines.load(tiny_bundle.path, "first", "onnxruntime-rtx")


def test_options_for_the_cpu_are_refused(tiny_bundle: Bundle):
    """ONNX Runtime itself would ignore them."""
    with pytest.raises(EngineError, match=r"\ACPUExecutionProvider takes no options; 'arena' was given\Z"):
        engines.load(tiny_bundle.path, "first", provider_options={"arena": "1"})


@pytest.mark.parametrize("runtime", ["onnxruntime-tensorrt", "onnxruntime-rtx"])
def test_tasks_with_one_graph_have_caches_of_their_own(runtime: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The TensorRT provider names an engine by its graph: in one folder, a task would get another's engine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)
    model = Model(b"graph", Path())
    models = [
        model,
        replace(model, graph=b"other"),
        replace(model, values={"w": ones}),
        replace(model, values={"w": zeros}),
        replace(model, values={"v": ones}),
    ]
    key = {"onnxruntime-tensorrt": "trt_engine_cache_path", "onnxruntime-rtx": "nv_runtime_cache_path"}[runtime]
    folders = [cache_options(runtime, model)[key] for model in models]
    assert len(set(folders)) == len(models)
    assert all(Path(folder).parent == tmp_path / "lorafuse" for folder in folders)
    assert cache_options(runtime, replace(model, values={"w": ones.copy()}))[key] == folders[2]


def test_other_providers_keep_no_cache():
    assert (
        cache_options("onnxruntime", Model(b"", Path())) == cache_options("onnxruntime-cuda", Model(b"", Path())) == {}
    )
