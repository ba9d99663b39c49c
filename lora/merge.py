"""Merging: what an adapter does to the base's weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from lora.adapter import Adapter, LowRank
from lora.errors import AdapterError
from lora.tensorfile import Array


def apply(update: LowRank, weight: Array, dtype: type[np.floating] = np.float32) -> Array:
    """``W + scaling · B · A`` in ``dtype`` (Hu et al. 2021, eq. 3), in the layout of ``weight``; not rounded to its dtype.

    With float64 this is the oracle that a stored merge is held against.
    """
    delta = (update.b.astype(dtype) @ update.a.astype(dtype)) * dtype(update.scaling)
    merged: Array = weight.astype(dtype) + (delta.T if update.transposed else delta)
    return merged


def merge(base: Mapping[str, Array], adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """The tensors that differ from the base, each computed in float32 and rounded once to its base dtype.

    ``base`` maps parameter names to weights. Replaced tensors come as they are, even where the base has none of that
    name (a new head). A tensor that rounding left bit for bit as it was is not yielded.
    Raises AdapterError when the adapter does not fit, overflows, or changes no weight at all.
    """
    changed = 0
    for update in adapter.updates:
        weight = _fitting_weight(base, update, adapter)
        merged = apply(update, weight).astype(weight.dtype)
        if not np.isfinite(merged.astype(np.float32)).all():
            raise AdapterError(f"{adapter.path}: merging into '{update.parameter}' overflows {weight.dtype}; store the base in a wider dtype")
        if not np.array_equal(merged, weight):
            changed += 1
            yield update.parameter, merged
    for replacement in adapter.replacements:
        yield replacement.parameter, _fitting_replacement(base, replacement.parameter, replacement.value, adapter)
    if adapter.updates and not changed:
        raise AdapterError(
            f"{adapter.path}: merging changes none of its {len(adapter.updates)} target weights (lora_B is zero, or the update is lost "
            "in rounding); the result would be the base model"
        )


def check_base(adapter: Adapter, base_sha256: str) -> None:
    """Refuse an adapter that records the fingerprint of another base."""
    if adapter.base_sha256 is not None and adapter.base_sha256 != base_sha256:
        raise AdapterError(
            f"{adapter.path}: trained on the base with SHA-256 {adapter.base_sha256[:12]}…, but this base has {base_sha256[:12]}…; "
            "give the base it was trained on"
        )


def _fitting_weight(base: Mapping[str, Array], update: LowRank, adapter: Adapter) -> Array:
    if update.parameter not in base:
        raise AdapterError(f"{adapter.path}: module '{update.module}' is not in the base; the adapter was trained on another model")
    weight = base[update.parameter]
    if weight.shape != update.weight_shape:
        raise AdapterError(
            f"{adapter.path}: module '{update.module}' needs a base weight of shape {update.weight_shape}, but the base has {weight.shape}; "
            "the adapter was trained on another model"
        )
    return weight


def _fitting_replacement(base: Mapping[str, Array], name: str, value: Array, adapter: Adapter) -> Array:
    if name in base and base[name].shape != value.shape:
        raise AdapterError(f"{adapter.path}: saved tensor '{name}' has shape {value.shape}, but the graph expects {base[name].shape}")
    return np.asarray(value)
