"""ONNX Runtime: the embedded default. It compiles nothing: the task's ONNX model is the engine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engines.backends import BuildOptions, Model, Plan, Progress
from lora.errors import EngineError
from lora.tensorfile import Array

# https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
SPINNING = "session.intra_op.allow_spinning"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
PROVIDER = "CPUExecutionProvider"


class OnnxRuntime:
    """ONNX Runtime on the CPU. ``threads`` None lets it use every core; a bounded session does not spin while it waits."""

    def __init__(self, threads: int | None = None, optimize: bool = True) -> None:
        self._api = _import()
        self._threads = threads
        self._optimize = optimize

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(self._api.__version__)

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Show that the model loads and stays within the options; there is no plan to write."""
        if options.compute_capability is not None:
            raise EngineError("onnxruntime runs on the CPU and has no compute capability; leave it out, or choose a TensorRT backend")
        progress("loading the model")
        with self.load(model, None):
            return Plan(content=None, target=PROVIDER)

    def load(self, model: Model, plan: Path | None) -> OnnxRuntimeSession:
        """Open a session; there is no plan to read."""
        options = self._api.SessionOptions()
        options.log_severity_level = 3  # errors are raised; warnings on optimizer choices are not the user's business
        options.add_session_config_entry(DATA_FOLDER, str(model.folder))
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.add_session_config_entry(SPINNING, "0")
        if not self._optimize:
            options.graph_optimization_level = self._api.GraphOptimizationLevel.ORT_DISABLE_ALL
        if model.values:
            names = sorted(model.values)
            options.add_external_initializers(names, [self._api.OrtValue.ortvalue_from_numpy(model.values[name]) for name in names])
        try:
            session = self._api.InferenceSession(model.graph, options, providers=[PROVIDER])
        except Exception as error:  # the API raises classes of its own that share no root but Exception
            raise EngineError(f"{model.folder}: ONNX Runtime {self.version()} can't load the model ({_first_line(error)})") from error
        if PROVIDER not in session.get_providers():
            raise EngineError(f"{model.folder}: {PROVIDER} was asked for, but ONNX Runtime uses {', '.join(session.get_providers())}")
        return OnnxRuntimeSession(session)


class OnnxRuntimeSession:
    """A session on the CPU; thread-safe, as ONNX Runtime's own is."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {value.name: (_dtype(value.type), len(value.shape)) for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run, and name the outputs. Inputs are looked at only when ONNX Runtime has refused them: a model sweeps the cache, and each step here costs."""
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        except Exception as error:  # as above
            raise self._refusal(inputs, error) from error

    def _refusal(self, inputs: Mapping[str, Array], error: Exception) -> EngineError:
        if inputs.keys() != self._inputs.keys():
            return EngineError(f"inputs {sorted(inputs)} given; this engine takes exactly {sorted(self._inputs)}")
        for name, (dtype, rank) in self._inputs.items():
            values = inputs[name]
            if values.dtype != dtype or values.ndim != rank:
                return EngineError(f"input '{name}' is {values.dtype} of rank {values.ndim}; expected {dtype} of rank {rank}")
        return EngineError(f"ONNX Runtime can't run these inputs ({_first_line(error)})")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        del self._session


def _import() -> Any:
    """The module, unless both of its packages are installed: they overwrite each other's files."""
    installed = [name for name in PACKAGES if _is_installed(name)]
    if not installed:
        raise EngineError("onnxruntime is not installed; install lorafuse[cpu], or lorafuse[gpu] where there is an NVIDIA GPU")
    if len(installed) > 1:
        raise EngineError("onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, then install one")
    import onnxruntime

    return onnxruntime


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _dtype(name: str) -> np.dtype[Any]:
    """From ONNX Runtime's "tensor(int64)" to numpy's dtype."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
