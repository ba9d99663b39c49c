"""ONNX Runtime: the embedded default, on the CPU or by another execution provider.

The task's ONNX model is the engine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engines.backends import BuildOptions, Model, Plan
from engines.backends.providers import PROVIDERS, Runtime, add_provider, cache_options, require_provider
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress

# https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
DATA_FOLDER = "session.model_external_initializers_file_folder_path"
MODEL_FORMAT = "session.load_model_format"  # else the bytes choose, and may be ONNX Runtime's own format
DIRECTLY = "session.use_external_initializer_file_buffers_directly"  # no copies; not known to earlier versions
SPINNING = "session.intra_op.allow_spinning"
BFLOAT16 = 16  # as onnx.TensorProto counts its types
OLDEST = (1, 24)  # the first that takes files in memory from Python; before it, external data could lie anywhere
PACKAGES = ("onnxruntime", "onnxruntime-gpu")


class OnnxRuntime:
    """ONNX Runtime. ``threads`` None lets it use every core; a bounded session does not spin while it waits.

    ``provider_options`` are added to the provider's own, and win.
    """

    def __init__(
        self,
        threads: int | None = None,
        runtime: Runtime = "onnxruntime",
        optimize: bool = True,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self._api = _import()
        cores = os.cpu_count() or 1
        if threads is not None and not 1 <= threads <= cores:
            raise EngineError(f"threads is {threads}; expected 1 to {cores}, as many as this machine has")
        self._threads = threads
        self._runtime = runtime
        self._optimize = optimize
        self._given = dict(provider_options or {})
        require_provider(self._api, runtime)

    @property
    def has_plans(self) -> bool:
        """The task's ONNX model is the engine."""
        return False

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(self._api.__version__)

    def timing_cache_key(self) -> str | None:
        """None: what a provider times it keeps by itself."""
        return None

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Show that the model loads and stays within the options; there is no plan to write.

        A provider that compiles does so now.
        """
        if (
            options.compute_capabilities
            or options.compatible
            or options.workspace
            or options.optimization_level is not None
            or options.mode != "rebuild"
        ):
            raise EngineError(
                f"{self._runtime} compiles nothing ahead; leave the builder's options out, or choose a TensorRT backend"
            )
        progress("loading the model")
        with self.load(model, None):
            return Plan(content=None, target=PROVIDERS[self._runtime].name)

    def runs(self, target: str) -> str | None:
        """Whether the provider is there is said when a session is opened."""
        return None

    def load(self, model: Model, plan: Path | None) -> OnnxRuntimeSession:
        """Open a session; there is no plan to read."""
        options = self._api.SessionOptions()
        options.log_severity_level = 4  # errors are raised; what else there is to say is not the user's business
        options.add_session_config_entry(MODEL_FORMAT, "ONNX")
        options.add_session_config_entry(DIRECTLY, "1")
        if model.weights is None:
            options.add_session_config_entry(DATA_FOLDER, str(model.folder))
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
            options.add_session_config_entry(SPINNING, "0")
        if not self._optimize:
            options.graph_optimization_level = self._api.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = add_provider(
            self._api, options, self._runtime, {**cache_options(self._runtime, model), **self._given}
        )
        try:
            kept = self._give(options, model)
            # A failing provider is an error, not a reason to print it and go on with another.
            session = self._api.InferenceSession(model.graph, options, providers=providers, enable_fallback=0)
        except Exception as error:  # the API raises classes of its own that share no root but Exception
            raise EngineError(
                f"{model.folder}: ONNX Runtime {self.version()} can't load the model ({_first_line(error)})"
            ) from error
        wanted, used = PROVIDERS[self._runtime].name, session.get_providers()
        if wanted not in used:
            raise EngineError(f"{model.folder}: {wanted} was asked for, but ONNX Runtime uses {', '.join(used)}")
        return OnnxRuntimeSession(session, kept)

    def _give(self, options: Any, model: Model) -> list[Any]:
        """Hand over the tensors that are in memory; what the session reads where it is, to be kept as long as it."""
        if model.values:
            names = sorted(model.values)
            options.add_external_initializers(names, [self._value(model.values[name]) for name in names])
        if model.weights is None:
            return []
        files = {name: held for name, held in model.weights.files.items() if held}
        options.add_external_initializers_from_files_in_memory(
            list(files), list(files.values()), [len(held) for held in files.values()]
        )
        shared = {name: self._value(held) for name, held in model.weights.tensors.items() if name not in model.values}
        for name, value in shared.items():  # of the files alone, earlier versions copy each tensor into the session
            options.add_initializer(name, value)
        return [files, shared]

    def _value(self, values: Array) -> Any:
        """ONNX Runtime's own of an array, which stays the array's memory.

        It takes bfloat16, which numpy lacks, by its bits alone.
        """
        if values.dtype.name == "bfloat16":
            return self._api.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), BFLOAT16)
        return self._api.OrtValue.ortvalue_from_numpy(values)


class OnnxRuntimeSession:
    """A session on the CPU; thread-safe, as ONNX Runtime's own is.

    It reads what is ``kept`` where it is: ONNX Runtime itself holds on to no array of Python's.
    """

    def __init__(self, session: Any, kept: list[Any]) -> None:
        self._session = session
        self._kept = kept
        self._inputs = {value.name: (_dtype(value.type), len(value.shape)) for value in session.get_inputs()}
        self._overridable = {value.name for value in session.get_overridable_initializers()}
        self._outputs = [value.name for value in session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run, and name the outputs.

        Inputs are looked at only when ONNX Runtime has refused them: a model sweeps the cache, and each step here
        costs.
        """
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
        except Exception as error:  # as above
            raise self._refusal(inputs, error) from error

    def _refusal(self, inputs: Mapping[str, Array], error: Exception) -> EngineError:
        given = inputs.keys() - self._overridable
        if given != self._inputs.keys():
            return EngineError(f"inputs {sorted(given)} given; this engine takes exactly {sorted(self._inputs)}")
        for name, (dtype, rank) in self._inputs.items():
            values = inputs[name]
            if values.dtype != dtype or values.ndim != rank:
                return EngineError(
                    f"input '{name}' is {values.dtype} of rank {values.ndim}; expected {dtype} of rank {rank}"
                )
        return EngineError(f"ONNX Runtime can't run these inputs ({_first_line(error)})")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session
        self._kept = []  # after the session that reads it


def _import() -> Any:
    """The module, unless both of its packages are installed: they overwrite each other's files."""
    installed = [name for name in PACKAGES if _is_installed(name)]
    if not installed:
        raise EngineError(
            "onnxruntime is not installed; install lorafuse[cpu], or lorafuse[gpu] where there is an NVIDIA GPU"
        )
    if len(installed) > 1:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, then"
            " install one"
        )
    import onnxruntime

    version = str(onnxruntime.__version__)
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise EngineError(
            f"onnxruntime {version} follows a model's '..' and links out of its folder; update it to"
            f" {'.'.join(map(str, OLDEST))}"
        )
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
    """ONNX Runtime's own words, as its C API gives them: the Python package puts a code before them."""
    said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    return said.splitlines()[0] if said else type(error).__name__
