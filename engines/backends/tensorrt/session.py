"""From a plan to an engine that runs: one context, one stream, buffers allocated once for the largest shapes of the profiles.

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

from engines.backends.tensorrt.cuda import Buffer, CudaGraph, Event, Stream, require_device
from engines.backends.tensorrt.log import log_of
from engines.backends.tensorrt.refit import refit
from lora.errors import EngineError
from lora.tensorfile import Array

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
GRAPHS = 16  # captured at most; the one used longest ago makes room


def open_session(trt: Any, plan: Path, values: Mapping[str, Array]) -> TensorRTSession:
    """Load ``plan``, and put ``values`` in the place of its weights of those names. Raises NoDeviceError, EngineError."""
    require_device()
    log = log_of(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise log.error(f"{plan}: the plan was refused")
    if values:
        refit(trt, engine, values, log)
    return TensorRTSession(trt, runtime, engine, log)


class TensorRTSession:
    """An engine with a context and buffers of its own; not thread-safe: give each thread a ``sibling``.

    With ``graphs``, the second run of the same shapes is recorded as a CUDA graph, and later ones launch it.
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
        self._graphs: dict[Shapes, CudaGraph | None] | None = {} if graphs else None
        self._allocate()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs by name, copied out of the buffers."""
        shapes, sizes = self._prepare(inputs)
        self._execute(shapes, sizes)
        self._stream.wait()
        return {name: self._buffers[name].host(sizes[name], self._dtypes[name]).copy() for name in self._outputs}

    def stages(self, inputs: Mapping[str, Array]) -> tuple[float, float, float]:
        """What a run takes on the device, in ms and without a recorded graph: the copies there, the engine, the copies back."""
        _, sizes = self._prepare(inputs)
        moments = [Event(self._stream)]
        for stage in (self._copy_in, self._compute, self._copy_out):
            stage(sizes)
            moments.append(Event(self._stream))
        self._stream.wait()
        there, engine, back = (earlier.until(later) for earlier, later in pairwise(moments))
        for moment in moments:
            moment.close()
        return there, engine, back

    def refit(self, values: Mapping[str, Array]) -> None:
        """Exchange weights, by initializer names and in the graph's axis order. Recorded graphs are dropped; run nothing meanwhile."""
        self._drop_graphs()
        refit(self._trt, self._engine, values, self._log)

    def layers(self) -> str:
        """What the engine consists of, as TensorRT's inspector says it, in JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def sibling(self) -> TensorRTSession:
        """Another context over the same engine's weights, with a stream and buffers of its own."""
        return TensorRTSession(self._trt, self._runtime, self._engine, self._log, graphs=self._graphs is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop_graphs()
        for buffer in self._buffers.values():
            buffer.close()
        self._stream.close()
        del self._context, self._engine, self._runtime

    def _prepare(self, inputs: Mapping[str, Array]) -> tuple[Shapes, Sizes]:
        """Set the context's shapes and fill the pinned buffers: the inputs' shapes, and those of all tensors by name."""
        self._check(inputs)
        shapes = tuple(inputs[name].shape for name in self._inputs)
        self._choose_profile(shapes)
        for name, shape in zip(self._inputs, shapes, strict=True):
            if not self._context.set_input_shape(name, shape):
                raise self._log.error(f"input '{name}' of shape {shape} was refused")
            self._buffers[name].host(shape, self._dtypes[name])[...] = inputs[name]
        return shapes, {name: tuple(self._context.get_tensor_shape(name)) for name in (*self._inputs, *self._outputs)}

    def _check(self, inputs: Mapping[str, Array]) -> None:
        if inputs.keys() != set(self._inputs):
            raise EngineError(f"inputs {sorted(inputs)} given; this engine takes exactly {sorted(self._inputs)}")
        for name in self._inputs:
            dtype, rank = self._dtypes[name], len(self._engine.get_tensor_shape(name))
            if inputs[name].dtype != dtype or inputs[name].ndim != rank:
                raise EngineError(f"input '{name}' is {inputs[name].dtype} of rank {inputs[name].ndim}; expected {dtype} of rank {rank}")

    def _choose_profile(self, shapes: Shapes) -> None:
        """The last profile that takes the shapes: later ones are narrower. Raises EngineError when none does."""
        for index in reversed(range(self._engine.num_optimization_profiles)):
            if all(self._takes(index, name, shape) for name, shape in zip(self._inputs, shapes, strict=True)):
                break
        else:
            given = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in zip(self._inputs, shapes, strict=True))
            raise EngineError(f"no optimization profile of this engine takes {given}; build it with a --profile that does")
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
                raise EngineError(f"output '{name}' has a size that depends on the data; expected one that follows from the inputs' shapes")
            self._buffers[name] = Buffer(size)
            self._context.set_tensor_address(name, self._buffers[name].device)

    def _execute(self, shapes: Shapes, sizes: Sizes) -> None:
        if self._graphs is None or shapes not in self._graphs:
            self._enqueue(sizes)  # the first run of a shape may allocate and compile, which a recording may not
            self._remember(shapes, None)
            return
        graph = self._graphs[shapes]
        if graph is None:
            CudaGraph.begin(self._stream)
            try:
                self._enqueue(sizes)
            finally:
                graph = CudaGraph(self._stream)
        self._remember(shapes, graph)
        graph.launch()

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

    def _remember(self, shapes: Shapes, graph: CudaGraph | None) -> None:
        """Move the shapes to the end: the first are those used longest ago."""
        if self._graphs is None:
            return
        self._graphs.pop(shapes, None)
        self._graphs[shapes] = graph
        if len(self._graphs) > GRAPHS:
            oldest = self._graphs.pop(next(iter(self._graphs)))
            if oldest is not None:
                oldest.close()

    def _drop_graphs(self) -> None:
        for graph in (self._graphs or {}).values():
            if graph is not None:
                graph.close()
        if self._graphs is not None:
            self._graphs.clear()
