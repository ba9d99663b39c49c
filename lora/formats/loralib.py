"""Reading a loralib state dict: ``<module>.lora_A`` and ``<module>.lora_B``, and biases that replace the base's.

The file says neither alpha nor which layer a module is. Its layers, from https://github.com/microsoft/LoRA:
    Linear        A (r, in), B (out, r)
    Embedding     A (r, vocabulary), B (width, r); the weight is (vocabulary, width)
    Conv          A (r · k, in · k), B (out / groups · k, r · k), for a kernel k × k
    MergedLinear  A (r · parts, in), B (out / n · parts, r): n projections in one weight, of which some have an update
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np

from lora.adapter import Adapter, Change, LowRank, Replacement
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.files.tensorfile import Array
from lora.formats.factors import Factors, identity, open_factors

A, B = "lora_A", "lora_B"
# A convolution is wrapped: its own weight and bias stand below "conv" in loralib's model, and not in a plain one.
CONV = "conv."


def read_loralib(
    source: Path | MappedFile,
    alpha: float | None,
    enable_lora: tuple[bool, ...] | None = None,
    fan_in_fan_out: bool | None = None,
) -> Adapter:
    """Read a safetensors file or a torch state dict; the scaling of each module is ``alpha`` over its r.

    ``enable_lora`` says which parts of the fused layers have an update, as in training. ``fan_in_fan_out`` says whether
    linear weights are stored (in, out); only square ones need it.
    Raises AdapterError when the file can't be read, a tensor is left over, or what the file does not say was not given.
    """
    path = source.path if isinstance(source, MappedFile) else source
    if alpha is None or not math.isfinite(alpha):
        raise AdapterError(
            f"{path}: loralib saves no alpha; give the lora_alpha of the training"
            + ("" if alpha is None else f" (not {alpha})")
        )
    if enable_lora is not None and not any(enable_lora):
        raise AdapterError(f"{path}: enable_lora is {enable_lora}; expected at least one part with an update")
    factors, _ = open_factors(source)
    return Adapter(
        path=path,
        format="loralib",
        files=(path,),
        sha256=identity((source,)),
        changes=_Reader(factors, alpha, enable_lora, fan_in_fan_out).changes(),
    )


class _Reader:
    def __init__(
        self, factors: Factors, alpha: float, enable_lora: tuple[bool, ...] | None, fan_in_fan_out: bool | None
    ) -> None:
        self._factors, self._alpha, self._enable_lora, self._fan_in_fan_out = (
            factors,
            alpha,
            enable_lora,
            fan_in_fan_out,
        )

    def changes(self) -> tuple[Change, ...]:
        names = self._factors.names()
        modules = [
            name.removesuffix(A) for name in names if name.rpartition(".")[2] == A
        ]  # with their dot; the root's is empty
        updates = [self._update(module) for module in modules]
        replaced = [self._bias(name) for name in names if "lora_" not in name and "bias" in name]
        self._factors.done()
        if self._enable_lora is not None and all(update.layout == "view" for update in updates):
            raise AdapterError(
                f"{self._factors.path}: enable_lora was given, but no layer of the file is a MergedLinear; leave it out"
            )
        return (*replaced, *updates)

    def _update(self, module: str) -> LowRank:
        a, b = self._factors.take(module + A), self._factors.take(module + B)
        if a.ndim != 2 or b.ndim != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
            raise self._error(module, f"has factors A {a.shape} and B {b.shape}; the file is damaged or not loralib's")
        rank, parts = b.shape[1], a.shape[0] // b.shape[1]
        square = None if self._fan_in_fan_out is None else self._stored
        name, scaling = module.removesuffix("."), self._alpha / rank
        if parts == 1 and (self._enable_lora is None or sum(self._enable_lora) > 1):
            return LowRank(name, a, b, rank, scaling, "view", parameters=("weight", f"{CONV}weight"), square=square)
        fused = self._fused(module, b, parts)
        if square is None and fused.shape[0] == a.shape[1]:
            raise self._error(
                module,
                "has a square weight, and the file does not say whether it is stored (out, in) or (in, out); give"
                " fan_in_fan_out",
            )
        return LowRank(name, a, fused, rank, scaling, self._stored)

    def _fused(self, module: str, b: Array, parts: int) -> Array:
        """B (out, r · parts) of a MergedLinear: one block per part that has an update, zeros in the rows of those that
        have none.
        """
        if self._enable_lora is None:
            raise self._error(
                module,
                f"is a MergedLinear with updates for {parts} of its parts; give enable_lora, which says for which",
            )
        if sum(self._enable_lora) != parts or b.shape[0] % parts:
            raise self._error(
                module,
                f"has updates for {parts} parts in B {b.shape}, but enable_lora {self._enable_lora} has"
                f" {sum(self._enable_lora)}",
            )
        rows, rank = b.shape[0] // parts, b.shape[1]
        fused = np.zeros((rows * len(self._enable_lora), rank * parts), b.dtype)
        enabled = [index for index, has_update in enumerate(self._enable_lora) if has_update]
        for block, index in enumerate(enabled):
            fused[index * rows : (index + 1) * rows, block * rank : (block + 1) * rank] = b[
                block * rows : (block + 1) * rows
            ]
        return fused

    def _bias(self, name: str) -> Replacement:
        """A bias of ``lora_state_dict(bias="all" | "lora_only")``; a wrapped convolution's may stand without the
        wrapper.
        """
        module, _, parameter = name.rpartition(CONV)
        wrapped = f"{module}{A}" in self._factors and parameter == "bias"
        return Replacement(name, self._factors.take(name), among=(name, f"{module}{parameter}") if wrapped else (name,))

    @property
    def _stored(self) -> Literal["linear", "transposed"]:
        return "transposed" if self._fan_in_fan_out else "linear"

    def _error(self, module: str, problem: str) -> AdapterError:
        return AdapterError(f"{self._factors.path}: module '{module.removesuffix('.')}' {problem}")
