"""Writing a merge: only the changed tensors, or a whole checkpoint that transformers loads.

Where every tensor keeps its dtype, the base's files are copied inside the kernel and the changed byte ranges
overwritten; memory follows the largest tensor. Everything is written into a staging folder beside the target, flushed
and renamed, and a weights file gets its first bytes last: what an interrupted merge leaves can't be loaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lora.adapter import Change, Replacement, Rows
from lora.bases.checkpoint import CONFIG, INDEX, OUTPUT_EMBEDDING, SINGLE, Checkpoint, read_config
from lora.bases.opening import Base
from lora.errors import CheckpointError
from lora.files.durable import flush, staging_folder
from lora.files.patched_copy import patched_copy
from lora.files.tensorfile import Array, Lazy, TensorFile, TensorWriter, shape_of, write_tensors
from lora.merging.merge import Dtypes, Merged, Targets, merge
from lora.merging.rounding import Survival, survival

CHANGED, ADDED = "changed.safetensors", "model-added.safetensors"
FORMAT = {"format": "pt"}  # transformers asks for it
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


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
    """What a merge wrote: by which formula, its changed tensors, what rounding cost each, whether it untied the output
    embedding.

    ``skipped`` are the components of the adapters' files that are for other models and were not merged.
    """

    folder: Path
    formula: str
    changed: tuple[str, ...]
    survivals: tuple[Survival, ...]
    untied: bool
    skipped: tuple[str, ...] = ()


def write_merged(base: Base, targets: Targets, source: object, out: Path, storing: Storing) -> Written:
    """Merge ``targets`` into ``base`` and write the result to the new folder ``out``.

    Raises AdapterError when the merge is refused, CheckpointError when ``out`` is taken or can't be written; then
    nothing is left under its name.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; choose another folder, or remove it")
    untied = _unties(base.tensors, targets)
    report: list[Survival] = []
    merged = _stream(base.tensors, targets, source, storing, report)
    with _staging(out) as stage:
        if storing.only_changed:
            changed = _write_stream(stage / CHANGED, base.tensors, targets, merged)
        elif isinstance(base.tensors, Checkpoint) and storing.dtype is None and not storing.keep_wide:
            changed = _copy_and_patch(stage, base.tensors, targets, merged)
        else:
            changed = _rewrite(stage, base.tensors, targets, merged, storing)
        if not storing.only_changed:
            _copy_side_files(stage, base, untied, storing)
        _flush_and_rename(stage, out)
    return Written(out, base.formula, tuple(sorted(changed)), tuple(report), untied)


def _stream(
    base: Mapping[str, Array], targets: Targets, source: object, storing: Storing, report: list[Survival]
) -> Iterator[Merged]:
    """The changed tensors as they are to be stored; what rounding cost is reported, undone where too much."""
    dtypes: Dtypes = dict.fromkeys(targets, storing.dtype) if storing.dtype is not None else {}
    for merged in merge(base, targets, source, dtypes):
        cost = survival(merged)
        if cost is not None and cost.warns and storing.keep_wide:
            merged = replace(merged, stored=merged.exact, unchanged=0, lost=0.0)
            cost = survival(merged)
        if cost is not None:
            report.append(cost)
        yield merged
    if _unties(base, targets) and OUTPUT_EMBEDDING not in targets:
        tied = base[OUTPUT_EMBEDDING]
        yield Merged(OUTPUT_EMBEDDING, np.asarray(tied), np.asarray(tied), None, 0, 0.0)


def _write_stream(path: Path, base: Mapping[str, Array], targets: Targets, stream: Iterator[Merged]) -> list[str]:
    names = []
    with TensorWriter(path, _expected(base, targets)) as writer:
        for merged in stream:
            writer.add(merged.parameter, merged.stored)
            names.append(merged.parameter)
    return names


def _copy_and_patch(stage: Path, base: Checkpoint, targets: Targets, stream: Iterator[Merged]) -> list[str]:
    """Copy the untouched byte ranges in the background and write the changed tensors into the gaps.

    Tensors that the base does not store go into a file of their own.
    """
    names_of_files = _file_names(base, targets, [file.path.name for file in base.files])
    files = {file.path: stage / name for file, name in zip(base.files, names_of_files, strict=True)}
    added: dict[str, Merged] = {}
    names = []
    with ExitStack() as stack:
        copies = {
            file.path: stack.enter_context(patched_copy(file, files[file.path], set(targets))) for file in base.files
        }
        for merged in stream:
            names.append(merged.parameter)
            if merged.parameter in base.home:
                copies[base.home[merged.parameter].path].write(merged.parameter, merged.stored)
            else:
                added[merged.parameter] = merged
    if added:
        write_tensors(stage / ADDED, {name: _lazy(merged.stored) for name, merged in added.items()}, FORMAT)
    _write_index(stage, {name: files[file.path].name for name, file in base.home.items()} | dict.fromkeys(added, ADDED))
    return names


def _rewrite(
    stage: Path, base: Mapping[str, Array], targets: Targets, stream: Iterator[Merged], storing: Storing
) -> list[str]:
    """Write every tensor anew: the changed ones first into a file of their own, which is read back and removed."""
    names = _write_stream(stage / CHANGED, base, targets, stream)
    changed = TensorFile(stage / CHANGED)
    files: dict[str, Mapping[str, Array]] = (
        {file.path.name: file for file in base.files} if isinstance(base, Checkpoint) else {SINGLE: base}
    )
    homes: dict[str, str] = {}
    for file, name in zip(files.values(), _file_names(base, targets, list(files)), strict=True):
        tensors = {key: _lazy(changed[key]) if key in changed else _cast(file, key, storing.dtype) for key in file}
        write_tensors(stage / name, tensors, FORMAT)
        homes |= dict.fromkeys(tensors, name)
    added = {key: _lazy(changed[key]) for key in changed if key not in homes}
    if added:
        write_tensors(stage / ADDED, added, FORMAT)
    (stage / CHANGED).unlink()
    _write_index(stage, homes | dict.fromkeys(added, ADDED))
    return names


def _expected(base: Mapping[str, Array], targets: Targets) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """At most these tensors change; float64 stands for whatever dtype they end in."""
    names = {*targets, *_tied(base)}
    shapes = {name: shape_of(base, name) if name in base else _replaced_shape(targets[name]) for name in names}
    return {name: (np.dtype(np.float64), shape) for name, shape in shapes.items()}


def _replaced_shape(changes: Sequence[Change]) -> tuple[int, ...]:
    return next(change.value.shape for change in changes if isinstance(change, Replacement))


def _tied(base: Mapping[str, Array]) -> dict[str, str]:
    return base.tied if isinstance(base, Checkpoint) else {}


def _unties(base: Mapping[str, Array], targets: Targets) -> bool:
    """Whether one of two tied embeddings changes and the other does not.

    Trained tokens stay tied, as they were trained.
    """
    tied = {*_tied(base), *_tied(base).values()}
    return any(
        name in tied and not all(isinstance(change, Rows) for change in changes) for name, changes in targets.items()
    )


def _file_names(base: Mapping[str, Array], targets: Targets, names: list[str]) -> list[str]:
    """The files' names in the result: transformers reads ``model.safetensors`` alone, so it is renamed where another
    comes beside it.
    """
    stored = base.home if isinstance(base, Checkpoint) else base
    alone = all(name in stored for name in targets) and not _unties(base, targets)
    return names if alone or names != [SINGLE] else ["model-base.safetensors"]


def _write_index(stage: Path, homes: Mapping[str, str]) -> None:
    if set(homes.values()) == {SINGLE}:
        return
    total = sum(span.length for file in sorted(set(homes.values())) for span in TensorFile(stage / file).spans.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(stage: Path, base: Base, untied: bool, storing: Storing) -> None:
    """Configuration and tokenizer, as they are but for what the merge has changed: tied embeddings, the dtype, a
    quantization.
    """
    if base.folder is None:
        return
    for path in sorted(base.folder.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in (INDEX, CONFIG):
            shutil.copyfile(path, stage / path.name)
    if not base.config:
        return
    changes: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if storing.dtype is not None:
        changes["dtype"] = storing.dtype.name
    config = dict(base.config) | changes
    if config == read_config(base.folder):
        shutil.copyfile(base.folder / CONFIG, stage / CONFIG)
    else:
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
    for path in (*stage.iterdir(), stage):
        flush(path)
    stage.chmod(0o755)
    stage.rename(out)
    flush(out.parent)
