"""From the weights that a graph names to the tensors of the bundle's files: each claimed, described and in its place.

A graph says by itself where a weight lies, the weight map says what it is called, and a weights file what it holds.
Whatever one of the three says, the other two must say as well: else a task's answer would depend on who reads it, or on
the task that was loaded before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from exporter.bundle.graph_file import External, GraphFile, Initializer
from exporter.bundle.layout import home, key
from exporter.bundle.records import Weight
from lora.errors import BundleError
from lora.files.tensorfile import Array, Span, TensorFile
from lora.wording import printable

AGAIN = "export the task again"


def check_claimed(file: TensorFile, weights: Mapping[str, Weight]) -> None:
    """Raises BundleError where a task's file holds a tensor that the weight map does not claim, in its shape and dtype.

    The map is the only way to a tensor: one that it misses would stay the base's, or be another task's.
    """
    claimed = {key(name, weight.order): weight for name, weight in weights.items()}
    for stored, span in file.spans.items():
        weight = claimed.get(stored)
        if weight is None:
            raise BundleError(f"{file.path}: no weight of the graph is the tensor '{printable(stored)}'; {AGAIN}")
        if not _is(weight, span):
            raise BundleError(
                f"{file.path}: the tensor '{printable(stored)}' is {_shown(span.dtype.name, span.shape)}, but the"
                f" weight map says {_shown(weight.dtype, weight.shape)}; {AGAIN}"
            )


def check_mapped(path: Path, graph: GraphFile, weights: Mapping[str, Weight]) -> None:
    """Raises BundleError unless the weight map's entries are the initializers whose values lie in files."""
    for name, weight in weights.items():
        found = graph.initializers.get(name)
        if found is None or found.external is None:
            raise BundleError(f"{path}: the weight '{printable(name)}' has no place in the graph; {AGAIN}")
        if (found.dtype, found.shape) != (weight.dtype, weight.shape):
            raise BundleError(
                f"{path}: the weight '{printable(name)}' is {_shown(found.dtype, found.shape)}, but the weight map says"
                f" {_shown(weight.dtype, weight.shape)}; {AGAIN}"
            )
    for name, found in graph.initializers.items():
        if found.external is not None and name not in weights:
            raise BundleError(f"{path}: the weight map has no entry for the weight '{printable(name)}'; {AGAIN}")


def linked(
    path: Path, graph: GraphFile, weights: Mapping[str, Weight], files: Iterable[TensorFile]
) -> dict[str, Array]:
    """{initializer: its tensor in one of ``files``}, of all whose values lie in files.

    Raises BundleError where a location is no file of these, or the range is not exactly that of the weight's tensor.
    """
    homes = {file.path.name: file for file in files}
    values = {}
    for name, found in graph.initializers.items():
        if found.external is not None:
            place = _home(path, found, homes)
            stored = key(name, weights[name].order) if name in weights else name
            _check_range(path, found, stored, place.spans.get(stored), found.external)
            values[name] = place[stored]
    return values


def check_homes(path: Path, graph: GraphFile, weights: Mapping[str, Weight], files: Sequence[TensorFile]) -> None:
    """Raises BundleError unless each weight lies in the last of ``files`` that has it: a task's own before the base's.

    A graph that leaves out a tensor of the task's would answer as the base where it runs by itself, and as the task
    where the weight map is followed.
    """
    for name, weight in weights.items():
        external, found = graph.initializers[name].external, home(name, weight, files)
        assert external is not None
        if found is None or external.location != found.path.name:
            expected = f"'{found.path.name}'" if found is not None else "a weights file of the bundle"
            raise BundleError(
                f"{path}: the weight '{printable(name)}' lies in '{printable(external.location)}'; expected {expected};"
                f" {AGAIN}"
            )


def _home(path: Path, found: Initializer, homes: Mapping[str, TensorFile]) -> TensorFile:
    assert found.external is not None
    place = homes.get(found.external.location)
    if place is None or place.path.parent != path.parent:
        raise BundleError(
            f"{path}: the weight '{printable(found.name)}' lies in '{printable(found.external.location)}', which is no"
            f" weights file of this task beside it; {AGAIN}"
        )
    return place


def _check_range(path: Path, found: Initializer, stored: str, span: Span | None, external: External) -> None:
    if span is None or (external.offset, external.length) != (span.offset, span.length):
        raise BundleError(
            f"{path}: the weight '{printable(found.name)}' lies at {external.offset}, {external.length} bytes, which is"
            f" not the tensor '{printable(stored)}' of '{printable(external.location)}'; {AGAIN}"
        )
    if (span.dtype.name, span.shape) != (found.dtype, found.shape):
        raise BundleError(
            f"{path}: the weight '{printable(found.name)}' is {_shown(found.dtype, found.shape)}, but its tensor in"
            f" '{printable(external.location)}' is {_shown(span.dtype.name, span.shape)}; {AGAIN}"
        )
    if span.offset % max(span.dtype.itemsize, 1):
        raise BundleError(
            f"{path}: the tensor '{printable(stored)}' of '{printable(external.location)}' is not aligned to its"
            f" elements; {AGAIN}"
        )


def _is(weight: Weight, span: Span) -> bool:
    return (weight.dtype, weight.shape) == (span.dtype.name, span.shape)


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{printable(dtype)} of shape {list(shape)}"
