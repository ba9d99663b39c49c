"""The formula of each change, by the class of the torch module that owns the parameter, in float64.

How a weight lies in memory is what its class in torch or transformers defines: a linear layer computes x · Wᵀ, a Conv1D
x · W, an embedding takes rows of W. Nothing here asks what the exporter believes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora.adapter import Blend, Change, Increment, LowRank, Replacement, Rows, Scale
from lora.errors import ExportError
from lora.files.tensorfile import Array
from lora.merging.rules import blended


def changed(module: nn.Module, name: str, value: Tensor, changes: Sequence[Change]) -> Tensor:
    """The parameter ``name`` of ``module`` after ``changes``, of which ``value`` is the base's, in float64.

    Raises ExportError for a change that does not have the parameter's shape.
    """
    value = value.double()
    for change in changes:
        value = _changed(module, name, value, change)
    return value


def as_tensor(values: Array) -> Tensor:
    """A torch tensor of the same dtype; numpy's bfloat16 comes from ml_dtypes, which torch does not know."""
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def _changed(module: nn.Module, name: str, value: Tensor, change: Change) -> Tensor:
    match change:
        case Replacement():
            return _double(change.value)
        case Rows():
            value = value.clone()
            value[list(change.rows)] = _double(change.values)
            return value
        case Increment():
            return value + change.scaling * _double(change.value)
        case Scale():
            return value * _along(_double(change.values), value.ndim, _scaled_axis(module, value, change))
        case Blend():
            deltas = [_update(module, name, value, update).numpy() for update in change.updates]
            return value + _double(np.asarray(blended(change, deltas)))
        case LowRank(magnitude=None):
            return value + _update(module, name, value, change)
    assert isinstance(change, LowRank)
    assert change.magnitude is not None
    return _with_norm(module, value + _update(module, name, value, change), _double(change.magnitude))


def _update(module: nn.Module, name: str, value: Tensor, update: LowRank) -> Tensor:
    """``scaling · B · A`` as this module's class lays out its weight."""
    a, b = _double(update.a), _double(update.b)
    if value.ndim == 3 and _has_experts(module):
        product = _of_experts(module, a, b, update.rank, value.shape[0])
    else:
        product = b.flatten(1) @ a.flatten(1)
        product = product.T if _is_transposed(module) else product
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and product.numel() == value.numel():
            product = product.reshape(value.shape)
    if product.shape != value.shape:
        raise ExportError(
            f"'{name}' of the class {type(module).__name__} has the shape {tuple(value.shape)}, but its update has"
            f" {tuple(product.shape)}; the reference has no formula for it, leave --base out"
        )
    return update.scaling * product


def _of_experts(module: nn.Module, a: Tensor, b: Tensor, rank: int, experts: int) -> Tensor:
    """One product for each expert: A has the experts one below the other, B has the expert's index run fastest."""
    products = [b[:, expert::experts] @ a[expert * rank : (expert + 1) * rank] for expert in range(experts)]
    stacked = torch.stack(products)
    return stacked.transpose(1, 2) if getattr(module, "is_transposed", False) else stacked


def _has_experts(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv1d | nn.Linear | nn.Embedding)


def _is_transposed(module: nn.Module) -> bool:
    """Whether the class stores inputs first: x · W, and rows of W for a one-hot x."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D | nn.Embedding)


def _outputs(module: nn.Module) -> int:
    return 1 if _is_transposed(module) else 0


def _scaled_axis(module: nn.Module, value: Tensor, change: Scale) -> int:
    if value.ndim == 1:
        return 0
    return _outputs(module) if change.side == "out" else 1 - _outputs(module)


def _with_norm(module: nn.Module, value: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: the weights of each output have the learned norm."""
    axis = _outputs(module)
    others = [index for index in range(value.ndim) if index != axis]
    norm: Any = value.square().sum(dim=others, keepdim=True).sqrt()
    scale: Tensor = magnitude.reshape(norm.shape) / norm
    return value * scale


def _along(values: Tensor, ndim: int, axis: int) -> Tensor:
    return values.reshape([-1 if index == axis else 1 for index in range(ndim)])


def _double(values: Array) -> Tensor:
    return as_tensor(values).double()
