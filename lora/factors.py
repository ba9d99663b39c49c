"""The tensors of an adapter's file, taken one by one; one that nobody took is an error, because merging would drop it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora.errors import AdapterError, CheckpointError
from lora.tensorfile import Array, TensorFile, file_sha256


class Factors:
    """Tensors by key. ``take`` checks that the values are finite floating-point numbers."""

    def __init__(self, path: Path, tensors: Mapping[str, Array]) -> None:
        self.path = path
        self._tensors = tensors
        self._left = set(tensors)

    def names(self) -> list[str]:
        """All keys, in order."""
        return sorted(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str) -> Array:
        """The tensor ``key``, now consumed. Raises AdapterError when it is absent, not floating-point or not finite."""
        if key not in self._tensors:
            raise AdapterError(f"{self.path}: tensor '{key}' is missing; the file is incomplete, save it again")
        values = self._tensors[key]
        if values.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
            raise AdapterError(f"{self.path}: tensor '{key}' has dtype {values.dtype}; expected a floating-point type")
        if not np.isfinite(values.astype(np.float32)).all():
            raise AdapterError(f"{self.path}: tensor '{key}' holds NaN or infinity; the training has diverged")
        self._left.discard(key)
        return values

    def take_pair(self, key_a: str, key_b: str, rank: int | None, module: str) -> tuple[Array, Array]:
        """A and B of a module; ``rank`` is what the configuration says of both (None: it says nothing)."""
        a, b = self.take(key_a), self.take(key_b)
        declared = rank if rank is not None else (a.shape[0] if a.ndim else 0)
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != declared or b.shape[1] != declared or 0 in (*a.shape, *b.shape):
            said = f"the configuration says rank {rank}" if rank is not None else "their ranks differ"
            raise AdapterError(f"{self.path}: module '{module}' has factors A {a.shape} and B {b.shape}, but {said}; the files do not belong together")
        return a, b

    def done(self) -> None:
        """Raises AdapterError when a tensor was not taken."""
        if self._left:
            raise AdapterError(f"{self.path}: tensor '{min(self._left)}' belongs to no layer that is understood here; merging would drop it")


def open_factors(path: Path) -> tuple[Factors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises AdapterError when it can't be read."""
    try:
        file = TensorFile(path)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not file.spans:
        raise AdapterError(f"{path}: holds no tensors; expected the factors of at least one module")
    return Factors(path, file), file.metadata


def identity(files: Iterable[Path]) -> str:
    """SHA-256 that identifies an adapter by the bytes of its files, in order."""
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
