"""What a backend is: it builds an engine from a task's ONNX model, and loads it into a session that runs.

``tests/engines/test_backends.py`` is the definition in full. Each backend's library is imported only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

from lora.errors import EngineError
from lora.tensorfile import Array

BackendName = Literal["onnxruntime", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """An ONNX graph, and the folder in which its external data lie; ``values`` take the place of initializers of those names."""

    graph: bytes
    folder: Path
    values: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class AxisRange:
    """The sizes of a dynamic axis that an engine is built for, and the one it is tuned for."""

    smallest: int
    typical: int
    largest: int


@dataclass(frozen=True)
class BuildOptions:
    """``compute_capability`` such as "8.9" (None: the backend's default); the range of each dynamic axis by name."""

    compute_capability: str | None = None
    axes: Mapping[str, AxisRange] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A built engine's bytes, or None where the ONNX model is what the backend runs; and what it was built for."""

    content: bytes | None
    target: str


class Session(Protocol):
    """A loaded engine. It owns memory: use it as a context manager."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. Raises EngineError when an input is missing, unknown, or of a wrong dtype or rank."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Backend(Protocol):
    """Builds engines and loads them."""

    def version(self) -> str:
        """The version of the backend's library."""
        ...

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Build ``model``. Raises EngineError with the library's own words when it can't be built."""
        ...

    def load(self, model: Model, plan: Path | None) -> Session:
        """Load an engine. Raises EngineError, NoDeviceError where this machine lacks the device for it."""
        ...


class NoDeviceError(EngineError):
    """The engine is sound, but this machine has no device that can run it."""


def backend(name: BackendName, threads: int | None = None) -> Backend:
    """The backend called ``name``. ``threads`` bounds CPU threads, where the backend computes on the CPU.

    Raises EngineError when the name is unknown or the backend's package is not installed.
    """
    match name:
        case "onnxruntime":
            from engines.backends.onnxruntime import OnnxRuntime

            return OnnxRuntime(threads)
        case "tensorrt" | "tensorrt-rtx":
            from engines.backends.tensorrt import TensorRT, api

            return TensorRT(api(name))
    raise EngineError(f"backend '{name}' is not known; expected one of {', '.join(BACKENDS)}")
