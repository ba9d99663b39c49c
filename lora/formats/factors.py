"""The tensors of an adapter's file, taken one by one. One that nobody took is an error: a merge would drop it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from lora.adapter import Layout, LowRank
from lora.errors import AdapterError, CheckpointError
from lora.files.mapped import MappedFile
from lora.files.tensorfile import Array, TensorFile, file_sha256

# What torch.save writes is called by one of these suffixes, by custom.
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Factors:
    """Tensors by key. ``take`` checks that the values are finite floating-point numbers."""

    def __init__(self, path: Path, tensors: Mapping[str, Array], spelled: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._tensors = tensors
        self._left = set(tensors)
        self._spelled = spelled or {}  # the file's own spelling of the keys, for messages

    def renamed(self, keys: Mapping[str, str]) -> Factors:
        """The tensors that ``keys``, {new: old}, names, under their new keys; the others are set aside."""
        return Factors(self.path, {new: self._tensors[old] for new, old in keys.items()}, keys)

    def names(self) -> list[str]:
        """All keys, in order."""
        return sorted(self._tensors)

    def spelling(self, key: str) -> str:
        """``key`` as the file spells it."""
        return self._spelled.get(key, key)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the tensor ``key``."""
        return tuple(self._tensors[key].shape)

    def left(self) -> list[str]:
        """The keys that nobody has taken yet, in order."""
        return sorted(self._left)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str) -> Array:
        """The tensor ``key``, now consumed. Raises AdapterError when it is absent, not floating-point or not finite."""
        spelled = self.spelling(key)
        if key not in self._tensors:
            raise AdapterError(f"{self.path}: tensor '{spelled}' is missing; the file is incomplete, save it again")
        values = self._tensors[key]
        if values.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
            raise AdapterError(
                f"{self.path}: tensor '{spelled}' has dtype {values.dtype}; expected a floating-point type"
            )
        if not np.isfinite(values.astype(np.float32)).all():
            raise AdapterError(f"{self.path}: tensor '{spelled}' holds NaN or infinity; the training has diverged")
        self._left.discard(key)
        return values

    def take_alpha(self, key: str, rank: int) -> float:
        """The scalar ``key``, now consumed; where there is none, ``rank``, so that the scaling is 1.

        Trainers store whole numbers too.
        """
        if key not in self._tensors:
            return float(rank)
        values, spelled = self._tensors[key], self.spelling(key)
        if (
            values.size != 1
            or values.dtype.kind not in "fViu"
            or not np.isfinite(alpha := float(values.astype(np.float64).item()))
        ):
            raise AdapterError(
                f"{self.path}: tensor '{spelled}' of dtype {values.dtype} and shape {values.shape} is no alpha;"
                " expected one finite number"
            )
        self._left.discard(key)
        return alpha

    def take_pair(self, key_a: str, key_b: str, rank: int | None, module: str) -> tuple[Array, Array]:
        """A and B of a module; ``rank`` is what the configuration says of both (None: it says nothing)."""
        a, b = self.take(key_a), self.take(key_b)
        declared = rank if rank is not None else (a.shape[0] if a.ndim else 0)
        if (
            a.ndim < 2
            or b.ndim != a.ndim
            or a.shape[0] != declared
            or b.shape[1] != declared
            or 0 in (*a.shape, *b.shape)
        ):
            said = f"the configuration says rank {rank}" if rank is not None else "their ranks differ"
            raise AdapterError(
                f"{self.path}: module '{module}' has factors A {a.shape} and B {b.shape}, but {said}; the files do not"
                " belong together"
            )
        if set(b.shape[2:]) - {1}:
            raise AdapterError(
                f"{self.path}: module '{module}' has a second convolution B {b.shape}; only one with a kernel of extent"
                " 1 can be merged"
            )
        return a, b

    def take_low_rank(self, module: str, key_a: str, key_b: str, key_alpha: str) -> LowRank:
        """A module's update where no configuration says more: a linear layer, or a convolution A (r, in, k, k), B (out,
        r, 1, 1).
        """
        a, b = self.take_pair(key_a, key_b, None, module)
        rank = a.shape[0]
        layout: Layout = "conv" if a.ndim > 2 else "linear"
        return LowRank(module, a, b, rank, self.take_alpha(key_alpha, rank) / rank, layout)

    def done(self) -> None:
        """Raises AdapterError when a tensor was not taken."""
        if self._left:
            raise AdapterError(
                f"{self.path}: tensor '{self.spelling(min(self._left))}' belongs to no layer that is understood here;"
                " merging would drop it"
            )


def open_factors(source: Path | MappedFile) -> tuple[Factors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file; or of a torch state dict, which has no metadata.

    Raises AdapterError when it can't be read.
    """
    path = source.path if isinstance(source, MappedFile) else source
    if path.suffix in PICKLES:
        from lora.formats.pickled import read_pickle  # torch is needed for these files only

        return Factors(path, read_pickle(source)), {}
    try:
        file = TensorFile(source)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not file.spans:
        raise AdapterError(f"{path}: holds no tensors; expected the factors of at least one module")
    return Factors(path, file), file.metadata


def identity(files: Iterable[Path | MappedFile]) -> str:
    """SHA-256 that identifies an adapter by the bytes of its files, in order."""
    hashes = (file.sha256 if isinstance(file, MappedFile) else file_sha256(file) for file in files)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
