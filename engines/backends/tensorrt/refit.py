"""Other weights into a loaded engine, by the names that they have in the ONNX model.

Layers' names would not do: the builder fuses the weights of Q, K and V.
API: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/Refitter.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.errors import EngineError
from lora.files.tensorfile import Array

if TYPE_CHECKING:
    import tensorrt

# By numpy's names; int64 constants are shapes and are never refitted.
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}


def refit(trt: Any, engine: tensorrt.ICudaEngine, values: Mapping[str, Array], log: Any) -> None:
    """Put ``values`` in the place of the engine's weights of those names.

    Raises EngineError; the engine is of no use then.
    """
    if not engine.refittable:
        raise EngineError("the engine's weights can't be exchanged; build it with --mode refit or --mode stripped")
    refitter = trt.Refitter(engine, log)
    known = set(refitter.get_all_weights())
    if unknown := sorted(values.keys() - known):
        raise EngineError(
            f"weight '{unknown[0]}' can't be exchanged in this engine ({len(unknown)} such); build it again, now that"
            " this task is in the bundle"
        )
    held = {
        name: np.ascontiguousarray(tensor) for name, tensor in values.items()
    }  # read at the refit: they must live until then
    for name, tensor in held.items():
        weights = trt.Weights(trt.DataType.__members__[DTYPES[tensor.dtype.name]], tensor.ctypes.data, tensor.size)
        if not refitter.set_named_weights(name, weights):
            raise log.error(f"weight '{name}' ({tensor.dtype}, {tensor.size} values) was refused")
    if missing := sorted(refitter.get_missing_weights()):
        raise log.error(f"{len(missing)} weights are missing, '{missing[0]}' among them")
    if not refitter.refit_cuda_engine():
        raise log.error("the refit failed")
