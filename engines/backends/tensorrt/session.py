"""From a plan to an engine that runs: one context, one stream.

Buffers are allocated once, for the largest shapes of the profiles.

API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import ml_dtypes
import numpy as np

from engines.backends.tensorrt.cuda import Buffer, CudaGraph, Event, Stream, on_first_device, require_device
from engines.backends.tensorrt.log import log_of
from engines.backends.tensorrt.refit import refit
from lora.errors import EngineError
from lora.files.tensorfile import Array

if TYPE_CHECKING:
    import tensorrt

Shapes = tuple[tuple[int, ...], ...]
Sizes = Mapping[str, tuple[int, ...]]
# By the names of TensorRT's DataType; its own conversion knows no bfloat16.
DTYPES: Mapping[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


def open_session(trt: Any, plan: Path, values: Mapping[str, Array]) -> TensorRTSession:
    """Load ``plan``, and put ``values`` in the place of its weights of those names.

    Raises NoDeviceError, EngineError.
    """
    require_device()
    log = log_of(trt)
    log.begin()
    with on_first_device():
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise log.error(f"{plan}: the plan was refused")
        if values:
            refit(trt, engine, values, log)
        return TensorRTSession(trt, runtime, engine, log)


class TensorRTSession:
    """An engine with a context and buffers of its own; not thread-safe: give each thread a ``sibling``.

    With ``graphs``, the second of several runs of the same shapes is recorded as a CUDA graph, and those that follow
    launch it. A graph holds for the context as it was: other shapes end it, and the first run of any shape is plain,
    for TensorRT may then still allocate. RTX specialises its kernels while it runs, and has graphs of its own: its runs
    are not recorded.
    """

    def __init__(self, trt: Any, runtime: Any, engine: tensorrt.ICudaEngine, log: Any, graphs: bool = True) -> None:
        self._trt, self._runtime, self._engine, self._log = trt, runtime, engine, log
        context = engine.create_execution_context()
        if context is None:
            raise log.error("no execution context could be made")
        self._context: tensorrt.IExecutionContext = context
        self._stream = Stream()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._dtypes = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        self._buffers: dict[str, Buffer] = {}
        self._profile = 0
        self._shapes: Shapes | None = None  # those of the last run, to which the context is set
        self._graph: CudaGraph | None = None
        self._records = graphs and not hasattr(context, "is_stream_capturable")  # which RTX alone has
        self._allocate()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, copied out of the buffers."""
        self._check(inputs)
        with on_first_device():
            shapes = self._shapes_of(inputs)
            again = shapes == self._shapes
            if not again:
                self._set_shapes(shapes)
            self._fill(inputs)
            sizes = self._sizes()
            if again:
                self._run_again(sizes)
            else:
                self._enqueue(sizes)
            self._stream.wait()
            self._shapes = shapes
            return {name: self._buffers[name].host(sizes[name], self._dtypes[name]).copy() for name in self._outputs}

    def stages(self, inputs: Mapping[str, Array]) -> tuple[float, float, float]:
        """Time a run on the device, in ms: the copies there, the engine, the copies back. No graph is replayed.

        A run goes before it, so that the stream is busy while the host puts this one on it; where it launches more
        slowly than the device computes, its launches are in the time.
        """
        self._check(inputs)
        with on_first_device():
            self._set_shapes(self._shapes_of(inputs))
            self._fill(inputs)
            sizes, moments = self._sizes(), [Event() for _ in range(4)]
            self._enqueue(sizes)
            moments[0].record(self._stream)
            for stage, moment in zip((self._copy_in, self._compute, self._copy_out), moments[1:], strict=True):
                stage(sizes)
                moment.record(self._stream)
            self._stream.wait()
            there, engine, back = (earlier.until(later) for earlier, later in pairwise(moments))
            for moment in moments:
                moment.close()
        return there, engine, back

    def refit(self, values: Mapping[str, Array]) -> None:
        """Exchange weights, by initializer names and in the graph's axis order.

        A recorded graph is dropped; run nothing meanwhile.
        """
        with on_first_device():
            self._drop_graph()
            self._shapes = None
            refit(self._trt, self._engine, values, self._log)

    def layers(self) -> str:
        """What the engine consists of, as TensorRT's inspector says it, in JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def sibling(self) -> TensorRTSession:
        """Another context over the same engine's weights, with a stream and buffers of its own."""
        with on_first_device():
            return TensorRTSession(self._trt, self._runtime, self._engine, self._log, graphs=self._records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with on_first_device():
            self._drop_graph()
            for buffer in self._buffers.values():
                buffer.close()
            self._stream.close()
            del self._context, self._engine, self._runtime

    def _shapes_of(self, inputs: Mapping[str, Array]) -> Shapes:
        return tuple(inputs[name].shape for name in self._inputs)

    def _set_shapes(self, shapes: Shapes) -> None:
        self._drop_graph()
        self._shapes = None
        self._choose_profile(shapes)
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise self._log.error(f"input '{name}' of shape {shape} was refused")

    def _fill(self, inputs: Mapping[str, Array]) -> None:
        for name in self._inputs:
            self._buffers[name].host(inputs[name].shape, self._dtypes[name])[...] = inputs[name]

    def _sizes(self) -> Sizes:
        return {name: tuple(self._context.get_tensor_shape(name)) for name in (*self._inputs, *self._outputs)}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        if inputs.keys() != set(self._inputs):
            raise EngineError(f"inputs {sorted(inputs)} given; this engine takes exactly {sorted(self._inputs)}")
        for name in self._inputs:
            dtype, rank = self._dtypes[name], len(self._engine.get_tensor_shape(name))
            if inputs[name].dtype != dtype or inputs[name].ndim != rank:
                raise EngineError(
                    f"input '{name}' is {inputs[name].dtype} of rank {inputs[name].ndim}; expected {dtype} of rank"
                    f" {rank}"
                )

    def _choose_profile(self, shapes: Shapes) -> None:
        """The last profile that takes the shapes: later ones are narrower. Raises EngineError when none does."""
        for index in reversed(range(self._engine.num_optimization_profiles)):
            if all(self._takes(index, name, shape) for name, shape in zip(self._inputs, shapes, strict=True)):
                break
        else:
            given = ", ".join(
                f"{name} {'x'.join(map(str, shape))}" for name, shape in zip(self._inputs, shapes, strict=True)
            )
            raise EngineError(
                f"no optimization profile of this engine takes {given}; build it with a --profile that does"
            )
        if index != self._profile:
            if not self._context.set_optimization_profile_async(index, self._stream.handle):
                raise self._log.error(f"optimization profile {index} was refused")
            self._stream.wait()
            self._profile = index

    def _takes(self, profile: int, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._engine.get_tensor_profile_shape(name, profile)
        return all(low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True))

    def _allocate(self) -> None:
        """Buffers for the largest shapes of any profile, and their addresses, which then never change."""
        largest: dict[str, int] = {}
        for profile in range(self._engine.num_optimization_profiles):
            if not self._context.set_optimization_profile_async(profile, self._stream.handle):
                raise self._log.error(f"optimization profile {profile} was refused")
            self._stream.wait()
            for name in self._inputs:
                self._context.set_input_shape(name, self._engine.get_tensor_profile_shape(name, profile)[2])
            for name in (*self._inputs, *self._outputs):
                size = int(np.prod(tuple(self._context.get_tensor_shape(name)))) * self._dtypes[name].itemsize
                largest[name] = max(size, largest.get(name, 0))
            self._profile = profile
        for name, size in largest.items():
            if size < 0:
                raise EngineError(
                    f"output '{name}' has a size that depends on the data; expected one that follows from the inputs'"
                    " shapes"
                )
            self._buffers[name] = Buffer(size)
            self._context.set_tensor_address(name, self._buffers[name].device)

    def _run_again(self, sizes: Sizes) -> None:
        """Launch what was recorded, or record it first, where that can be done."""
        if self._graph is None and self._records:
            self._graph = self._recorded(sizes)
            self._records = self._graph is not None
        if self._graph is None:
            self._enqueue(sizes)
        else:
            self._graph.launch()

    def _recorded(self, sizes: Sizes) -> CudaGraph | None:
        """A run as a graph; None for an engine that does what can't be recorded."""
        CudaGraph.begin(self._stream)
        try:
            self._enqueue(sizes)
        except EngineError:
            CudaGraph.abandon(self._stream)
            return None
        try:
            return CudaGraph(self._stream)
        except EngineError:
            return None

    def _enqueue(self, sizes: Sizes) -> None:
        self._copy_in(sizes)
        self._compute(sizes)
        self._copy_out(sizes)

    def _copy_in(self, sizes: Sizes) -> None:
        for name in self._inputs:
            self._buffers[name].to_device(self._bytes(name, sizes), self._stream)

    def _compute(self, sizes: Sizes) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._log.error("the engine did not run")

    def _copy_out(self, sizes: Sizes) -> None:
        for name in self._outputs:
            self._buffers[name].to_host(self._bytes(name, sizes), self._stream)

    def _bytes(self, name: str, sizes: Sizes) -> int:
        return int(np.prod(sizes[name])) * self._dtypes[name].itemsize

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = None
