"""What an adapter is, and what merging it into a base would change or refuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lora.adapter import Adapter, Blend, Change, Increment, LowRank, Replacement, Rows, Scale
from lora.bases.knowing import Ask, known
from lora.bases.opening import Base, open_base
from lora.errors import LorafuseError
from lora.files.tensorfile import Array
from lora.formats.model_class import model_class
from lora.formats.read import ReadOptions, read_adapter
from lora.merging.fit import fit
from lora.merging.merge import check_base


@dataclass(frozen=True)
class Row:
    """One change: its module, kind, rank and scaling, the shape of what it adds, and the base tensor that it is for."""

    module: str
    kind: str
    rank: int | None
    scaling: float
    shape: str
    tensor: str | None


@dataclass(frozen=True)
class Inspection:
    """All changes; ``refused`` says why a merge would be refused, ``verdict`` puts the answer in words. Size in bytes.

    ``skipped`` are the components of the file that are for other models.
    """

    format: str | None
    sha256: str | None
    task_type: str | None
    size: int
    rows: tuple[Row, ...]
    refused: str | None
    verdict: str
    skipped: tuple[str, ...] = ()


def inspect_adapter(
    path: Path, base: Path | None, options: ReadOptions, dequantize: bool = False, ask: Ask | None = None
) -> Inspection:
    """Read ``path`` and, where a base is given, try the fit; ``ask`` asks transformers what the base is.

    A refusal is part of the answer; only a missing path raises.
    """
    if not path.exists():
        raise LorafuseError(f"{path}: no such file or folder; expected an adapter")
    try:
        adapter = read_adapter(path, options)
    except LorafuseError as error:
        return Inspection(None, None, None, 0, (), str(error), f"refused: {error}")
    size = sum(file.stat().st_size for file in adapter.files)
    try:
        names = _tensors(adapter, open_base(base, dequantize), ask) if base is not None else {}
        refused = None
    except LorafuseError as error:
        names, refused = {}, str(error)
    rows = tuple(_row(change, names.get(index)) for index, change in enumerate(adapter.changes))
    verdict = (
        f"refused: {refused}"
        if refused
        else f"fits {base}"
        if base is not None
        else "readable; give --base to see whether it fits"
    )
    return Inspection(adapter.format, adapter.sha256, adapter.task_type, size, rows, refused, verdict, adapter.skipped)


def _tensors(adapter: Adapter, opened: Base, ask: Ask | None) -> Mapping[int, str]:
    """{index of a change: the tensors that it changes, in words}."""
    if adapter.base_sha256 is not None:
        check_base(adapter, opened.fingerprint())
    base = known(opened, model_class(adapter), ask)
    placed = fit(adapter, base.tensors, base.structure)
    names = [[place.parameter for place in places] for places in placed]
    return {
        index: first if not others else f"{first} and {len(others)} more"
        for index, (first, *others) in enumerate(names)
    }


def _row(change: Change, tensor: str | None) -> Row:
    match change:
        case LowRank():
            kind = f"{change.layout}{' + DoRA' if change.magnitude is not None else ''}"
            return Row(
                change.module, kind, change.rank, change.scaling, f"{_shape(change.b)} · {_shape(change.a)}", tensor
            )
        case Increment():
            return Row(change.module, "bias", None, change.scaling, _shape(change.value), tensor)
        case Replacement():
            return Row(change.parameter, "replaced", None, 1.0, _shape(change.value), tensor)
        case Scale():
            return Row(change.module, f"scaled {change.side}puts", None, 1.0, _shape(change.values), tensor)
        case Rows():
            return Row(change.module, "trained rows", None, 1.0, _shape(change.values), tensor)
        case Blend():
            raise AssertionError("a blend is made of several adapters and stands in no file")


def _shape(values: Array) -> str:
    return "×".join(map(str, values.shape))
