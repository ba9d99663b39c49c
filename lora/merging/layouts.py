"""The layout of a low-rank update in the weight that it is for: the kind of the weight's module decides.

Where nobody knows the kind, a shape that leaves one reading decides, and else nothing does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora.adapter import Layout, LowRank
from lora.bases.structure import Kind, Parameter
from lora.errors import AdapterError

# How a module of a known kind stores a matrix.
STORED: Mapping[Kind, Layout] = {
    "linear": "linear",
    "attention": "linear",
    "other": "linear",
    "conv1d": "transposed",
    "embedding": "transposed",
}
INSTALL = "install transformers, which knows it: pip install 'lorafuse[export]'"


def in_layout(path: Path, update: LowRank, parameter: Parameter) -> LowRank:
    """``update`` in the layout of ``parameter``. Raises AdapterError, naming the adapter's ``path``, on a misfit."""
    match update.layout:
        case "linear" | "transposed":
            return _matrix(path, update, parameter)
        case "flat" if len(parameter.shape) == 2:
            return _matrix(path, replace(update, layout="linear"), parameter)
        case "flat":
            expected = (update.b.shape[0], update.a.shape[1])
            if (parameter.shape[0], int(np.prod(parameter.shape[1:]))) != expected:
                raise misfit(path, update.module, parameter.shape, (expected,))
            return update
        case "sliced":
            width = parameter.shape[0 if STORED.get(parameter.kind) == "transposed" else -1]
            if parameter.kind in ("flagged", "unknown") and update.b.shape[0] == parameter.shape[-1]:
                width = parameter.shape[0]
            return _matrix(path, replace(update, a=update.a[:, :width], layout="linear"), parameter)
        case "conv":
            return _convolution(path, update, parameter)
        case "view" if len(parameter.shape) == 2:
            return _loralib_matrix(path, update, parameter)
        case "view":
            return _loralib_kernel(path, update, parameter.shape)
        case "experts" | "experts_transposed" if len(parameter.shape) == 2:
            return replace(update, layout="linear")
        case "experts" | "experts_transposed":
            return replace(update, layout=_of_experts(update, parameter)[0])


def expert_parameter(path: Path, update: LowRank, among: Mapping[str, Parameter]) -> str:
    """Which parameter the update is for, by shape: PEFT's keys number a module's parameters and do not name them."""
    fitting = {name: _of_experts(update, parameter) for name, parameter in among.items()}
    fitting = {name: layouts for name, layouts in fitting.items() if layouts}
    if not fitting:
        name, parameter = next(iter(among.items()))
        expected = (update.a.shape[0] // update.rank, update.b.shape[0], update.a.shape[1])
        raise misfit(path, name, parameter.shape, (expected,))
    first = next(iter(fitting))
    if len(fitting) > 1 or len(fitting[first]) > 1:
        raise AdapterError(
            f"{path}: the update of '{update.module}' fits {' and '.join(fitting)} of shape"
            f" {among[first].shape} in more than one way, and the file does not say which; merging could be wrong"
        )
    return first


def misfit(
    path: Path, name: str, shape: tuple[int, ...], expected: Sequence[tuple[int, ...]], hint: str = ""
) -> AdapterError:
    """The error for a change of another shape than the base's tensor."""
    wanted = " or ".join(map(str, expected))
    return AdapterError(
        f"{path}: '{name}' fits a base tensor of shape {wanted}, but the base has {shape}; the adapter was"
        f" trained on another model{hint}"
    )


def square(path: Path, module: str, shape: tuple[int, ...]) -> AdapterError:
    """The error for a weight that may lie in two ways."""
    return AdapterError(
        f"{path}: the weight of '{module}' is square {shape}, and nothing here says whether this model stores it"
        f" (out, in) or (in, out); {INSTALL}"
    )


def _matrix(path: Path, update: LowRank, parameter: Parameter) -> LowRank:
    """A linear layer (out, in), or what a Conv1D or an embedding stores as (in, out).

    The flag in an adapter's file is right about square weights only by chance of which layer was wrapped last.
    """
    if len(parameter.shape) > 2 and set(parameter.shape[2:]) == {1}:  # a 1 × 1 convolution, trained as a matrix
        as_kernel = replace(
            update, a=_with_extent(update.a, parameter), b=_with_extent(update.b, parameter), layout="conv"
        )
        return _convolution(path, as_kernel, parameter)
    out_features, in_features = update.b.shape[0], update.a.shape[1]
    readings: dict[Layout, tuple[int, ...]] = {
        "linear": (out_features, in_features),
        "transposed": (in_features, out_features),
    }
    known = STORED.get(parameter.kind)
    possible = [layout for layout in readings if layout == known or known is None]
    fitting = [layout for layout in possible if readings[layout] == parameter.shape]
    if not fitting:
        raise misfit(path, update.module, parameter.shape, (readings[known or update.layout],))
    if len(fitting) == 1:
        return replace(update, layout=fitting[0])
    if parameter.kind == "unknown":
        raise square(path, update.module, parameter.shape)
    return update


def _with_extent(values: np.ndarray, parameter: Parameter) -> np.ndarray:
    return values.reshape(*values.shape, *[1] * (len(parameter.shape) - 2))


def _convolution(path: Path, update: LowRank, parameter: Parameter) -> LowRank:
    shape = parameter.shape
    if len(shape) == 2 and set(update.a.shape[2:]) == {1}:  # a 1 × 1 convolution on what the base has as a matrix
        a, b = (values.reshape(values.shape[:2]) for values in (update.a, update.b))
        return _matrix(path, replace(update, a=a, b=b, layout="linear"), parameter)
    expected = (update.b.shape[0], *update.a.shape[1:])
    if shape != expected:
        raise misfit(path, update.module, shape, (expected,), "; grouped convolutions can't be merged")
    return update


def _loralib_matrix(path: Path, update: LowRank, parameter: Parameter) -> LowRank:
    """A linear layer (out, in), or one stored (in, out) as embeddings are; a square one is what the user said."""
    out_features, in_features = update.b.shape[0], update.a.shape[1]
    shape, known = parameter.shape, STORED.get(parameter.kind)
    readings: dict[Layout, tuple[int, ...]] = {
        "linear": (out_features, in_features),
        "transposed": (in_features, out_features),
    }
    fitting: list[Layout] = [layout for layout, reading in readings.items() if reading == shape]
    if not fitting:
        hint = "; or the layer is a MergedLinear: give enable_lora"
        raise misfit(path, update.module, shape, tuple(readings.values()), hint)
    if len(fitting) == 1:
        return replace(update, layout=fitting[0])
    if update.square is None and known is None:
        raise AdapterError(
            f"{path}: the weight of '{update.module}' is square, and the file does not say whether it is stored"
            " (out, in) or (in, out); give fan_in_fan_out"
        )
    return replace(update, layout=update.square or known or "linear")


def _loralib_kernel(path: Path, update: LowRank, shape: tuple[int, ...]) -> LowRank:
    """A convolution (out, in / groups, k, ...): A is (r · k, in · k), B is (out / groups · k, r · k), and the scaling
    is that of r.

    B · A holds k² numbers per pair of channels: a kernel of one or three dimensions has room for them only where k = 1.
    """
    out_features, in_features, extent = update.b.shape[0], update.a.shape[1], shape[-1] if len(shape) > 2 else 0
    groups = in_features // (shape[1] * extent) if extent and shape[1] else 0
    expected = (shape[0] * extent // groups, shape[1] * groups * extent) if groups else ()
    even = set(shape[2:]) == {extent} and extent and update.rank % extent == 0
    if not even or (out_features, in_features) != expected or out_features * in_features != int(np.prod(shape)):
        raise AdapterError(
            f"{path}: module '{update.module}' has factors A {update.a.shape} and B {update.b.shape}, whose"
            f" product is no kernel of shape {shape}; the adapter was trained on another model"
        )
    return replace(update, rank=update.rank // extent, scaling=update.scaling * extent)


def _of_experts(update: LowRank, parameter: Parameter) -> list[Layout]:
    """The layouts in which the update fits the parameter; none where it is another one's."""
    out_features, in_features = update.b.shape[0], update.a.shape[1]
    shape = parameter.shape
    if len(shape) == 2:
        return ["experts"] if shape == (out_features, in_features) and update.a.shape[0] == update.rank else []
    if len(shape) != 3 or update.a.shape[0] != update.rank * shape[0]:
        return []
    readings: dict[Layout, tuple[int, ...]] = {
        "experts": (out_features, in_features),
        "experts_transposed": (in_features, out_features),
    }
    possible = [layout for layout in readings if parameter.kind not in readings or layout == parameter.kind]
    return [layout for layout in possible if readings[layout] == shape[1:]]
