"""ONNX Runtime's execution providers: which a backend asks for, with which options, and whether it got it.

CPU      https://onnxruntime.ai/docs/execution-providers/
CUDA     https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
TensorRT https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html
RTX      https://nvidia.github.io/TensorRT-RTX-EP-ABI/ — a plugin in a package of its own
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engines.backends import Model, NoDeviceError
from lora.errors import EngineError

Runtime = Literal["onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx"]
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    ``helpers`` take what it can't (ONNX Runtime adds the CPU's by itself); ``install`` says what it needs.
    """

    name: str
    helpers: tuple[str, ...] = ()
    install: str = "lorafuse[gpu]"


PROVIDERS: Mapping[Runtime, Provider] = {
    "onnxruntime": Provider("CPUExecutionProvider", install="lorafuse[cpu]"),
    "onnxruntime-cuda": Provider("CUDAExecutionProvider"),
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", helpers=("CUDAExecutionProvider",)),
    "onnxruntime-rtx": Provider(
        "NvTensorRTRTXExecutionProvider", install="onnxruntime-ep-nv-tensorrt-rtx-cu12 beside lorafuse[cpu]"
    ),
}


def require_provider(ort: Any, runtime: Runtime) -> None:
    """Raises EngineError when this ONNX Runtime lacks the provider.

    ONNX Runtime itself would fall back to the CPU, with a warning at most.
    """
    provider = PROVIDERS[runtime]
    available = [provider.name] if runtime == "onnxruntime-rtx" else ort.get_available_providers()
    if provider.name not in available:
        raise EngineError(
            f"{provider.name} was asked for, but this ONNX Runtime has {', '.join(available)}; install"
            f" {provider.install}"
        )


def add_provider(ort: Any, options: Any, runtime: Runtime, given: Mapping[str, str]) -> list[Any]:
    """What InferenceSession takes as ``providers``; a plugin's are put into ``options``.

    Raises NoDeviceError when a plugin has no device.
    """
    provider = PROVIDERS[runtime]
    if runtime == "onnxruntime" and given:
        raise EngineError(f"{provider.name} takes no options; '{next(iter(given))}' was given")
    if runtime != "onnxruntime-rtx":
        return [(provider.name, dict(given)), *provider.helpers]
    devices = _plugin_devices(ort)
    if not devices:
        raise NoDeviceError(f"{provider.name} finds no device on this machine that it can use")
    options.add_provider_for_devices(devices, dict(given))
    return []


def cache_options(runtime: Runtime, model: Model) -> dict[str, str]:
    """Where the provider keeps the engines and timings that it builds at load: a folder for this model's weights alone.

    The TensorRT provider tells engines by their graphs and not by their weights; all tasks of a base have one graph,
    and in a shared folder one task would be answered by another's engine.
    """
    if runtime not in ("onnxruntime-tensorrt", "onnxruntime-rtx"):
        return {}
    folder = str(_cache_root() / f"{runtime}-{_weights_digest(model)}")
    if runtime == "onnxruntime-rtx":
        return {"nv_runtime_cache_path": folder}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(_cache_root()),  # timings hold for every task
    }


def _weights_digest(model: Model) -> str:
    """Of the graph, which names its weights' files by their content, and of the values that take the place of some."""
    digest = hashlib.sha256(model.graph)
    for name, values in sorted(model.values.items()):
        digest.update(name.encode())
        digest.update(values.tobytes())
    return digest.hexdigest()[:16]


def _cache_root() -> Path:
    """By the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorafuse"


def _plugin_devices(ort: Any) -> list[Any]:
    name = PROVIDERS["onnxruntime-rtx"].name
    try:
        plugin = importlib.import_module(PLUGIN)
    except ImportError as error:
        raise EngineError(
            f"{name} is not installed ({error}); install {PROVIDERS['onnxruntime-rtx'].install}"
        ) from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if devices:
        return devices  # registered by an earlier load
    try:
        ort.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # the API raises classes of its own that share no root but Exception
        kind = NoDeviceError if "libcuda.so.1" in str(error) else EngineError  # a driver's own library
        raise kind(
            f"{name} can't be registered with ONNX Runtime {ort.__version__} ({' '.join(str(error).split())})"
        ) from error
    return [device for device in ort.get_ep_devices() if device.ep_name == name]
