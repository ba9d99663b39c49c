"""From a change of a parameter to changes of the stored tensors that it is made of.

transformers joins some tensors when it loads them (a Mixtral's experts, stored one by one, become one parameter) and
cuts others apart. An update is cut or padded in the same way: rows of B, and an expert's own factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora.adapter import Change, Increment, LowRank, Replacement, Rows, Scale
from lora.bases.structure import Parameter, Piece
from lora.errors import AdapterError
from lora.files.tensorfile import Array


def on_stored(path: Path, name: str, change: Change, parameter: Parameter, rows: int) -> Iterator[tuple[str, Change]]:
    """(stored tensor, its change) for each part of the parameter ``name``; ``rows`` is how many the stored one has.

    A parameter that is stored nowhere is written under its own name. Raises AdapterError for what has no such parts.
    """
    if parameter.converted:
        raise AdapterError(
            f"{path}: '{name}' is stored otherwise than the model has it (transformers converts it by"
            f" {parameter.converted}), which can't be undone here; save the base again with transformers"
        )
    if not parameter.stored:
        yield name, change
    for piece in parameter.stored:
        if piece.whole:
            yield piece.name, change
        elif piece.of:
            yield piece.name, _padded(path, name, change, piece.of[0], rows)
        else:
            yield piece.name, _cut(path, name, change, parameter, piece)


def _cut(path: Path, name: str, change: Change, parameter: Parameter, piece: Piece) -> Change:
    """The part of a change that is for one of the tensors that are joined."""
    match change:
        case LowRank(layout="experts" | "experts_transposed"):
            return _of_expert(change, piece, parameter.shape[0])
        case LowRank(layout="linear"):
            start, stop = piece.inside[0]
            magnitude = None if change.magnitude is None else change.magnitude.reshape(-1)[start:stop]
            return replace(change, b=change.b[start:stop], magnitude=magnitude)
        case Increment():
            start, stop = piece.inside[0]
            return replace(change, value=change.value[start:stop])
        case Scale(axis=0):
            start, stop = piece.inside[0]
            return replace(change, values=change.values[start:stop])
        case Replacement():
            value = change.value[tuple(slice(*bounds) for bounds in piece.inside)]
            if parameter.kind in ("experts", "experts_transposed"):
                value = value[0]
            return Replacement(piece.name, np.ascontiguousarray(value))
    raise _no_parts(path, name, change)


def _of_expert(update: LowRank, piece: Piece, experts: int) -> LowRank:
    """One expert's factors, and of them the rows that the stored tensor has."""
    index, rank = piece.inside[0][0], update.rank
    rows = slice(*piece.inside[1]) if len(piece.inside) > 1 else slice(None)
    a: Array = update.a[index * rank : (index + 1) * rank]
    b: Array = update.b.reshape(update.b.shape[0], rank, experts)[:, :, index]
    if update.layout == "experts":
        return replace(update, a=a, b=b[rows], layout="linear")
    return replace(update, a=a[:, rows], b=b, layout="transposed")


def _padded(path: Path, name: str, change: Change, bounds: tuple[int, int], rows: int) -> Change:
    """A change for some rows of a stored tensor, the others left as they are."""
    start, stop = bounds
    match change:
        case LowRank(layout="linear", magnitude=None):
            b = np.zeros((rows, change.b.shape[1]), change.b.dtype)
            b[start:stop] = change.b
            return replace(change, b=b)
        case Increment():
            value = np.zeros(rows, change.value.dtype)
            value[start:stop] = change.value
            return replace(change, value=value)
        case Scale(axis=0):
            values = np.ones(rows, change.values.dtype)
            values[start:stop] = change.values
            return replace(change, values=values)
        case Replacement():
            return Rows(change.parameter, tuple(range(start, stop)), change.value)
    raise _no_parts(path, name, change)


def _no_parts(path: Path, name: str, change: Change) -> AdapterError:
    return AdapterError(
        f"{path}: '{name}' is stored in parts, and its change ({type(change).__name__}) can't be cut into them; save"
        " the base again with transformers"
    )
