"""A task's ONNX file, read without onnx: its initializers and where their bytes lie, and nothing that reads a file.

Fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3. Every message on the way to a tensor is walked, and a
field that is not known is refused: what this reader overlooks, a runtime might open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from exporter.bundle.wire import Message, Value, WireError, message, numbers, read, text
from lora.errors import BundleError
from lora.wording import printable

# onnx.proto3's TensorProto.DataType, as numpy calls those that a weights file can hold.
ELEMENT_TYPES: Mapping[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}
EXTERNAL = 1  # TensorProto.DataLocation
READS_FILES = frozenset({"EPContext"})  # ONNX Runtime's node for a compiled model, which may lie in a file of its own

MODEL = message(
    "model",
    ir_version="1 number",
    producer_name="2 bytes",
    producer_version="3 bytes",
    domain="4 bytes",
    model_version="5 number",
    doc_string="6 bytes",
    graph="7 bytes",
    opset_import="8 bytes*",
    metadata_props="14 bytes*",
    functions="25 bytes*",
)
GRAPH = message(
    "graph",
    node="1 bytes*",
    name="2 bytes",
    initializer="5 bytes*",
    doc_string="10 bytes",
    input="11 bytes*",
    output="12 bytes*",
    value_info="13 bytes*",
    quantization_annotation="14 bytes*",
    metadata_props="16 bytes*",
)
FUNCTION = message(
    "function",
    name="1 bytes",
    input="4 bytes*",
    output="5 bytes*",
    attribute_name="6 bytes*",
    node="7 bytes*",
    doc_string="8 bytes",
    opset_import="9 bytes*",
    domain="10 bytes",
    attribute="11 bytes*",
    value_info="12 bytes*",
    overload="13 bytes",
    metadata_props="14 bytes*",
)
NODE = message(
    "node",
    input="1 bytes*",
    output="2 bytes*",
    name="3 bytes",
    op_type="4 bytes",
    attribute="5 bytes*",
    doc_string="6 bytes",
    domain="7 bytes",
    overload="8 bytes",
    metadata_props="9 bytes*",
)
ATTRIBUTE = message(
    "attribute",
    name="1 bytes",
    f="2 four",
    i="3 number",
    s="4 bytes",
    t="5 bytes",
    g="6 bytes",
    floats="7 fours*",
    ints="8 numbers*",
    strings="9 bytes*",
    tensors="10 bytes*",
    graphs="11 bytes*",
    doc_string="13 bytes",
    tp="14 bytes",
    type_protos="15 bytes*",
    type="20 number",
    ref_attr_name="21 bytes",
)
TENSOR = message(
    "tensor",
    dims="1 numbers*",
    data_type="2 number",
    float_data="4 fours*",
    int32_data="5 numbers*",
    string_data="6 bytes*",
    int64_data="7 numbers*",
    name="8 bytes",
    raw_data="9 bytes",
    double_data="10 eights*",
    uint64_data="11 numbers*",
    doc_string="12 bytes",
    external_data="13 bytes*",
    data_location="14 number",
    metadata_props="16 bytes*",
)
ENTRY = message("entry of external data", key="1 bytes", value="2 bytes")
VALUE = message("value", name="1 bytes", type="2 bytes", doc_string="3 bytes", metadata_props="4 bytes*")
TYPE = message(
    "type",
    tensor_type="1 bytes",
    sequence_type="4 bytes",
    map_type="5 bytes",
    denotation="6 bytes",
    sparse_tensor_type="8 bytes",
    optional_type="9 bytes",
)
TENSOR_TYPE = message("tensor type", elem_type="1 number", shape="2 bytes")
SHAPE = message("shape", dim="1 bytes*")
DIMENSION = message("dimension", dim_value="1 number", dim_param="2 bytes", denotation="3 bytes")


@dataclass(frozen=True)
class External:
    """Where an initializer's bytes lie: the name of a file, and the range in it, in bytes."""

    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph; ``external`` is None where the graph holds its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    external: External | None


@dataclass
class GraphFile:
    """What a file's graph has: initializers, and the names of its inputs and outputs.

    ``skeleton`` is the SHA-256 of the file without what it says about where weights lie: two files of one skeleton are
    one computation on different weights.
    """

    initializers: dict[str, Initializer] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    skeleton: str = ""


def read_graph(path: Path, content: bytes) -> GraphFile:
    """The graph in ``content``, found in the file ``path``.

    Raises BundleError where the file is no ONNX model, holds a field that is not known, or keeps anything but an
    initializer's values in another file.
    """
    try:
        return _read(content)
    except (WireError, RecursionError) as error:
        raise BundleError(
            f"{path}: not an ONNX model that can be served ({printable(str(error))}); export the task again"
        ) from error


class _Skeleton:
    """A hash of fields, each with its name and its length, so that no two lists of fields look alike."""

    def __init__(self, content: bytes) -> None:
        self._content, self._digest = content, hashlib.sha256()

    def add(self, name: str, value: Value) -> None:
        held = str(value).encode() if isinstance(value, int) else self._content[value[0] : value[1]]
        self._digest.update(b"%s %d " % (name.encode(), len(held)))
        self._digest.update(held)

    def __str__(self) -> str:
        return self._digest.hexdigest()


def _read(content: bytes) -> GraphFile:
    found, skeleton, graph = GraphFile(), _Skeleton(content), None
    for name, value in read(content, 0, len(content), MODEL):
        if name == "graph":
            graph = value
            continue
        skeleton.add(name, value)
        if name == "functions":
            _walk(content, value, FUNCTION)
    if graph is None:
        raise WireError("it has no graph")
    for name, value in _fields(content, graph, GRAPH):
        if name == "initializer":
            _add_initializer(content, value, found, skeleton)
            continue
        skeleton.add(name, value)
        match name:
            case "node":
                _walk(content, value, NODE)
            case "input":
                found.inputs.append(_named(content, value))
            case "output":
                found.outputs.append(_named(content, value))
    found.skeleton = str(skeleton)
    return found


def _add_initializer(content: bytes, value: Value, found: GraphFile, skeleton: _Skeleton) -> None:
    name, dtype, location = "", 0, 0
    shape: list[int] = []
    entries: list[tuple[int, int]] = []
    holds = False
    for key, inner in _fields(content, value, TENSOR):
        if key == "external_data":
            assert not isinstance(inner, int)
            entries.append(inner)
            continue
        skeleton.add(key, inner)
        match key:
            case "name":
                name = text(content, inner)
            case "dims":
                shape += numbers(content, inner)
            case "data_type":
                dtype = _number(inner)
            case "data_location":
                location = _number(inner)
            case "doc_string" | "metadata_props":
                pass
            case _:
                holds = True
    skeleton.add("end", 0)
    if not name or name in found.initializers:
        raise WireError(f"the initializer '{name}' has no name of its own")
    if any(size >= 1 << 63 for size in shape):
        raise WireError(f"the initializer '{name}' has a negative size")
    external = None
    if location or entries:
        if location != EXTERNAL or holds:
            raise WireError(f"the initializer '{name}' has values here and in another file")
        external = _external(content, name, entries)
    described = ELEMENT_TYPES.get(dtype, f"type {dtype}")
    found.initializers[name] = Initializer(name, described, tuple(shape), external)


def _external(content: bytes, name: str, entries: list[tuple[int, int]]) -> External:
    said: dict[str, str] = {}
    for start, end in entries:
        entry = {key: text(content, value) for key, value in read(content, start, end, ENTRY)}
        if entry.keys() != {"key", "value"} or entry["key"] in said:
            raise WireError(f"the external data of '{name}' are not described once")
        said[entry["key"]] = entry["value"]
    if said.keys() != {"location", "offset", "length"}:
        raise WireError(f"the external data of '{name}' have {sorted(said)}; expected length, location and offset")
    sizes = [said["offset"], said["length"]]
    if not all(size.isascii() and size.isdecimal() and len(size) < 19 for size in sizes):
        raise WireError(f"the external data of '{name}' lie at {' and '.join(sizes)}")
    return External(said["location"], *map(int, sizes))


def _walk(content: bytes, value: Value, kind: Message) -> None:
    """Refuse what reads a file, in this message and in those inside it."""
    for name, inner in _fields(content, value, kind):
        match name:
            case "node":
                _walk(content, inner, NODE)
            case "attribute":
                _walk(content, inner, ATTRIBUTE)
            case "g" | "graphs":
                _walk(content, inner, GRAPH)
            case "t" | "tensors" | "initializer":
                _check_inline(content, inner)
            case "op_type" if text(content, inner) in READS_FILES:
                raise WireError(f"a node {text(content, inner)} may read a file")


def _check_inline(content: bytes, value: Value) -> None:
    for name, inner in _fields(content, value, TENSOR):
        if name == "external_data" or (name == "data_location" and inner != 0):
            raise WireError("a tensor that is no initializer of the graph lies in another file")


def _named(content: bytes, value: Value) -> str:
    """The name of an input or output, whose axes have names of text too: runtimes ask for them."""
    found = ""
    for name, inner in _fields(content, value, VALUE):
        if name == "name":
            found = text(content, inner)
        elif name == "type":
            _check_axes(content, inner)
    return found


def _check_axes(content: bytes, value: Value) -> None:
    inside = {"tensor_type": TENSOR_TYPE, "shape": SHAPE, "dim": DIMENSION}
    unread = [(value, TYPE)]
    while unread:
        for name, inner in _fields(content, *unread.pop()):
            if name == "dim_param":
                text(content, inner)
            elif name in inside:
                unread.append((inner, inside[name]))


def _fields(content: bytes, value: Value, kind: Message) -> Iterator[tuple[str, Value]]:
    assert not isinstance(value, int)
    return read(content, *value, kind)


def _number(value: Value) -> int:
    assert isinstance(value, int)
    return value
