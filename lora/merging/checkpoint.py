"""Writing a merge: only the changed tensors, or a whole checkpoint that transformers loads.

Where every tensor keeps its dtype, the base's files are copied inside the kernel and the changed byte ranges
overwritten; memory follows the largest tensor. Everything is written into a staging folder beside the target, flushed
and renamed, and a weights file gets its first bytes last: what an interrupted merge leaves can't be loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora.adapter import Change, Replacement
from lora.bases.checkpoint import OF_DIFFUSERS, SINGLE, index_beside
from lora.bases.opening import Base
from lora.bases.structure import BaseStructure
from lora.bases.tensors import BaseTensors
from lora.errors import CheckpointError
from lora.files.durable import flush, staging_folder
from lora.files.patched_copy import patched_copy
from lora.files.tensorfile import Array, Lazy, TensorFile, TensorWriter, shape_of, write_tensors
from lora.merging.config import merged_config
from lora.merging.merge import Dtypes, Merged, Targets, merge
from lora.merging.rounding import Survival, survival
from lora.merging.side_files import write_side_files
from lora.merging.untying import Untying, untying

CHANGED, ADDED = "changed.safetensors", "model-added.safetensors"
FORMAT = {"format": "pt"}  # transformers asks for it


@dataclass(frozen=True)
class Storing:
    """How to store: only what changed or a whole checkpoint; another dtype than the base's; the worst tensors in
    float32.
    """

    only_changed: bool = False
    dtype: np.dtype[Any] | None = None
    keep_wide: bool = False


@dataclass(frozen=True)
class Written:
    """What a merge wrote: by which formula, its changed tensors, what rounding cost each, and whether tensors that the
    base ties now differ (``untied``), which config.json says too where ``flagged``.

    ``missing`` are the model's parameters for which neither the base nor an adapter has values; ``skipped`` are the
    components of the adapters' files that are for other models and were not merged.
    """

    folder: Path
    formula: str
    changed: tuple[str, ...]
    survivals: tuple[Survival, ...]
    untied: bool
    flagged: bool = False
    missing: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def write_merged(base: Base, targets: Targets, source: object, out: Path, storing: Storing) -> Written:
    """Merge ``targets`` into ``base`` and write the result to the new folder ``out``.

    Raises AdapterError when the merge is refused, CheckpointError when ``out`` is taken or can't be written; then
    nothing is left under its name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another folder, or remove it")
    parted = untying(base, targets, source)
    report: list[Survival] = []
    merged = _stream(base.tensors, parted, source, storing, report)
    with _staging(out) as stage:
        if storing.only_changed:
            changed = _write_stream(stage / CHANGED, base.tensors, parted, merged)
        elif base.tensors.files and storing.dtype is None and not storing.keep_wide and not _resizes(base, parted):
            changed = _copy_and_patch(stage, base.tensors, parted, merged)
        else:
            changed = _rewrite(stage, base.tensors, parted, merged, storing)
        if not storing.only_changed:
            write_side_files(stage, base, merged_config(base, parted, _loaded_in(storing, report)))
        _flush_and_rename(stage, out)
    names, missing = tuple(sorted(changed)), _without_values(base.structure, parted)
    return Written(out, base.formula, names, tuple(report), parted.parted, parted.flag, missing)


def _without_values(structure: BaseStructure | None, parted: Untying) -> tuple[str, ...]:
    """What the model has and neither the base nor an adapter brings: loading makes it up, as training did."""
    if structure is None or not structure.complete:
        return ()
    held = {*structure.shared(), *parted.targets}
    return tuple(
        name
        for name, parameter in sorted(structure.parameters.items())
        if not parameter.stored and not parameter.converted and name not in held
    )


def _loaded_in(storing: Storing, report: Sequence[Survival]) -> str | None:
    """The dtype that the configuration names: float32 where a tensor was kept so, or loading would round it again."""
    if storing.keep_wide and any(cost.dtype == "float32" for cost in report):
        return "float32"
    return None if storing.dtype is None else storing.dtype.name


def _stream(
    base: BaseTensors, parted: Untying, source: object, storing: Storing, report: list[Survival]
) -> Iterator[Merged]:
    """The changed tensors as they are to be stored; what rounding cost is reported, undone where too much."""
    dtypes: Dtypes = dict.fromkeys(parted.targets, storing.dtype) if storing.dtype is not None else {}
    for merged in merge(base, parted.targets, source, dtypes):
        cost = survival(merged)
        if cost is not None and cost.warns and storing.keep_wide:
            merged = replace(merged, stored=merged.exact, unchanged=0, lost=0.0)
            cost = survival(merged)
        if cost is not None:
            report.append(cost)
        yield merged
    for name, home in sorted(parted.copies.items()):
        values = np.asarray(base[home])
        yield Merged(name, values if storing.dtype is None else values.astype(storing.dtype), values, None, 0, 0.0)


def _resizes(base: Base, parted: Untying) -> bool:
    """Whether a tensor of the base comes in another shape: then its bytes can't be put where the old ones are."""
    return any(
        isinstance(change, Replacement) and name in base.tensors and shape_of(base.tensors, name) != change.value.shape
        for name, changes in parted.targets.items()
        for change in changes
    )


def _write_stream(path: Path, base: BaseTensors, parted: Untying, stream: Iterator[Merged]) -> list[str]:
    names = []
    with TensorWriter(path, _expected(base, parted)) as writer:
        for merged in stream:
            writer.add(merged.parameter, merged.stored)
            names.append(merged.parameter)
    return names


def _copy_and_patch(stage: Path, base: BaseTensors, parted: Untying, stream: Iterator[Merged]) -> list[str]:
    """Copy the untouched byte ranges in the background and write the changed tensors into the gaps.

    Tensors that the base does not store go into a file of their own.
    """
    names_of_files = _file_names(base, parted, [file.path.name for file in base.files])
    files = {file.path: stage / name for file, name in zip(base.files, names_of_files, strict=True)}
    homes = {name: file for file in base.files for name in file}
    added: dict[str, Merged] = {}
    names = []
    with ExitStack() as stack:
        copies = {
            file.path: stack.enter_context(patched_copy(file, files[file.path], set(parted.targets)))
            for file in base.files
        }
        for merged in stream:
            names.append(merged.parameter)
            if merged.parameter in homes:
                copies[homes[merged.parameter].path].write(merged.parameter, merged.stored)
            else:
                added[merged.parameter] = merged
    if added:
        write_tensors(stage / ADDED, {name: _lazy(merged.stored) for name, merged in added.items()}, FORMAT)
    _write_index(stage, {name: files[file.path].name for name, file in homes.items()} | dict.fromkeys(added, ADDED))
    return names


def _rewrite(stage: Path, base: BaseTensors, parted: Untying, stream: Iterator[Merged], storing: Storing) -> list[str]:
    """Write every tensor anew: the changed ones first into a file of their own, which is read back and removed."""
    names = _write_stream(stage / CHANGED, base, parted, stream)
    changed = TensorFile(stage / CHANGED)
    files: dict[str, Mapping[str, Array]] = {file.path.name: file for file in base.files} or {SINGLE: base}
    homes: dict[str, str] = {}
    for file, name in zip(files.values(), _file_names(base, parted, list(files)), strict=True):
        tensors = {key: _lazy(changed[key]) if key in changed else _cast(file, key, storing.dtype) for key in file}
        write_tensors(stage / name, tensors, FORMAT)
        homes |= dict.fromkeys(tensors, name)
    added = {key: _lazy(changed[key]) for key in changed if key not in homes}
    if added:
        write_tensors(stage / ADDED, added, FORMAT)
    (stage / CHANGED).unlink()
    _write_index(stage, homes | dict.fromkeys(added, ADDED))
    return names


def _expected(base: BaseTensors, parted: Untying) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """At most these tensors change; float64 stands for whatever dtype they end in."""
    shapes = {name: _shape(base, name, changes) for name, changes in parted.targets.items()}
    shapes |= {name: base.shape(home) for name, home in parted.copies.items()}
    return {name: (np.dtype(np.float64), shape) for name, shape in shapes.items()}


def _shape(base: BaseTensors, name: str, changes: Sequence[Change]) -> tuple[int, ...]:
    replaced = next((change.value.shape for change in changes if isinstance(change, Replacement)), None)
    return base.shape(name) if replaced is None else replaced


def _file_names(base: BaseTensors, parted: Untying, names: list[str]) -> list[str]:
    """The files' names in the result: transformers reads ``model.safetensors`` alone, so it is renamed where another
    comes beside it.
    """
    stored = set(base)
    alone = all(name in stored for name in parted.targets) and not parted.copies
    return names if alone or names != [SINGLE] else ["model-base.safetensors"]


def _write_index(stage: Path, homes: Mapping[str, str]) -> None:
    files = sorted(set(homes.values()))
    if files in ([SINGLE], [OF_DIFFUSERS[0]]):
        return
    total = sum(span.length for file in files for span in TensorFile(stage / file).spans.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    (stage / index_beside(files)).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _lazy(values: Array) -> Lazy:
    return Lazy(values.dtype, values.shape, lambda: np.asarray(values))


def _cast(file: Mapping[str, Array], name: str, dtype: np.dtype[Any] | None) -> Lazy:
    """A tensor of the base in another floating-point dtype; integers stay. Overflow is an error."""
    layout = file.spans[name] if isinstance(file, TensorFile) else file[name]
    stored, shape = layout.dtype, layout.shape
    wanted = dtype if dtype is not None and stored.kind in "fV" else stored

    def make() -> Array:
        with np.errstate(over="ignore"):
            values = np.asarray(file[name]).astype(wanted, copy=False)
        if wanted != stored and not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise CheckpointError(f"tensor '{name}' of the base overflows {wanted}; store it in a wider dtype")
        return values

    return Lazy(wanted, shape, make)


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    try:
        with staging_folder(out) as stage:
            yield stage
    except OSError as error:
        raise CheckpointError(f"{out}: can't be written ({error.strerror or error}); nothing was left there") from error


def _flush_and_rename(stage: Path, out: Path) -> None:
    for path in (*stage.rglob("*"), stage):
        flush(path)
    stage.chmod(0o755)
    stage.rename(out)
    flush(out.parent)
