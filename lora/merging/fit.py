"""Which of a base's tensors each change is for. A change that has no place is an error: it would be lost in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lora.adapter import Adapter, Blend, Change, Increment, LowRank, Replacement, Rows, Scale
from lora.bases.structure import BaseStructure, Parameter, of_names
from lora.errors import AdapterError
from lora.files.tensorfile import Array, shape_of
from lora.merging.layouts import STORED, expert_parameter, in_layout, misfit, square
from lora.merging.naming import Renaming, parameter_names, renaming
from lora.merging.pieces import on_stored


@dataclass(frozen=True)
class Placed:
    """A change and the name of the base's tensor that it changes (or, for a new head, adds)."""

    parameter: str
    change: Change


@dataclass(frozen=True)
class _Fitting:
    """What placing a change needs: the adapter, for messages, and the base."""

    adapter: Adapter
    base: Mapping[str, Array]
    structure: BaseStructure
    rename: Renaming


def fit(
    adapter: Adapter, base: Mapping[str, Array], structure: BaseStructure | None = None
) -> tuple[tuple[Placed, ...], ...]:
    """For each change the tensors of ``base`` that it changes, by their names there; shapes are checked.

    Without a ``structure``, names are the base's own and the adapter's word is taken for how a square weight is stored.
    Raises AdapterError naming the module that the base lacks, the shape that differs, or what is ambiguous.
    """
    known = structure if structure is not None else of_names(base, "flagged")
    rename = renaming(adapter, known, lambda candidate: _fits(_Fitting(adapter, base, known, candidate)))
    return tuple(_placed(_Fitting(adapter, base, known, rename)))


def changes_by_parameter(
    base: Mapping[str, Array], adapter: Adapter, structure: BaseStructure | None = None
) -> dict[str, list[Change]]:
    """{tensor: its changes, in the adapter's order}; sorted, so that the same inputs give the same bytes."""
    targets: dict[str, list[Change]] = {}
    for places in fit(adapter, base, structure):
        for place in places:
            targets.setdefault(place.parameter, []).append(place.change)
    return dict(sorted(targets.items()))


def _fits(fitting: _Fitting) -> bool:
    try:
        return bool(list(_placed(fitting)))
    except AdapterError:
        return False


def _placed(fitting: _Fitting) -> Iterator[tuple[Placed, ...]]:
    """The changes in order; a tensor that was replaced has its new shape for those that follow."""
    resized: dict[str, tuple[int, ...]] = {}
    for change in fitting.adapter.changes:
        name, parameter = _parameter(fitting, change)
        if name in resized:
            parameter = replace(parameter, shape=resized[name])
        fitted = _fitted(fitting, name, change, parameter)
        if isinstance(fitted, Replacement):
            resized[name] = fitted.value.shape
        elif name not in resized:
            _check_has_values(fitting, name, parameter)
        stored = on_stored(fitting.adapter.path, name, fitted, parameter, _rows(fitting, parameter))
        yield (*(Placed(target, part) for target, part in stored), *_scaled_bias(fitting, name, fitted))


def _check_has_values(fitting: _Fitting, name: str, parameter: Parameter) -> None:
    """An update needs something to be added to: the base's tensor, a tied one's, or one that the adapter brings."""
    if not parameter.stored and not parameter.converted and name not in fitting.structure.shared():
        raise AdapterError(
            f"{fitting.adapter.path}: '{name}' of the {fitting.structure.model} has no values in the base, and the"
            " adapter brings none; give the base that it was trained on"
        )


def _parameter(fitting: _Fitting, change: Change) -> tuple[str, Parameter]:
    """The parameter that a change is for, and its name."""
    match change:
        case Replacement():
            return _replaced(fitting, change)
        case Blend():
            raise AssertionError("a blend is made of changes that have been placed")
    present = {
        name: found
        for name in parameter_names(change, fitting.rename)
        if (found := fitting.structure.find(name)) is not None
    }
    if not present:
        raise _absent(fitting, change)
    if isinstance(change, LowRank) and change.layout == "experts":
        name = expert_parameter(fitting.adapter.path, change, present)
        return name, present[name]
    name, parameter = next(iter(present.items()))
    if isinstance(change, Rows) and not parameter.stored:  # trained tokens stay tied, as they were trained
        home = fitting.structure.shared().get(name, name)
        return home, fitting.structure.find(home) or parameter
    return name, parameter


def _replaced(fitting: _Fitting, change: Replacement) -> tuple[str, Parameter]:
    """A tensor that the base has; or a head that is new to it."""
    spelled = (*change.among, change.parameter) if change.among else (change.parameter,)
    names = [name for one in spelled for name in (fitting.rename(one), one)]
    for name in names:
        found = fitting.structure.find(name)
        if found is not None:
            return name, found
    if change.among:
        raise AdapterError(
            f"{fitting.adapter.path}: the base has no '{' or '.join(change.among)}'; the adapter was trained on another"
            " model"
        )
    if not _is_new_head(fitting.structure, change.parameter):
        model = fitting.structure.model or "base"
        raise AdapterError(
            f"{fitting.adapter.path}: the {model} has no '{change.parameter}', and it is not a new head's; merging"
            " would drop it: give the base that the adapter was trained on"
        )
    return change.parameter, Parameter("other", change.value.shape)


def _is_new_head(structure: BaseStructure, name: str) -> bool:
    """A head stands at the top, under a name that nothing of the base has."""
    top = {one.removeprefix(structure.prefix).partition(".")[0] for one in structure.parameters}
    top |= {one.partition(".")[0] for one in (*structure.parameters, *structure.aliases)}
    return name.partition(".")[0] not in top


def _fitted(fitting: _Fitting, name: str, change: Change, parameter: Parameter) -> Change:
    """The change in the parameter's own layout; its shape is checked."""
    match change:
        case LowRank():
            return in_layout(fitting.adapter.path, change, parameter)
        case Replacement():
            return _checked_replacement(fitting, name, change, parameter)
        case Increment():
            return _checked(fitting, change, parameter, change.value.shape)
        case Rows():
            _check_rows(fitting, change, parameter)
            return change
        case Scale():
            return _scaled(fitting, change, parameter)
        case Blend():
            raise AssertionError("a blend is made of changes that have been placed")


def _checked(fitting: _Fitting, change: Increment, parameter: Parameter, shape: tuple[int, ...]) -> Increment:
    if parameter.shape != shape:
        raise misfit(fitting.adapter.path, change.module, parameter.shape, (shape,))
    return change


def _scaled(fitting: _Fitting, change: Scale, parameter: Parameter) -> Scale:
    """With the axis of the weight that the factors are for; a bias has one only."""
    outputs = 1 if STORED.get(parameter.kind) == "transposed" else 0
    axis = 0 if len(parameter.shape) == 1 else outputs if change.side == "out" else 1 - outputs
    if len(parameter.shape) == 2 and parameter.kind in ("unknown", "flagged"):
        fitting_axes = [index for index, size in enumerate(parameter.shape) if size == change.values.size]
        if len(fitting_axes) == 2 and parameter.kind == "unknown":
            raise square(fitting.adapter.path, change.module, parameter.shape)
        axis = fitting_axes[0] if len(fitting_axes) == 1 else axis
    if parameter.shape[axis] != change.values.size:
        expected = tuple(change.values.size if index == axis else size for index, size in enumerate(parameter.shape))
        raise misfit(fitting.adapter.path, change.module, parameter.shape, (expected,))
    return replace(change, axis=axis)


def _scaled_bias(fitting: _Fitting, name: str, change: Change) -> Iterator[Placed]:
    """The layer's bias is scaled with its outputs."""
    bias = name.removesuffix("weight") + "bias"
    parameter = fitting.structure.find(bias) if isinstance(change, Scale) and change.side == "out" else None
    if isinstance(change, Scale) and parameter is not None:
        fitted = _scaled(fitting, replace(change, parameters=("bias",)), parameter)
        stored = on_stored(fitting.adapter.path, bias, fitted, parameter, _rows(fitting, parameter))
        yield from (Placed(target, part) for target, part in stored)


def _check_rows(fitting: _Fitting, change: Rows, parameter: Parameter) -> None:
    expected = (parameter.shape[0], *change.values.shape[1:])
    if parameter.shape != expected or not all(0 <= row < parameter.shape[0] for row in change.rows):
        raise misfit(fitting.adapter.path, change.module, parameter.shape, (expected,))


def _checked_replacement(fitting: _Fitting, name: str, change: Replacement, parameter: Parameter) -> Replacement:
    """A vocabulary or a head may come in another size: its other axes must be the base's."""
    shape = change.value.shape
    if parameter.stored and parameter.shape != shape:
        resizable = _is_head(fitting.structure, name) or parameter.kind == "embedding" or _is_tied(fitting, name)
        if not resizable or parameter.shape[1:] != shape[1:] or len(shape) != len(parameter.shape):
            raise misfit(fitting.adapter.path, change.parameter, parameter.shape, (shape,))
    return change


def _is_head(structure: BaseStructure, name: str) -> bool:
    """A head of a known model: beside the body, at the top."""
    return (
        bool(structure.model)
        and bool(structure.prefix)
        and not name.startswith(structure.prefix)
        and any(other.startswith(structure.prefix) for other in structure.parameters)
    )


def _is_tied(fitting: _Fitting, name: str) -> bool:
    return any(name in group for group in fitting.structure.tied)


def _rows(fitting: _Fitting, parameter: Parameter) -> int:
    """How many rows the stored tensor has, of which the parameter is a part."""
    parts = [piece for piece in parameter.stored if piece.of]
    return shape_of(fitting.base, parts[0].name)[0] if parts else 0


def _absent(fitting: _Fitting, change: LowRank | Increment | Rows | Scale) -> AdapterError:
    name = parameter_names(change, fitting.rename)[0]
    kind = "bias" if isinstance(change, Increment) else "weight"
    model = f" ({fitting.structure.model})" if fitting.structure.model else ""
    return AdapterError(
        f"{fitting.adapter.path}: module '{change.module}' has no {kind} in the base{model} ('{name}'); the adapter was"
        " trained on another model"
    )
