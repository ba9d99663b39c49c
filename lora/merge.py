"""Merging: what an adapter does to a base, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora.adapter import Adapter, Blend, Change, LowRank
from lora.delta import Float, changed
from lora.errors import AdapterError
from lora.tensorfile import Array

Targets = Mapping[str, Sequence[Change]]  # {parameter: its changes}, from lora.fit or lora.combine
Dtypes = Mapping[str, np.dtype[Any]]


@dataclass(frozen=True)
class Merged:
    """A changed tensor: as it is stored, before that rounding (float32), and as the base has it (None: a new head).

    ``unchanged`` of its elements are bit for bit the base's.
    """

    parameter: str
    stored: Array
    exact: Array
    base: Array | None
    unchanged: int


def merge(base: Mapping[str, Array], targets: Targets, source: object, dtypes: Dtypes | None = None) -> Iterator[Merged]:
    """The tensors that ``targets`` change, each computed in float32 and rounded once.

    ``base`` maps parameter names to weights; only those to be changed are read. A tensor is stored in the base's dtype
    unless ``dtypes`` names another; ``source`` is what messages call the adapter. One that rounding leaves bit for bit as it was is not yielded.
    Raises AdapterError when a tensor overflows its dtype, or no weight changes at all.
    """
    updated = differing = 0
    for parameter, changes in targets.items():
        merged = _merge_one(base, parameter, changes, dtypes or {})
        if not _is_finite(merged):
            raise AdapterError(f"{source}: merging into '{parameter}' overflows {merged.stored.dtype}; store it in a wider dtype")
        differs = merged.unchanged < merged.stored.size
        if any(isinstance(change, LowRank | Blend) for change in changes):
            updated += 1
            differing += differs
        if differs:
            yield merged
    if updated and not differing:
        raise AdapterError(
            f"{source}: merging changes none of the {updated} target weights (lora_B is zero, or the update is lost in rounding); "
            "the result would be the base model"
        )


def _is_finite(merged: Merged) -> bool:
    """The exact values decide for a dtype of float32's range, without a look at the narrow ones."""
    values = merged.stored if merged.stored.dtype == np.float16 else merged.exact
    return bool(np.isfinite(values).all())


def apply(changes: Sequence[Change], tensor: Array | None, dtype: Float = np.float32) -> Array:
    """``tensor`` after ``changes``, in ``dtype``; not rounded to its own. With float64 this is the oracle of a merge."""
    for change in changes:
        tensor = changed(change, tensor, dtype)
    assert tensor is not None
    return tensor


def check_base(adapter: Adapter, base_sha256: str) -> None:
    """Refuse an adapter that records the fingerprint of another base."""
    if adapter.base_sha256 is not None and adapter.base_sha256 != base_sha256:
        raise AdapterError(
            f"{adapter.path}: trained on the base with SHA-256 {adapter.base_sha256[:12]}…, but this base has {base_sha256[:12]}…; "
            "give the base it was trained on"
        )


def _merge_one(base: Mapping[str, Array], parameter: str, changes: Sequence[Change], dtypes: Dtypes) -> Merged:
    before = base.get(parameter)
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is found, and named, in the result
        exact = apply(changes, before)
        stored_as = dtypes.get(parameter) or (before.dtype if before is not None else exact.dtype)
        stored = exact.astype(stored_as, copy=False)
    return Merged(parameter, stored, exact, before, _equal_bits(stored, before))


def _equal_bits(stored: Array, base: Array | None) -> int:
    if base is None or base.dtype != stored.dtype:
        return 0
    bits = np.dtype(f"u{stored.dtype.itemsize}")
    return int(np.count_nonzero(stored.view(bits) == base.view(bits)))
