"""Blending several adapters' updates of one weight: TIES (Yadav et al. 2023) and DARE (Yu et al. 2024).

Both prune each update to a share ``density`` of its elements: TIES keeps the largest, DARE keeps a random choice and
divides by the density. TIES then elects a sign per element and averages the updates that agree with it. The updates
here are whole ``s·B·A``, not factors, so no rank is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora.adapter import Blend
from lora.files.tensorfile import Array


def blended(blend: Blend, updates: Sequence[Array]) -> Array:
    """The blend of ``updates``, all of one shape and dtype, by the blend's rule."""
    weights = [updates[0].dtype.type(weight) for weight in blend.weights]
    match blend.rule:
        case "linear":
            return _weighted_sum(updates, weights)
        case "ties":
            return _agreeing_mean([_largest(update, blend.density) for update in updates], weights)
        case "dare_linear":
            return _weighted_sum(_dropped(blend, updates), weights)
        case "dare_ties":
            return _agreeing_mean(_dropped(blend, updates), weights)


def _weighted_sum(updates: Sequence[Array], weights: Sequence[Any]) -> Array:
    total = np.zeros_like(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total += weight * update
    return total


def _largest(update: Array, density: float) -> Array:
    """The ``int(density · size)`` elements of largest magnitude; the rest is zero."""
    flat = update.reshape(-1)
    kept = np.argpartition(np.abs(flat), flat.size - max(int(density * flat.size), 1))[
        flat.size - int(density * flat.size) :
    ]
    pruned = np.zeros_like(flat)
    pruned[kept] = flat[kept]
    return pruned.reshape(update.shape)


def _dropped(blend: Blend, updates: Sequence[Array]) -> list[Array]:
    """Each update with a random choice of its elements kept with probability ``density`` and divided by it."""
    kept = [
        np.random.default_rng(seed).random(update.shape) < blend.density
        for seed, update in zip(blend.seeds, updates, strict=True)
    ]
    return [
        np.where(mask, update, 0).astype(update.dtype) / update.dtype.type(blend.density)
        for mask, update in zip(kept, updates, strict=True)
    ]


def _agreeing_mean(updates: Sequence[Array], weights: Sequence[Any]) -> Array:
    """Per element, the mean of the weighted updates that have the sign of the unweighted sum (zero is positive)."""
    stacked = np.stack(updates)
    elected = np.where(stacked.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stacked) == elected
    weighted = stacked * np.array(weights, stacked.dtype).reshape(-1, *[1] * updates[0].ndim)
    return np.asarray((weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1).astype(stacked.dtype))
