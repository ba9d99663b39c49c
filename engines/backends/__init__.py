"""What a backend is: it builds an engine from a task's ONNX model, and loads it into a session that runs.

``tests/engines/backends/test_backends.py`` is the definition in full. Each backend's library is imported only when it
is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self, get_args

from lora.errors import EngineError
from lora.files.mapped import Content
from lora.files.tensorfile import Array
from lora.progress import Progress

if TYPE_CHECKING:
    from exporter.bundle.records import Mode

BackendName = Literal[
    "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx", "tensorrt", "tensorrt-rtx"
]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True)
class Weights:
    """A graph's external data in memory: each initializer's tensor, and the bytes of the files that they lie in, by the
    locations that the graph says. The tensors are views of these bytes.
    """

    tensors: Mapping[str, Array]
    files: Mapping[str, Content]


@dataclass(frozen=True)
class Model:
    """An ONNX graph, and the folder where its external data lie.

    ``values`` take the place of the initializers of those names. ``weights`` are the external data themselves, of a
    graph whose files were verified: a backend that can take them opens no file. None where there is only the folder.
    """

    graph: bytes
    folder: Path
    values: Mapping[str, Array] = field(default_factory=dict)
    weights: Weights | None = None


@dataclass(frozen=True)
class AxisRange:
    """The sizes of a dynamic axis that an engine is built for, and the one it is tuned for."""

    smallest: int
    typical: int
    largest: int


Axes = Mapping[str, AxisRange]


@dataclass(frozen=True)
class BuildOptions:
    """What TensorRT's builders can be told. ONNX Runtime compiles nothing ahead and takes none of it.

    ``profiles`` give each dynamic axis a range, by name; of several, a later one is narrower and is preferred where it
    fits. ``compute_capabilities`` such as "8.9" (none: the flavour's default) are RTX's; ``compatible`` asks full
    TensorRT for a plan that runs on any GPU from Ampere on. ``workspace`` is in bytes. ``refittable`` are the weights
    that ``mode`` "refit" lets be exchanged. ``timing_cache`` is a former build's.
    """

    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[Axes, ...] = ()
    compatible: bool = False
    workspace: int | None = None
    optimization_level: int | None = None
    mode: Mode = "rebuild"
    refittable: tuple[str, ...] = ()
    timing_cache: bytes | None = None


@dataclass(frozen=True)
class Plan:
    """A built engine: its bytes, its target, and the timings that the build took.

    ``content`` is None where the ONNX model itself is what the backend runs.
    """

    content: bytes | None
    target: str
    timing_cache: bytes | None = None


class Runs(Protocol):
    """What is loaded and answers, whoever owns it."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name. Raises EngineError when an input is missing, unknown, or of a wrong dtype or rank."""
        ...


class Session(Runs, Protocol):
    """A loaded engine. It owns memory: use it as a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Refittable(Protocol):
    """A session whose weights can be exchanged while it is loaded."""

    def refit(self, values: Mapping[str, Array]) -> None:
        """Put ``values``, in the graph's axis order, in the place of the weights of those names."""
        ...


class Inspectable(Protocol):
    """A session that tells what its engine consists of."""

    def layers(self) -> str:
        """Layers and tactics, as the library's inspector prints them."""
        ...


class Backend(Protocol):
    """Builds engines and loads them."""

    @property
    def has_plans(self) -> bool:
        """Whether an engine is a plan that is built ahead; else the ONNX model is the engine."""
        ...

    def version(self) -> str:
        """The version of the backend's library."""
        ...

    def timing_cache_key(self) -> str | None:
        """What the timings of a build hold for; None where the backend keeps none. Raises NoDeviceError."""
        ...

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        """Build ``model``. Raises EngineError with the library's own words when it can't be built."""
        ...

    def runs(self, target: str) -> str | None:
        """Why an engine for ``target`` does not run on this machine; None where it does. Raises NoDeviceError."""
        ...

    def load(self, model: Model, plan: Path | None) -> Session:
        """Load an engine. Raises EngineError, NoDeviceError where this machine lacks the device for it."""
        ...


class NoDeviceError(EngineError):
    """The engine is sound, but this machine has no device that can run it."""


def backend(
    name: BackendName, threads: int | None = None, provider_options: Mapping[str, str] | None = None
) -> Backend:
    """The backend called ``name``. ``threads`` bounds CPU threads, where the backend computes on the CPU.

    ``provider_options`` go to ONNX Runtime's execution provider, over those that are set here.

    Raises EngineError when the name is unknown or the backend's package is not installed.
    """
    match name:
        case "onnxruntime" | "onnxruntime-cuda" | "onnxruntime-tensorrt" | "onnxruntime-rtx":
            from engines.backends.onnxruntime import OnnxRuntime

            return OnnxRuntime(threads, name, provider_options=provider_options)
        case "tensorrt" | "tensorrt-rtx":
            from engines.backends.tensorrt import TensorRT, api

            return TensorRT(api(name))
    raise EngineError(f"backend '{name}' is not known; expected one of {', '.join(BACKENDS)}")
