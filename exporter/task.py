"""Exporting a task: an adapter over a base becomes a graph and the tensors that differ, in a bundle.

The base is traced once per distinct head. A further task with a known head needs neither torch nor the checkpoint's
loader: its graph is an existing task's, pointed at its own tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import numpy as np

from exporter.base_graph import BaseGraph, held_weights, known_graph, traced_graph
from exporter.bundle.edits import with_task
from exporter.bundle.layout import ModelWeights, key, to_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.manifest_file import check_task_name
from exporter.bundle.records import MODEL, Base, File, Head, Part, Precision, Store, Task, Weight
from exporter.bundle.staging import commit, current_bundle, describe, named_by_content, staging
from exporter.bundle.task_part import brought_whole
from exporter.bundle.task_types import MODULE, task_type
from exporter.graph.digest import graph_digest
from exporter.graph.external_data import pointed
from exporter.heads import embeddings_apart, heads_of
from exporter.source import Source, checkpoint, stored_names
from lora.adapter import Adapter
from lora.bases.checkpoint import fingerprint
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import TensorFile, TensorWriter, numpy_dtype
from lora.formats.peft import read_peft
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import Merged, Targets, check_base, merge
from lora.progress import Progress, unheard

TOOLS = ("lorafuse", "onnx")


@dataclass(frozen=True)
class Request:
    """What to export: folders of the base and the adapter (None: the base as it is), the task's name, its class labels
    (may be empty).

    ``task_type`` overrides the adapter's, ``precision`` None is the bundle's, or float32 in a new one.
    """

    base: Path
    adapter: Path | None
    task: str
    labels: tuple[str, ...] = ()
    task_type: str | None = None
    precision: Precision | None = None
    store: Store = "dense"


@dataclass(frozen=True)
class Exported:
    """What an export added to the bundle, in bytes, and which tensors the task changes."""

    bundle: Bundle
    task: str
    traced: bool
    base_bytes: int
    graph_bytes: int
    changed_bytes: int
    adapter_bytes: int
    changed: tuple[str, ...]


@dataclass(frozen=True)
class TaskDraft:
    """A task to be written: what the heads of its parts, its adapter, labels and way of storage were found to be."""

    task: str
    adapter: Adapter
    heads: Mapping[str, Head]
    labels: tuple[str, ...]
    store: Store


Graphs = Mapping[str, BaseGraph]  # by the role of the part


def export_task(request: Request, out: Path, progress: Progress = unheard) -> Exported:
    """Merge ``request.adapter`` into ``request.base`` and write the task into the bundle ``out``, created if need be.

    A task of the same name is replaced. Raises a LorafuseError, and leaves the bundle as it was, when the adapter can't
    be read or does not fit, the bundle holds another base or precision, the labels do not match the head, or the disk
    is full.
    """
    check_task_name(request.task)
    progress("reading the adapter")
    adapter = adapter_of(request.adapter, request.base)
    apart = embeddings_apart(stored_names(request.base))
    heads = heads_of(adapter, request.base, request.task_type, apart)
    existing = current_bundle(out)
    precision = precision_of(existing, request.precision)
    draft = TaskDraft(request.task, adapter, heads, _labels(request.labels, heads, adapter), request.store)
    with ThreadPoolExecutor(1) as pool:  # hashing gigabytes goes on beside whatever follows
        hashing = pool.submit(fingerprint, request.base)
        if existing is not None or adapter.base_sha256 is not None:
            check_base(adapter, hashing.result())
            check_same_base(existing, hashing.result())
        known = _known_graphs(existing, heads) if existing else None
        if existing is None or known is None or not _have_values(known, adapter):
            return export_traced(checkpoint(request.base, hashing.result), draft, precision, existing, out, progress)
    with staging(out) as stage:
        return write_task(out, stage, draft, known, existing.manifest.base, progress)


def export_traced(
    source: Source, draft: TaskDraft, precision: Precision, existing: Bundle | None, out: Path, progress: Progress
) -> Exported:
    """Trace the parts of ``source`` and write the task; weights that the bundle has undamaged are not written again."""
    graphs: dict[str, BaseGraph] = {}
    held = held_weights(existing) if existing else ()
    with staging(out) as stage:
        for role, head in draft.heads.items():
            graphs[role] = traced_graph(source, role, head, precision, draft.adapter, held, stage, progress)
            held = graphs[role].weights
        base = _staged_base(stage, source, precision, existing, draft.heads, graphs)
        return write_task(out, stage, draft, graphs, base, progress)


def add_task(
    bundle: Path,
    adapter: Path,
    task: str,
    labels: tuple[str, ...] = (),
    store: Store = "dense",
    progress: Progress = unheard,
) -> Exported:
    """Add a task to a bundle without its base's checkpoint: the bundle has the weights, and a graph for each head that
    it knows.

    Raises BundleError when no task has the adapter's head, or the base's weights are damaged, and what ``export_task``
    raises.
    """
    check_task_name(task)
    progress("reading the adapter")
    existing = open_bundle(bundle)
    base = existing.manifest.base
    read = read_peft(adapter)
    check_base(read, base.sha256)
    heads = _module_heads(existing) or heads_of(read, existing.path / "base", apart=not base.tied)
    weights = tuple(existing.described(file) for file in base.weights)
    graphs = {role: known_graph(existing, role, head, weights) for role, head in heads.items()}
    known = {role: graph for role, graph in graphs.items() if graph is not None}
    if absent := [head for role, head in heads.items() if role not in known]:
        raise BundleError(
            f"{bundle}: no task has a {absent[0].task_type} head of {absent[0].outputs} outputs yet; add the first with"
            " 'lorafuse export', from the base"
        )
    draft = TaskDraft(task, read, heads, _labels(labels, heads, read), store)
    with ThreadPoolExecutor(1) as pool, staging(bundle) as stage:
        # While the tensors are merged; waited for before anything is changed.
        checks = [pool.submit(existing.checked, file) for file in base.weights]
        return write_task(bundle, stage, draft, known, base, progress, lambda: [check.result() for check in checks])


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
    weights, changed = _write_changed(stage, draft, graphs)
    parts = {role: _staged_part(stage, draft, role, graph, weights.get(role)) for role, graph in graphs.items()}
    task = Task(
        parts=parts,
        store=draft.store,
        adapter=_copy_adapter(stage, draft.task, draft.adapter),
        adapter_sha256=draft.adapter.sha256,
        labels=draft.labels,
    )
    before()
    progress("writing the bundle")
    recorded = {parts[role].graph: graph.graph for role, graph in graphs.items()}
    bundle = commit(out, stage, lambda current: with_task(current, draft.task, task, base, recorded, _versions()))
    return Exported(
        bundle=bundle,
        task=draft.task,
        traced=any(graph.traced for graph in graphs.values()),
        base_bytes=sum(file.size for graph in graphs.values() for file in graph.added),
        graph_bytes=sum(part.model.size for part in parts.values()),
        changed_bytes=sum(file.size for file in weights.values()),
        adapter_bytes=sum(file.size for file in task.adapter),
        changed=tuple(sorted(changed)),
    )


def adapter_of(folder: Path | None, base: Path) -> Adapter:
    """The adapter in ``folder``; without one, an adapter that changes nothing, which messages call by its ``base``."""
    return read_peft(folder) if folder is not None else Adapter(base, "none", (), "", ())


def precision_of(existing: Bundle | None, asked: Precision | None) -> Precision:
    """The precision that was asked for, which must be the bundle's where there is one.

    Raises BundleError when it is not.
    """
    if existing is None:
        return asked or "float32"
    held = existing.manifest.base.precision
    if asked not in (None, held):
        raise BundleError(
            f"{existing.path}: its graphs compute in {held}, but {asked} was asked for; use a bundle of its own"
        )
    return held


def _known_graphs(existing: Bundle, heads: Mapping[str, Head]) -> Graphs | None:
    """The graphs of these heads, with the base's weights; None where one is missing or a file of them is damaged."""
    held = held_weights(existing)
    if len(held) != len(existing.manifest.base.weights):
        return None
    graphs = {role: known_graph(existing, role, head, held) for role, head in heads.items()}
    known = {role: graph for role, graph in graphs.items() if graph is not None}
    return known if len(known) == len(heads) else None


def _have_values(graphs: Graphs, adapter: Adapter) -> bool:
    """Whether every weight has a value.

    A head of the base's own is not in the bundle while all tasks have brought theirs.
    """
    stored = _stored(graphs)
    names = {name for graph in graphs.values() for name in graph.graph.weights}
    return names <= stored.keys() | changes_by_parameter(stored, adapter).keys()


def _stored(graphs: Graphs) -> ModelWeights:
    """The base's values for all parts."""
    files = max((graph.weights for graph in graphs.values()), key=len)  # a part that was traced later has more
    return ModelWeights(
        files, {name: weight for graph in graphs.values() for name, weight in graph.graph.weights.items()}
    )


def _module_heads(bundle: Bundle) -> dict[str, Head] | None:
    """The one head of a bundle that was made of a Python module, whose adapters say nothing about it."""
    heads = {graph.head for graph in bundle.manifest.graphs.values()}
    return {MODEL: heads.pop()} if len(heads) == 1 and all(head.task_type == MODULE for head in heads) else None


def _labels(given: tuple[str, ...], heads: Mapping[str, Head], adapter: Adapter) -> tuple[str, ...]:
    head = next(iter(heads.values()))
    if not given:
        return tuple(f"LABEL_{index}" for index in range(head.outputs)) if head.classifies and head.outputs > 1 else ()
    if not head.classifies:
        raise ExportError(
            f"{adapter.path}: a {head.task_type} model has no classes, but labels were given; leave them out"
        )
    if len(given) != head.outputs:
        raise ExportError(
            f"{adapter.path}: the head has {head.outputs} outputs, but {len(given)} labels were given; give one per"
            " output"
        )
    return given


def check_same_base(existing: Bundle | None, base_sha256: str) -> None:
    """Raises BundleError where the bundle holds another base."""
    if existing is not None and existing.manifest.base.sha256 != base_sha256:
        held = existing.manifest.base.sha256
        raise BundleError(
            f"{existing.path}: holds tasks of the base {held[:12]}…, but this base is {base_sha256[:12]}…; use a bundle"
            " of its own"
        )


def _write_changed(stage: Path, draft: TaskDraft, graphs: Graphs) -> tuple[dict[str, File], list[str]]:
    """Merge one tensor after the other and stage those for each part's file.

    Returns the files by the parts' roles, and the names of all tensors that change.
    """
    stored = _stored(graphs)
    targets = changes_by_parameter(stored, draft.adapter)
    dtypes = _dtypes(draft.adapter, targets, graphs)
    # The widest first keeps every tensor aligned.
    ordered = dict(sorted(targets.items(), key=lambda target: (-dtypes[target[0]].itemsize, target[0])))
    changed = []
    with ExitStack() as stack:
        writers = {role: stack.enter_context(_PartWriter(stage, draft, role, graphs[role], targets)) for role in graphs}
        for merged in merge(stored, ordered, draft.adapter.path, dtypes):
            changed.append(merged.parameter)
            for writer in writers.values():
                writer.add(merged)
    files = {role: writer.file() for role, writer in writers.items()}
    return {role: file for role, file in files.items() if file is not None}, changed


def _dtypes(adapter: Adapter, targets: Targets, graphs: Graphs) -> dict[str, np.dtype[np.generic]]:
    """{target: the dtype that the graphs read it in}. Raises ExportError for one that no graph has."""
    weights = {name: weight for graph in graphs.values() for name, weight in graph.graph.weights.items()}
    for name in sorted(targets.keys() - weights.keys()):
        raise ExportError(
            f"{adapter.path}: tensor '{name}' has no place in the graph; the adapter was trained on another model"
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
    """Stage the graph, pointed at the task's tensors and the base's; without tensors of its own it is one that tasks
    share.
    """
    files = (*graph.weights, TensorFile(stage / weights.path)) if weights else graph.weights
    proto = pointed(graph.proto, graph.graph.weights, files)
    path = stage / f"{role}.task.onnx"
    path.write_bytes(proto.SerializeToString(deterministic=True))
    stem = draft.task if weights else "base"
    model = named_by_content(path, stem if role == MODEL else f"{stem}-{role}")
    return Part(graph=graph_digest(graph.proto), model=model, weights=weights)


def _copy_adapter(stage: Path, task: str, adapter: Adapter) -> tuple[File, ...]:
    """Keep the adapter beside what was made of it: a bundle can be verified against its formula without other files."""
    if not adapter.files:
        return ()
    folder = f"adapters/{task}-{adapter.sha256[:8]}"
    (stage / folder).mkdir(parents=True)
    for file in adapter.files:
        shutil.copyfile(file, stage / folder / file.name)
    return tuple(describe(stage, f"{folder}/{file.name}") for file in adapter.files)


def _staged_base(
    stage: Path,
    source: Source,
    precision: Precision,
    existing: Bundle | None,
    heads: Mapping[str, Head],
    graphs: Graphs,
) -> Base:
    added = tuple(file for graph in graphs.values() for file in graph.added)
    tied = _tied(source, heads, existing)
    if existing is not None:
        base = existing.manifest.base
        return msgspec.structs.replace(base, weights=(*base.weights, *added), tied=tied)
    (stage / "base").mkdir()
    for file in source.files:
        shutil.copyfile(file, stage / "base" / file.name)
    files = tuple(describe(stage, f"base/{file.name}") for file in source.files)
    return Base(
        source.fingerprint(),
        precision,
        longest=source.longest,
        vocabulary=source.vocabulary,
        weights=added,
        files=files,
        tied=tied,
    )


def _tied(source: Source, heads: Mapping[str, Head], existing: Bundle | None) -> tuple[tuple[str, ...], ...]:
    """Groups of tied parameters: those that the bundle knows, or a language model's, whose output may be the input."""
    known = existing.manifest.base.tied if existing is not None else ()
    found = [source.tied(head) for head in heads.values() if task_type(head.task_type).models_language]
    return known or tuple(group for groups in found for group in groups)


def _versions() -> dict[str, str]:
    return {tool: metadata.version(tool) for tool in TOOLS}
