"""Safetensors files: read by mapping, written as a stream, so that memory follows the largest tensor and not the file.

Format: https://github.com/huggingface/safetensors#format — eight bytes of header size (little endian), a JSON header,
then the tensors' bytes without gaps. The safetensors library checks a file; the offsets, which it keeps to itself, are
read here because ONNX external data points at them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
from numpy.typing import NDArray

from lora.errors import CheckpointError

Array = NDArray[Any]

_NUMPY_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "BF16": "bfloat16",
}
_FORMAT_NAMES = {name: code for code, name in _NUMPY_NAMES.items()}


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in its file: ``offset`` counts from the start of the file, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


class TensorFile(Mapping[str, Array]):
    """The tensors of one safetensors file, each mapped read-only when it is asked for.

    Raises CheckpointError when the file is missing, is not safetensors, is truncated, or holds a dtype numpy lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, data_start = _checked_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.spans = {name: _span(path, name, entry, data_start) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Array:
        span = self.spans[name]
        if span.length == 0:  # an empty range can't be mapped
            return np.empty(span.shape, span.dtype)
        return np.memmap(self.path, span.dtype, "r", span.offset, span.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks sizes, offsets and coverage of the whole file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(size)), 8 + size
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; expected a safetensors file") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); fetch or save it again") from error


def _span(path: Path, name: str, entry: dict[str, Any], data_start: int) -> Span:
    if entry["dtype"] not in _NUMPY_NAMES:
        raise CheckpointError(f"{path}: tensor '{name}' has dtype {entry['dtype']}; expected one of {', '.join(_NUMPY_NAMES)}")
    start, end = entry["data_offsets"]
    return Span(numpy_dtype(_NUMPY_NAMES[entry["dtype"]]), tuple(entry["shape"]), data_start + start, end - start)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called ``name``; bfloat16 comes from ml_dtypes, which is imported only then."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


@dataclass(frozen=True)
class Lazy:
    """A tensor to be written: dtype and shape are known now, the values are made when their turn comes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Array]


def write_tensors(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> str:
    """Write ``tensors`` one at a time; return the file's SHA-256 in hex.

    The same tensors give the same bytes: widest dtype first (so that every tensor is aligned), then by name.
    The caller renames the file into place; an OSError (a full disk) passes through.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.dtype.itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        header[name] = {"dtype": _FORMAT_NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        _write(file, digest, len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            values = np.ascontiguousarray(tensors[name].make()).reshape(tensors[name].shape)
            assert values.dtype == tensors[name].dtype, f"{name}: made {values.dtype}, announced {tensors[name].dtype}"
            _write(file, digest, values.reshape(-1).view(np.uint8).data if values.size else b"")
    return digest.hexdigest()


def _write(file: BinaryIO, digest: hashlib._Hash, data: bytes | memoryview) -> None:
    digest.update(data)
    file.write(data)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
