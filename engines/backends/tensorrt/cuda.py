"""The CUDA device: whether there is one, and its streams, memory and graphs with an owner each.

API: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.backends import NoDeviceError
from lora.errors import EngineError
from lora.files.tensorfile import Array

try:
    from cuda.bindings import runtime as cudart
except ImportError as error:
    raise EngineError(
        f"cuda-bindings is not installed ({error}); install lorafuse[tensorrt] or lorafuse[tensorrt-rtx]"
    ) from error

NO_DRIVER, NO_DEVICE = 35, 100
NAMES = {
    NO_DRIVER: "no NVIDIA driver on this machine, or one that is too old",
    NO_DEVICE: "no CUDA device on this machine",
}


@dataclass(frozen=True)
class Device:
    """The first device: its name and its compute capability, such as "8.9"."""

    name: str
    major: int
    minor: int

    @property
    def capability(self) -> str:
        """As "8.9"."""
        return f"{self.major}.{self.minor}"

    def __str__(self) -> str:
        return f"{self.name} ({self.capability})"


def require_device() -> None:
    """Raises NoDeviceError unless CUDA finds a device.

    Ask before a TensorRT Runtime is made: that may crash without one.
    """
    status, count = cudart.cudaGetDeviceCount()
    if int(status) != 0 or count == 0:
        code = int(status) or NO_DEVICE
        raise NoDeviceError(f"{NAMES.get(code, 'CUDA finds no device')} (CUDA error {code}: {_words(status)})")


def device() -> Device:
    """The first device. Raises NoDeviceError."""
    require_device()
    properties = checked(cudart.cudaGetDeviceProperties(0))
    return Device(properties.name.decode(errors="replace"), properties.major, properties.minor)


@contextmanager
def on_first_device() -> Iterator[None]:
    """Inside, the first device is this thread's, whatever other libraries have made it; afterwards it is as it was."""
    current = int(checked(cudart.cudaGetDevice()))
    if current:
        checked(cudart.cudaSetDevice(0))
    try:
        yield
    finally:
        if current:
            checked(cudart.cudaSetDevice(current))


def checked(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned after its status. Raises EngineError with CUDA's words."""
    status, *values = result
    if int(status) != 0:
        raise EngineError(f"CUDA error {int(status)}: {_words(status)}")
    return values[0] if values else None


class Stream:
    """A stream of its own, so that sessions do not wait for each other."""

    def __init__(self) -> None:
        self.handle = int(checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)))

    def wait(self) -> None:
        """Until everything that was put on the stream is done."""
        checked(cudart.cudaStreamSynchronize(self.handle))

    def close(self) -> None:
        """Give it back."""
        checked(cudart.cudaStreamDestroy(self.handle))


class Buffer:
    """As many bytes on the device as in pinned memory beside it, for copies that don't block."""

    def __init__(self, size: int) -> None:
        self.size = max(1, size)  # an empty tensor still wants an address
        self.device = int(checked(cudart.cudaMalloc(self.size)))
        self._pinned = int(checked(cudart.cudaMallocHost(self.size)))
        self._bytes: Array = np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self._pinned))

    def host(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The pinned memory as an array."""
        size = int(np.prod(shape)) * dtype.itemsize
        values: Array = self._bytes[:size].view(dtype).reshape(shape)
        return values

    def to_device(self, size: int, stream: Stream) -> None:
        """Copy the first bytes of the pinned memory to the device."""
        self._copy(self.device, self._pinned, size, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)

    def to_host(self, size: int, stream: Stream) -> None:
        """Copy the first bytes of the device's memory to the pinned."""
        self._copy(self._pinned, self.device, size, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)

    def _copy(self, target: int, source: int, size: int, kind: Any, stream: Stream) -> None:
        if size:
            checked(cudart.cudaMemcpyAsync(target, source, size, kind, stream.handle))

    def close(self) -> None:
        """Give both back."""
        checked(cudart.cudaFree(self.device))
        checked(cudart.cudaFreeHost(self._pinned))


class Event:
    """A moment on a stream, once it is recorded."""

    def __init__(self) -> None:
        self._handle = checked(cudart.cudaEventCreate())

    def record(self, stream: Stream) -> None:
        """When the stream gets here."""
        checked(cudart.cudaEventRecord(self._handle, stream.handle))

    def until(self, later: Event) -> float:
        """Milliseconds between the two, when both are over."""
        return float(checked(cudart.cudaEventElapsedTime(self._handle, later._handle)))

    def close(self) -> None:
        """Give it back."""
        checked(cudart.cudaEventDestroy(self._handle))


class CudaGraph:
    """What was put on a stream between ``begin`` and here, to be launched as one."""

    def __init__(self, stream: Stream) -> None:
        graph = checked(cudart.cudaStreamEndCapture(stream.handle))
        self._launchable = checked(cudart.cudaGraphInstantiate(graph, 0))
        checked(cudart.cudaGraphDestroy(graph))
        self._stream = stream

    @staticmethod
    def begin(stream: Stream) -> None:
        """From here on, what is put on the stream is recorded and not run."""
        checked(
            cudart.cudaStreamBeginCapture(stream.handle, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )

    @staticmethod
    def abandon(stream: Stream) -> None:
        """End a recording that failed. CUDA's complaint about it says nothing new."""
        cudart.cudaStreamEndCapture(stream.handle)

    def launch(self) -> None:
        """Put it all on the stream."""
        checked(cudart.cudaGraphLaunch(self._launchable, self._stream.handle))

    def close(self) -> None:
        """Give it back."""
        checked(cudart.cudaGraphExecDestroy(self._launchable))


def _words(status: Any) -> str:
    words = cudart.cudaGetErrorString(status)[1]
    return words.decode(errors="replace") if isinstance(words, bytes) else str(words)
