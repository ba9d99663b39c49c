"""A second backend, in one file and known to no other room: ONNX's own reference implementation, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator

from engines.backends import BuildOptions, Model, Plan
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress


class Reference:
    """The backend. The ONNX model is the engine."""

    has_plans = False

    def version(self) -> str:
        return onnx.__version__

    def timing_cache_key(self) -> str | None:
        return None

    def build(self, model: Model, options: BuildOptions, progress: Progress) -> Plan:
        progress("parsing the model")
        self.load(model, None)
        return Plan(content=None, target="any")

    def runs(self, target: str) -> str | None:
        return None

    def load(self, model: Model, plan: Path | None) -> ReferenceSession:
        try:
            loaded = onnx.load_model_from_string(model.graph)
        except DecodeError as error:
            raise EngineError(f"{model.folder}: onnx can't parse the model ({error})") from error
        load_external_data_for_model(loaded, str(model.folder))
        for tensor in loaded.graph.initializer:
            if tensor.name in model.values:
                tensor.CopyFrom(numpy_helper.from_array(model.values[tensor.name], tensor.name))
        return ReferenceSession(loaded)


class ReferenceSession:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(model)
        self._ports = {port.name: port.type.tensor_type for port in model.graph.input}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs.keys() != self._ports.keys():
            raise EngineError(f"inputs {sorted(inputs)} given; this engine takes exactly {sorted(self._ports)}")
        for name, port in self._ports.items():
            dtype, rank = onnx.helper.tensor_dtype_to_np_dtype(port.elem_type), len(port.shape.dim)
            if (inputs[name].dtype, inputs[name].ndim) != (dtype, rank):
                raise EngineError(f"input '{name}' is {inputs[name].dtype}; expected {dtype} of rank {rank}")
        return dict(zip(self._evaluator.output_names, self._evaluator.run(None, dict(inputs)), strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._evaluator
