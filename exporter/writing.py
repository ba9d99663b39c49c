"""Writing a task: its changed tensors are merged and staged, its graphs pointed at them, and all of it committed."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from exporter.base_graph import BaseGraph
from exporter.bundle.edits import with_task
from exporter.bundle.layout import ModelWeights, WeightMap, key, to_graph
from exporter.bundle.manifest import Bundle
from exporter.bundle.recipe import RECIPE, Recipe
from exporter.bundle.records import MODEL, Base, File, Head, Manifest, Part, Store, Task, Weight
from exporter.bundle.staging import commit, describe, named_by_content
from exporter.bundle.structure import joined, of_graphs, staged_structure, unread
from exporter.bundle.task_part import brought_whole
from exporter.graph.digest import graph_digest
from exporter.graph.external_data import pointed
from lora.bases.opening import DENSE
from lora.bases.structure import BaseStructure
from lora.errors import ExportError
from lora.files.tensorfile import TensorFile, TensorWriter, numpy_dtype
from lora.merging.merge import Merged, Targets, merge
from lora.progress import Progress

TOOLS = ("lorafuse", "onnx")


@dataclass(frozen=True)
class Exported:
    """What an export added to the bundle, in bytes, and which tensors the task changes, by which ``formula``.

    ``skipped`` are the components of the adapters' files that are for other models and were not merged; ``unread`` are
    changed parameters that no graph reads, because its outputs do not depend on them.
    """

    bundle: Bundle
    task: str
    traced: bool
    base_bytes: int
    graph_bytes: int
    changed_bytes: int
    adapter_bytes: int
    changed: tuple[str, ...]
    formula: str = DENSE
    skipped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskDraft:
    """A task to be written: what the heads of its parts, its adapters, labels and way of storage were found to be."""

    task: str
    recipe: Recipe
    heads: Mapping[str, Head]
    labels: tuple[str, ...]
    store: Store


Graphs = Mapping[str, BaseGraph]  # by the role of the part


def write_task(
    out: Path,
    stage: Path,
    draft: TaskDraft,
    graphs: Graphs,
    base: Base,
    progress: Progress,
    before: Callable[[], object] = lambda: None,
) -> Exported:
    """Merge, stage the task's files, and commit them once ``before`` has returned."""
    progress("merging")
    weights, changed, without = _write_changed(stage, draft, graphs)
    parts = {role: _staged_part(stage, draft, role, graph, weights.get(role)) for role, graph in graphs.items()}
    task = Task(
        parts=parts,
        store=draft.store,
        adapter=_copy_adapters(stage, draft.task, draft.recipe),
        adapter_sha256=draft.recipe.sha256,
        labels=draft.labels,
    )
    before()
    progress("writing the bundle")
    recorded = {parts[role].graph: graph.graph for role, graph in graphs.items()}

    def with_it(current: Manifest | None) -> Manifest:
        held = None if current is None else Bundle(out, current)
        structure = staged_structure(stage, held, known_structure(graphs))
        known = msgspec.structs.replace(base, structure=structure)
        return with_task(current, draft.task, task, known, recorded, _versions())

    bundle = commit(out, stage, with_it)
    return Exported(
        bundle=bundle,
        task=draft.task,
        traced=any(graph.traced for graph in graphs.values()),
        base_bytes=sum(file.size for graph in graphs.values() for file in graph.added),
        graph_bytes=sum(part.model.size for part in parts.values()),
        changed_bytes=sum(file.size for file in weights.values()),
        adapter_bytes=sum(file.size for file in task.adapter),
        changed=tuple(sorted(changed)),
        skipped=draft.recipe.skipped,
        unread=tuple(sorted(without)),
    )


def stored_values(graphs: Graphs) -> ModelWeights:
    """The base's values for all parts."""
    files = max((graph.weights for graph in graphs.values()), key=len)  # a part that was traced later has more
    return ModelWeights(files, weights_of(graphs))


def weights_of(graphs: Graphs) -> WeightMap:
    """The weights of all parts' graphs."""
    return {name: weight for graph in graphs.values() for name, weight in graph.graph.weights.items()}


def known_structure(graphs: Graphs) -> BaseStructure | None:
    """What is known of the base's parameters, those of all parts."""
    return functools.reduce(joined, (graph.structure for graph in graphs.values()), None)


def _write_changed(stage: Path, draft: TaskDraft, graphs: Graphs) -> tuple[dict[str, File], list[str], frozenset[str]]:
    """Merge one tensor after the other and stage those for each part's file.

    Returns the files by the parts' roles, the names of all tensors that change, and of those that no graph reads.
    """
    stored = stored_values(graphs)
    weights = weights_of(graphs)
    structure = of_graphs(known_structure(graphs), weights, stored)
    targets, source = draft.recipe.targets(stored, structure), draft.recipe.name
    without = unread(structure, targets, weights)
    targets = {name: changes for name, changes in targets.items() if name not in without}
    dtypes = _dtypes(source, targets, weights)
    # The widest first keeps every tensor aligned.
    ordered = dict(sorted(targets.items(), key=lambda target: (-dtypes[target[0]].itemsize, target[0])))
    changed = []
    with ExitStack() as stack:
        writers = {role: stack.enter_context(_PartWriter(stage, draft, role, graphs[role], targets)) for role in graphs}
        for merged in merge(stored, ordered, source, dtypes):
            changed.append(merged.parameter)
            for writer in writers.values():
                writer.add(merged)
    files = {role: writer.file() for role, writer in writers.items()}
    return {role: file for role, file in files.items() if file is not None}, changed, without


def _dtypes(source: str, targets: Targets, weights: WeightMap) -> dict[str, np.dtype[np.generic]]:
    """{target: the dtype that the graphs read it in}. Raises ExportError for one that no graph has."""
    for name in sorted(targets.keys() - weights.keys()):
        raise ExportError(
            f"{source}: tensor '{name}' has no place in the graph: the model that is exported does not use it by"
            " itself; train an adapter without it, or give the adapter's own --task-type"
        )
    return {name: numpy_dtype(weights[name].dtype) for name in targets}


class _PartWriter:
    """The file of a part's changed tensors while it is being written."""

    def __init__(self, stage: Path, draft: TaskDraft, role: str, graph: BaseGraph, targets: Targets) -> None:
        self._stem = draft.task if role == MODEL else f"{draft.task}-{role}"
        self._path = stage / f"{role}.task.safetensors"
        self._weights = graph.graph.weights
        self._kept = {
            name
            for name, changes in targets.items()
            if name in self._weights and (draft.store == "dense" or brought_whole(changes))
        }
        expected = {self._key(name): (numpy_dtype(weight.dtype), weight.shape) for name, weight in self._kept_weights()}
        self._writer = TensorWriter(self._path, expected)

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def add(self, merged: Merged) -> None:
        """Write a tensor, where the part has it and its file is to hold it."""
        name = merged.parameter
        if name in self._kept:
            self._writer.add(self._key(name), to_graph(merged.stored, self._weights[name].order))

    def file(self) -> File | None:
        """The file under its final name, once all is written; None where the part has no tensors of the task's own."""
        if not self._kept:
            self._path.unlink()
            return None
        return named_by_content(self._path, self._stem)

    def _key(self, name: str) -> str:
        return key(name, self._weights[name].order)

    def _kept_weights(self) -> Iterable[tuple[str, Weight]]:
        return ((name, self._weights[name]) for name in sorted(self._kept))


def _staged_part(stage: Path, draft: TaskDraft, role: str, graph: BaseGraph, weights: File | None) -> Part:
    """Stage the part's graph, pointed at the task's tensors and the base's.

    Without tensors of its own it is the base's graph, one file for all tasks.
    """
    files = (*graph.weights, TensorFile(stage / weights.path)) if weights else graph.weights
    proto = pointed(graph.proto, graph.graph.weights, files)
    path = stage / f"{role}.task.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    stem = draft.task if weights else "base"
    model = named_by_content(path, stem if role == MODEL else f"{stem}-{role}")
    return Part(graph=graph_digest(graph.proto), model=model, weights=weights)


def _copy_adapters(stage: Path, task: str, recipe: Recipe) -> tuple[File, ...]:
    """Keep the adapters beside what was made of them: a bundle is verified against its formula without other files."""
    folder = f"adapters/{task}-{recipe.sha256[:8]}"
    places = []
    for place, file in recipe.places():
        (stage / folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, stage / folder / place)
        places.append(place)
    if not recipe.plain:
        (stage / folder / RECIPE).write_bytes(recipe.written())
        places.append(RECIPE)
    return tuple(describe(stage, f"{folder}/{place}") for place in places)


def _versions() -> dict[str, str]:
    return {tool: metadata.version(tool) for tool in TOOLS}
