"""The maths of one change: from a base tensor to the changed one, in whichever precision is asked for.

With float32 this is the merge; with float64 it is the oracle that a stored merge is held against.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from lora.adapter import Blend, Change, Increment, LowRank, Replacement, Rows, Scale
from lora.files.tensorfile import Array
from lora.merging.rules import blended

Float = type[np.float32] | type[np.float64]


def changed(change: Change, tensor: Array | None, dtype: Float = np.float32) -> Array:
    """``tensor`` after ``change``, computed in ``dtype`` and not rounded to the tensor's own.

    Only a replacement needs no tensor.
    """
    if isinstance(change, Replacement):
        return change.value.astype(dtype)
    assert tensor is not None
    match change:
        case LowRank():
            updated: Any = tensor.astype(dtype)  # a copy
            updated += delta(change, tensor.shape, dtype)
            return (
                np.asarray(updated)
                if change.magnitude is None
                else _with_magnitude(updated, change.magnitude.astype(dtype), change.layout)
            )
        case Blend():
            return np.asarray(
                tensor.astype(dtype)
                + blended(change, [delta(update, tensor.shape, dtype) for update in change.updates])
            )
        case Increment():
            scaling: Any = dtype(change.scaling)
            return np.asarray(tensor.astype(dtype) + scaling * change.value.astype(dtype))
        case Scale():
            values: Any = change.values.astype(dtype)
            shaped = values.reshape([-1 if index == change.axis else 1 for index in range(tensor.ndim)])
            return np.asarray(tensor.astype(dtype) * shaped)
        case Rows():
            replaced = np.array(tensor, dtype)
            replaced[list(change.rows)] = change.values.astype(dtype)
            return replaced


def delta(update: LowRank, shape: tuple[int, ...], dtype: Float = np.float32) -> Array:
    """``scaling · B · A`` in the layout of a weight of ``shape``. ``lora.merging.fit`` has checked the shapes."""
    a: Any = update.a.astype(dtype)
    b: Any = update.b.astype(dtype)
    scaling: Any = dtype(update.scaling)
    match update.layout:
        case "linear" | "view" | "flat":
            product = b @ a
        case "sliced":
            raise AssertionError("an update is fitted before it is computed")
        case "transposed":
            product = a.T @ b.T  # (B · A)ᵀ, contiguous as the weight is
        case "conv":
            # Each output channel mixes the rank's kernels: B has extent 1, so composing is one product over the rank.
            product = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
        case "experts":
            product = _experts(a, b, shape[0])
        case "experts_transposed":
            product = np.swapaxes(_experts(a, b, shape[0]), 1, 2)
    product *= scaling
    return np.asarray(product.reshape(shape))


def error_bound(change: Change, tensor: Array) -> Array:
    """How far float32 may be from the exact result, elementwise: n roundings cost at most n epsilons of what is added
    up.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1. A replaced value is exact.
    """
    epsilon = float(np.finfo(np.float32).eps)
    match change:
        case LowRank():
            positive = replace(change, a=np.abs(change.a), b=np.abs(change.b), scaling=abs(change.scaling))
            product = delta(positive, tensor.shape, np.float64)
            result = np.abs(changed(change, tensor, np.float64))
            bound = (change.rank + 2) * product + result
            if change.magnitude is not None:
                added = np.abs(changed(replace(change, magnitude=None), tensor, np.float64))
                bound = (
                    bound * result / np.maximum(added, np.finfo(np.float64).tiny)
                    + tensor.size / tensor.shape[0] * result
                )
            return np.asarray(epsilon * bound)
        case Increment():
            return np.asarray(epsilon * (np.abs(tensor) + 2 * abs(change.scaling) * np.abs(change.value)))
        case Blend():
            bounds = [
                abs(weight) * error_bound(update, tensor)
                for weight, update in zip(change.weights, change.updates, strict=True)
            ]
            return np.asarray(np.sum(bounds, axis=0))
        case Scale():
            return np.asarray(epsilon * np.abs(changed(change, tensor, np.float64)))
    return np.zeros(tensor.shape)


def _experts(a: Array, b: Array, experts: int) -> Any:
    """Per expert e: ``B[:, :, e] · A[e]``, laid out (experts, out, in).

    A stacks the experts along its first axis; B interleaves them along its second, with the expert running fastest.
    """
    rank_each = a.shape[0] // experts
    stacked_a = a.reshape(experts, rank_each, a.shape[1])
    stacked_b = np.moveaxis(b.reshape(b.shape[0], rank_each, experts), 2, 0)
    return np.matmul(stacked_b, stacked_a)


def _with_magnitude(updated: Array, magnitude: Array, layout: str) -> Array:
    """DoRA (Liu et al. 2024, eq. 5): each output's weights are rescaled to the learned norm.

    The output axis is the first, or the last where the weight is stored transposed.
    """
    axis = updated.ndim - 1 if layout == "transposed" else 0
    others = tuple(index for index in range(updated.ndim) if index != axis)
    norm = np.sqrt(np.square(updated).sum(axis=others, keepdims=True))
    return np.asarray(updated * (magnitude.reshape(norm.shape) / norm))
