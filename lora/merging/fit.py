"""Which of a base's tensors each change is for. A change that has no place is an error: it would be lost in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lora.adapter import Adapter, Blend, Change, Increment, LowRank, Replacement, Rows
from lora.errors import AdapterError
from lora.files.tensorfile import Array, shape_of


@dataclass(frozen=True)
class Placed:
    """A change and the name of the base's tensor that it changes (or, for a new head, adds)."""

    parameter: str
    change: Change


def fit(adapter: Adapter, base: Mapping[str, Array]) -> tuple[Placed, ...]:
    """Find each change's tensor in ``base``, by parameter name, and check its shape.

    Raises AdapterError naming the module that the base lacks, or the shape that differs.
    """
    rename = _renaming(adapter, base)
    return tuple(_place(adapter, change, base, rename) for change in adapter.changes)


def changes_by_parameter(base: Mapping[str, Array], adapter: Adapter) -> dict[str, list[Change]]:
    """{parameter: its changes, in the adapter's order}; parameters are sorted, so that the same inputs give the same
    bytes.
    """
    targets: dict[str, list[Change]] = {}
    for place in fit(adapter, base):
        targets.setdefault(place.parameter, []).append(place.change)
    return dict(sorted(targets.items()))


def _place(adapter: Adapter, change: Change, base: Mapping[str, Array], rename: _Renaming) -> Placed:
    assert not isinstance(change, Blend)  # made of changes that have been placed
    if isinstance(change, Replacement):
        candidates = [rename(name) for name in change.among or (change.parameter,)]
        name = next((name for name in candidates if name in base), candidates[0])
        if change.among and name not in base:
            raise AdapterError(
                f"{adapter.path}: the base has no '{' or '.join(change.among)}'; the adapter was trained on another"
                " model"
            )
        if name in base and shape_of(base, name) != change.value.shape:
            raise _misfit(adapter, change.parameter, shape_of(base, name), (change.value.shape,))
        return Placed(name, change)
    module = rename(change.module)
    names = [f"{module}.{parameter}" if module else parameter for parameter in change.parameters]
    present = [name for name in names if name in base]
    if not present:
        kind = "bias" if isinstance(change, Increment) else "weight"
        raise AdapterError(
            f"{adapter.path}: module '{change.module}' has no {kind} in the base ('{names[0]}'); the adapter was"
            " trained on another model"
        )
    if isinstance(change, LowRank):
        name = (
            present[0]
            if change.layout != "experts"
            else _expert_parameter(adapter, change, {name: shape_of(base, name) for name in present})
        )
        return Placed(name, _with_layout(adapter, change, shape_of(base, name)))
    shape = shape_of(base, present[0])
    expected = change.value.shape if isinstance(change, Increment) else (shape[0], *change.values.shape[1:])
    if shape != expected or (isinstance(change, Rows) and not all(0 <= row < shape[0] for row in change.rows)):
        raise _misfit(adapter, change.module, shape, (expected,))
    return Placed(present[0], change)


def _with_layout(adapter: Adapter, update: LowRank, shape: tuple[int, ...]) -> LowRank:
    """The update in the layout that the base's weight has; where the factors leave two open, the shape decides or
    nothing does.
    """
    out_features, in_features = update.b.shape[0], update.a.shape[1] if update.a.ndim > 1 else 0
    match update.layout:
        case "linear" | "transposed":
            # A transformers Conv1D stores (in, out). The flag in the file is right about square weights only by chance
            # of
            # which layer was wrapped last, so a shape that leaves one reading decides.
            readings = {"linear": (out_features, in_features), "transposed": (in_features, out_features)}
            if shape == readings[update.layout]:
                return update
            for layout, expected in readings.items():
                if shape == expected:
                    return replace(update, layout=layout)  # type: ignore[arg-type]  # the keys are layouts
            raise _misfit(adapter, update.module, shape, (readings[update.layout],))
        case "conv":
            if len(shape) == 2 and set(update.a.shape[2:]) == {
                1
            }:  # a 1 × 1 convolution on what the base has as a matrix
                squeezed = replace(
                    update,
                    a=update.a.reshape(update.a.shape[:2]),
                    b=update.b.reshape(update.b.shape[:2]),
                    layout="linear",
                )
                return _with_layout(adapter, squeezed, shape)
            expected = (out_features, *update.a.shape[1:])
            if shape != expected:
                raise _misfit(adapter, update.module, shape, (expected,), "; grouped convolutions can't be merged")
        case "view":
            return (
                _loralib_matrix(adapter, update, shape) if len(shape) == 2 else _loralib_kernel(adapter, update, shape)
            )
        case "experts":
            return replace(update, layout="linear") if len(shape) == 2 else update
    return update


def _loralib_matrix(adapter: Adapter, update: LowRank, shape: tuple[int, ...]) -> LowRank:
    """A linear layer (out, in), or one stored (in, out) as embeddings are; a square one is what the user said."""
    out_features, in_features = update.b.shape[0], update.a.shape[1]
    if shape == (out_features, in_features) and out_features != in_features:
        return replace(update, layout="linear")
    if shape == (in_features, out_features) and out_features != in_features:
        return replace(update, layout="transposed")
    if shape != (out_features, in_features):
        hint = "; or the layer is a MergedLinear: give enable_lora"
        raise _misfit(adapter, update.module, shape, ((out_features, in_features), (in_features, out_features)), hint)
    if update.square is None:
        raise AdapterError(
            f"{adapter.path}: the weight of '{update.module}' is square, and the file does not say whether it is stored"
            " (out, in) or (in, out); give fan_in_fan_out"
        )
    return replace(update, layout=update.square)


def _loralib_kernel(adapter: Adapter, update: LowRank, shape: tuple[int, ...]) -> LowRank:
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
            f"{adapter.path}: module '{update.module}' has factors A {update.a.shape} and B {update.b.shape}, whose"
            f" product is no kernel of shape {shape}; the adapter was trained on another model"
        )
    return replace(update, rank=update.rank // extent, scaling=update.scaling * extent)


def _expert_parameter(adapter: Adapter, update: LowRank, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which parameter the update is for, by shape: PEFT's keys number a module's parameters and do not name them."""
    fitting = [name for name, shape in shapes.items() if _fits_experts(update, shape)]
    if not fitting:
        name, shape = next(iter(shapes.items()))
        raise _misfit(adapter, name, shape, ((update.a.shape[0] // update.rank, update.b.shape[0], update.a.shape[1]),))
    if len(fitting) > 1 or (len(shapes[fitting[0]]) == 3 and update.a.shape[1] == update.b.shape[0]):
        raise AdapterError(
            f"{adapter.path}: the update of '{update.module}' fits {' and '.join(fitting)} of shape"
            f" {shapes[fitting[0]]} in more than one way, and the file does not say which; merging could be wrong"
        )
    return fitting[0]


def _fits_experts(update: LowRank, shape: tuple[int, ...]) -> bool:
    out_features, in_features = update.b.shape[0], update.a.shape[1]
    if len(shape) == 2:
        return shape == (out_features, in_features) and update.a.shape[0] == update.rank
    return (
        len(shape) == 3
        and update.a.shape[0] == update.rank * shape[0]
        and sorted(shape[1:]) == sorted((out_features, in_features))
    )


class _Renaming:
    """From the adapter's module names to the base's: a prefix taken away or added, or a table for flattened names."""

    def __init__(self, strip: str = "", add: str = "", table: Mapping[str, str] | None = None) -> None:
        self._strip, self._add, self._table = strip, add, table

    def __call__(self, name: str) -> str:
        if self._table is not None:
            return self._table.get(name, name)
        return name.removeprefix(self._strip) if self._strip else self._add + name


def _renaming(adapter: Adapter, base: Mapping[str, Array]) -> _Renaming:
    if adapter.spelling == "flattened":
        return _Renaming(table=_unflattened(adapter, base))
    named = [change for change in adapter.changes if not isinstance(change, Replacement | Blend)]
    candidates = [_Renaming(), *_prefix_candidates((change.module for change in named), base)]
    for candidate in candidates:
        if all(
            any(f"{candidate(change.module)}.{parameter}" in base for parameter in change.parameters)
            for change in named
        ):
            return candidate
    return candidates[0]


def _prefix_candidates(modules: Iterable[str], base: Mapping[str, Array]) -> list[_Renaming]:
    """A headless base lacks the prefix that the model with a head puts before its names ("bert."), and the other way
    round.
    """
    heads = {module.partition(".")[0] + "." for module in modules}
    stripped = [_Renaming(strip=head) for head in heads if len(heads) == 1]
    return stripped + [_Renaming(add=prefix) for prefix in sorted({name.partition(".")[0] + "." for name in base})]


def _unflattened(adapter: Adapter, base: Mapping[str, Array]) -> dict[str, str]:
    """{name with dots as underscores: module} for the base's modules; an ambiguous name that the adapter uses is an
    error.
    """
    table: dict[str, str] = {}
    ambiguous = set()
    for module in {name.rpartition(".")[0] for name in base}:
        flat = module.replace(".", "_")
        if table.setdefault(flat, module) != module:
            ambiguous.add(flat)
    for change in adapter.changes:
        if not isinstance(change, Replacement | Blend) and change.module in ambiguous:
            raise AdapterError(
                f"{adapter.path}: '{change.module}' stands for several modules of the base; save the adapter with"
                " dotted names"
            )
    return table


def _misfit(
    adapter: Adapter, name: str, shape: tuple[int, ...], expected: tuple[tuple[int, ...], ...], hint: str = ""
) -> AdapterError:
    wanted = " or ".join(map(str, expected))
    return AdapterError(
        f"{adapter.path}: '{name}' fits a base tensor of shape {wanted}, but the base has {shape}; the adapter was"
        f" trained on another model{hint}"
    )
