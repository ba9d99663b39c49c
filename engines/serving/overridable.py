"""An ONNX model whose weights can be given with every run: initializers that are inputs too.

ONNX lets a caller override an initializer that is also listed as an input
(https://onnx.ai/onnx/repo-docs/IR.html#graphs). Listing one takes no parsing: in protobuf, a message that comes twice
is merged field by field, so that the bytes of inputs can stand behind a serialized model
(https://protobuf.dev/programming-guides/encoding/#last-one-wins). An embedding process needs no onnx for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora.files.tensorfile import Array

# onnx.proto3: the numbers of TensorProto.DataType, and of the fields on the way from a model to an input's dimension.
ELEMENT_TYPES = {
    "float32": 1,
    "float16": 10,
    "bfloat16": 16,
    "float64": 11,
    "int64": 7,
    "int32": 6,
    "int8": 3,
    "uint8": 2,
    "bool": 9,
}
MODEL_GRAPH, GRAPH_INPUT = 7, 11
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_ELEMENT, TENSOR_SHAPE, SHAPE_DIMENSION, DIMENSION_VALUE = (
    1,
    2,
    1,
    1,
    2,
    1,
    1,
)


def overridable(model: bytes, values: Mapping[str, Array]) -> bytes:
    """``model`` with the initializers that ``values`` name as inputs of their dtypes and shapes; not given, they are
    what they were.
    """
    inputs = b"".join(_message(GRAPH_INPUT, _value(name, tensor)) for name, tensor in sorted(values.items()))
    return model + _message(MODEL_GRAPH, inputs)


def _value(name: str, tensor: Array) -> bytes:
    dimensions = b"".join(_message(SHAPE_DIMENSION, _number(DIMENSION_VALUE, size)) for size in tensor.shape)
    described = _number(TENSOR_ELEMENT, ELEMENT_TYPES[tensor.dtype.name]) + _message(TENSOR_SHAPE, dimensions)
    return _message(VALUE_NAME, name.encode()) + _message(VALUE_TYPE, _message(TYPE_TENSOR, described))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have the highest bit set."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
