"""Safetensors files: read by mapping, written as a stream, so that memory follows the largest tensor and not the file.

Format: https://github.com/huggingface/safetensors#format — eight bytes of header size (little endian), a JSON header,
then the tensors' bytes without gaps. The safetensors library checks a file; the offsets, which it keeps to itself, are
read here because ONNX external data points at them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import safetensors
from numpy.typing import NDArray

from lora.errors import CheckpointError
from lora.files.header import HeaderError, read_header
from lora.files.mapped import Content, MappedFile
from lora.wording import printable

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
_WIDTHS = {
    code: 2 if name == "bfloat16" else np.dtype(name).itemsize for code, name in _NUMPY_NAMES.items()
}  # bytes; ml_dtypes is imported only for a file that has its type


@dataclass(frozen=True)
class Span:
    """Where a tensor's bytes lie in its file: ``offset`` counts from the start of the file, in bytes."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    length: int


class TensorFile(Mapping[str, Array]):
    """The tensors of one safetensors file, each mapped read-only when it is asked for.

    Of a ``MappedFile``, they are views of its mapping, and no file is opened again. Raises CheckpointError when the
    file is missing, is not safetensors, is truncated, or holds a dtype numpy lacks.
    """

    def __init__(self, source: Path | MappedFile) -> None:
        self._content: Content | None = None
        if isinstance(source, MappedFile):
            self.path, self._content = source.path, source.content
            header, data_start = _mapped_header(source)
        else:
            self.path = source
            header, data_start = _checked_header(source)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.spans = {name: _span(self.path, name, entry, data_start) for name, entry in header.items()}

    def __getitem__(self, name: str) -> Array:
        span = self.spans[name]
        if span.length == 0:  # an empty range can't be mapped
            return np.empty(span.shape, span.dtype)
        if self._content is None:
            return np.memmap(self.path, span.dtype, "r", span.offset, span.shape)
        values: Array = np.frombuffer(self._content, np.uint8, span.length, span.offset)
        return values.view(span.dtype).reshape(span.shape)

    @property
    def content(self) -> Content:
        """The bytes of a mapped file."""
        assert self._content is not None, "opened by its path"
        return self._content

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without mapping it."""
        return self.spans[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)


def shape_of(tensors: Mapping[str, Array], name: str) -> tuple[int, ...]:
    """A tensor's shape, without reading it where ``tensors`` can tell (a file, a checkpoint, a quantized base)."""
    shape = getattr(tensors, "shape", None)
    return tuple(shape(name)) if shape is not None else tensors[name].shape


def _mapped_header(file: MappedFile) -> tuple[dict[str, Any], int]:
    try:
        return read_header(file.content, _WIDTHS)
    except HeaderError as error:
        raise CheckpointError(
            f"{file.path}: not a whole safetensors file ({printable(str(error))}); fetch or save it again"
        ) from error


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
        raise CheckpointError(
            f"{path}: tensor '{printable(name)}' has dtype {printable(entry['dtype'])}; expected one of"
            f" {', '.join(_NUMPY_NAMES)}"
        )
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


class TensorWriter:
    """Writes a safetensors file one tensor at a time; use it as a context manager.

    ``expected`` are the tensors that may come, by dtype and shape: room for their header is kept, and its size, the
    file's first eight bytes, is written last. A file that was cut short can therefore not be read as a whole one.
    An OSError (a full disk) passes through.
    """

    def __init__(
        self,
        path: Path,
        expected: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        total = sum(_size(dtype, shape) for dtype, shape in expected.values())
        longest = np.dtype(np.bool_)  # no dtype has a longer name in the format
        room = {name: _entry(longest, shape, total * 8, total * 8) for name, (_, shape) in expected.items()}
        self._room = len(_encoded({**self._header, **room}, 0))
        self._file: BinaryIO = path.open("wb")
        self._file.write(bytes(8 + self._room))

    def add(self, name: str, values: Array) -> None:
        """Write the next tensor."""
        start = self._file.tell() - 8 - self._room
        self._header[name] = _entry(values.dtype, values.shape, start, start + values.nbytes)
        if values.size:
            self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            # Starts writing to the disk now, while the next tensor is made: the flush at the end has less to wait for.
            # What
            # is being written stays cached, to be hashed soon; only a second such call would drop it.
            os.posix_fadvise(self._file.fileno(), 8 + self._room + start, values.nbytes, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            if kind is None:
                encoded = _encoded(self._header, self._room)
                assert len(encoded) == self._room, "a tensor came that was not expected"
                file.seek(8)
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                file.write(self._room.to_bytes(8, "little"))


def write_tensors(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """Write all of ``tensors``, one at a time.

    The same tensors give the same bytes: widest dtype first (so that every tensor is aligned), then by name.
    """
    with TensorWriter(
        path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata
    ) as writer:
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            values = tensors[name].make()
            assert (values.dtype, values.shape) == (tensors[name].dtype, tensors[name].shape), (
                f"{name}: not what was announced"
            )
            writer.add(name, values)


def _entry(dtype: np.dtype[Any], shape: tuple[int, ...], start: int, end: int) -> dict[str, Any]:
    return {"dtype": _FORMAT_NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}


def _size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _encoded(header: Mapping[str, Any], room: int) -> bytes:
    """The header as JSON, padded with spaces to ``room`` bytes and to a multiple of eight."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded.ljust(max(room, len(encoded) + -len(encoded) % 8))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
