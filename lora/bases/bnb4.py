"""A bitsandbytes 4-bit checkpoint (nf4 or fp4) as the dense weights that it stands for.

A weight ``w`` of n elements, taken row by row in blocks of ``blocksize``, is stored as several tensors:

    w                   ⌈n/2⌉ bytes, two codes each, the first in the high half; their dtype only names a storage
    w.quant_map         what the 16 codes stand for, float32
    w.absmax            one scale per block, float32; or uint8, where the scales are quantized themselves
    w.nested_absmax     then: one scale per ``nested_blocksize`` of those scales, float32
    w.nested_quant_map  then: what their 256 codes stand for, float32
    w.quant_state.…     JSON as uint8: the sizes above, ``nested_offset``, and w's shape and dtype

    element[i] = quant_map[code[i]] · scale[i // blocksize]                  in float32, rounded once to w's dtype
    scale[b]   = nested_quant_map[absmax[b]] · nested_absmax[b // nested_blocksize] + nested_offset

fp4's code 8 is a second zero. Its value here is +0.0, as quant_map holds it and as bitsandbytes' plain implementation
gives it; bitsandbytes' kernel gives −0.0 on processors without AVX-512. The values are equal, the bits are not.

Method: Dettmers et al. 2023 (QLoRA), section 3 and appendix E, https://arxiv.org/abs/2305.14314. Layout: ``QuantState``
in https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from lora.bases.checkpoint import Checkpoint
from lora.errors import CheckpointError
from lora.files.tensorfile import Array, numpy_dtype

MARK = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
PIECE = 1 << 20  # elements dequantized at a time; a multiple of every block size
# What the codes stand for. nf4: quantiles of the normal distribution (QLoRA, appendix E). fp4: sign, two exponent bits,
# one
# mantissa bit, scaled to [-1, 1]. bitsandbytes takes these whatever a file's quant_map holds, so a file must hold
# these.
_NF4_BELOW = (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
_NF4_ABOVE = (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
CODES: dict[str, Array] = {
    "nf4": np.array((*_NF4_BELOW, *_NF4_ABOVE), np.float32),
    "fp4": np.array([sign * value / 12 for sign in (1, -1) for value in _FP4], np.float32),
}

Size = Annotated[int, msgspec.Meta(ge=1)]


class QuantState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON beside a weight. The nested fields are there together, or the scales are plain float32."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: tuple[Size, ...]
    nested_blocksize: Size | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None

    @property
    def elements(self) -> int:
        """How many elements the weight has."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """How many scales the weight has; the last block may be short."""
        return -(-self.elements // self.blocksize)


class Bnb4(Mapping[str, Array]):
    """The weights of a 4-bit checkpoint by name: each is dequantized when it is asked for, other tensors are as stored.

    ``stored`` are the file's own tensors and ``path`` is named in errors. ``states`` are the quantized weights'.
    Raises CheckpointError, on opening, when a quant state can't be read or its tensors are missing or of another size.
    """

    def __init__(self, stored: Mapping[str, Array], path: Path) -> None:
        self._stored = stored
        self.states = {name.partition(MARK)[0]: _state(path, name, stored[name]) for name in stored if MARK in name}
        for name, state in self.states.items():
            _check(path, name, state, stored)
        parts = {name + part for name in self.states for part in PARTS}
        self._names = {name: None for name in stored if name not in parts and MARK not in name}
        _check_owned(path, self._names)

    def __getitem__(self, name: str) -> Array:
        if name not in self:
            raise KeyError(name)
        state = self.states.get(name)
        return self._stored[name] if state is None else _dequantized(state, name, self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._names or name in self.tied

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def tied(self) -> Mapping[str, str]:
        """{an output embedding stored as the input's: that one's name}; found, not listed, as in a Checkpoint."""
        return self._stored.tied if isinstance(self._stored, Checkpoint) else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without dequantizing it."""
        return self.states[name].shape if name in self.states else self._stored[name].shape


def is_bnb4(names: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of a bitsandbytes 4-bit checkpoint."""
    return any(MARK in name for name in names)


def _state(path: Path, name: str, data: Array) -> QuantState:
    try:
        state = msgspec.json.decode(data.tobytes(), type=QuantState)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: '{name}' is not a quant state of bitsandbytes 4-bit ({error!r}); save the base again"
        ) from error
    if state.quant_type != name.partition(MARK)[2]:
        raise CheckpointError(f"{path}: '{name}' holds a quant state of type {state.quant_type}; save the base again")
    if len({field is None for field in (state.nested_blocksize, state.nested_dtype, state.nested_offset)}) != 1:
        raise CheckpointError(
            f"{path}: '{name}' has some of nested_blocksize, nested_dtype and nested_offset, not all; save the base"
            " again"
        )
    return state


def _check(path: Path, name: str, state: QuantState, stored: Mapping[str, Array]) -> None:
    """Every tensor that the weight needs is there, of its dtype and size, before any is dequantized."""
    for part, (dtype, size) in _layout(state).items():
        tensor = stored.get(name + part)
        if tensor is None:
            raise CheckpointError(f"{path}: '{name + part}' is missing; save the base again")
        if tensor.dtype != dtype or tensor.shape != (size,):
            raise CheckpointError(
                f"{path}: '{name + part}' is {tensor.dtype} {tensor.shape}, but a {state.quant_type} weight of shape"
                f" {state.shape} in blocks of {state.blocksize} needs {dtype} ({size},); save the base again"
            )
    packed, size = stored.get(name), (state.elements + 1) // 2
    if packed is None or packed.nbytes != size or packed.shape[1:] != (1,):
        found = "missing" if packed is None else f"{packed.dtype} {packed.shape}"
        raise CheckpointError(
            f"{path}: '{name}' is {found}, but a weight of shape {state.shape} is {size} bytes of codes in one column;"
            " save the base again"
        )
    if not np.allclose(stored[f"{name}.quant_map"], CODES[state.quant_type], rtol=0, atol=1e-6):
        raise CheckpointError(f"{path}: '{name}.quant_map' is not {state.quant_type}'s; the weights can't be told")


def _check_owned(path: Path, names: Mapping[str, Any]) -> None:
    """A weight with scales and no quant state would pass for dense bytes."""
    for name in names:
        owner, _, part = name.rpartition(".")
        if f".{part}" in PARTS and owner in names:
            raise CheckpointError(
                f"{path}: '{owner}' has a tensor {part} but no quant state ('{owner}{MARK}nf4'); save the base again"
            )


def _layout(state: QuantState) -> dict[str, tuple[np.dtype[Any], int]]:
    """{part: its dtype and length} of what stands beside a packed weight."""
    single, byte = np.dtype(np.float32), np.dtype(np.uint8)
    if state.nested_blocksize is None:
        return {".quant_map": (single, 16), ".absmax": (single, state.blocks)}
    groups = -(-state.blocks // state.nested_blocksize)
    return {
        ".quant_map": (single, 16),
        ".absmax": (byte, state.blocks),
        ".nested_absmax": (single, groups),
        ".nested_quant_map": (single, 256),
    }


def _dequantized(state: QuantState, name: str, stored: Mapping[str, Array]) -> Array:
    """The weight, of the state's shape and dtype, computed piece by piece in float32."""
    packed = np.ascontiguousarray(stored[name]).reshape(-1).view(np.uint8)
    code = np.asarray(stored[f"{name}.quant_map"])
    pairs = np.stack(
        [np.repeat(code, 16), np.tile(code, 16)], axis=1
    )  # (256, 2): what the two codes of a byte stand for
    scales = _scales(state, name, stored)
    weight = np.empty(state.elements, numpy_dtype(state.dtype))
    for start in range(0, state.elements, PIECE):
        end = min(start + PIECE, state.elements)
        blocks = scales[start // state.blocksize : -(-end // state.blocksize)]
        values = pairs[packed[start // 2 : (end + 1) // 2]].reshape(-1)[: end - start]
        weight[start:end] = values * np.repeat(blocks, state.blocksize)[: end - start]
    return weight.reshape(state.shape)


def _scales(state: QuantState, name: str, stored: Mapping[str, Array]) -> Array:
    """One scale per block, float32."""
    absmax = np.asarray(stored[f"{name}.absmax"])
    if state.nested_blocksize is None or state.nested_offset is None:
        return absmax
    groups = np.repeat(stored[f"{name}.nested_absmax"], state.nested_blocksize)[: state.blocks]
    return np.asarray(stored[f"{name}.nested_quant_map"][absmax] * groups + np.float32(state.nested_offset))
