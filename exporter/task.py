"""Exporting a task: an adapter over a base becomes a graph and the tensors that differ, in a bundle.

The base is traced once per distinct head. A further task with a known head needs neither torch nor the checkpoint's
loader: its graph is an existing task's, pointed at its own tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec

from exporter.base_graph import Dense, held_weights, known_dense, traced_dense
from exporter.bundle.changes import brought_whole
from exporter.bundle.layout import ModelWeights, key, to_graph
from exporter.bundle.manifest import (
    MODULE,
    SCHEMA,
    Base,
    Bundle,
    File,
    Graph,
    Head,
    Manifest,
    Precision,
    Store,
    Task,
    check_task_name,
    open_bundle,
)
from exporter.bundle.staging import commit, current_bundle, describe, named_by_content, staging
from exporter.graph.digest import graph_digest
from exporter.graph.external_data import pointed
from exporter.heads import embeddings_apart, head_of
from exporter.source import Source, checkpoint
from lora.adapter import Adapter
from lora.bases.checkpoint import fingerprint, weight_files
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import TensorFile, TensorWriter
from lora.formats.peft import read_peft
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import Targets, check_base, merge
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
class Plan:
    """A task to be written: what its head, adapter, labels and way of storage were found to be."""

    task: str
    adapter: Adapter
    head: Head
    labels: tuple[str, ...]
    store: Store


def export_task(request: Request, out: Path, progress: Progress = unheard) -> Exported:
    """Merge ``request.adapter`` into ``request.base`` and write the task into the bundle ``out``, created if need be.

    A task of the same name is replaced. Raises a LorafuseError, and leaves the bundle as it was, when the adapter can't
    be read or does not fit, the bundle holds another base or precision, the labels do not match the head, or the disk
    is full.
    """
    check_task_name(request.task)
    progress("reading the adapter")
    adapter = adapter_of(request.adapter, request.base)
    head = head_of(
        adapter,
        request.base,
        request.task_type,
        embeddings_apart(name for path in weight_files(request.base) for name in TensorFile(path)),
    )
    existing = current_bundle(out)
    precision = precision_of(existing, request.precision)
    plan = Plan(request.task, adapter, head, _labels(request.labels, head, adapter), request.store)
    with ThreadPoolExecutor(1) as pool:  # hashing gigabytes goes on beside whatever follows
        hashing = pool.submit(fingerprint, request.base)
        held = held_weights(existing) if existing else ()
        if existing is not None or adapter.base_sha256 is not None:
            check_base(adapter, hashing.result())
            check_same_base(existing, hashing.result())
        dense = (
            known_dense(existing, head, held) if existing and len(held) == len(existing.manifest.base.weights) else None
        )
        if existing is None or dense is None or not _has_values(dense, adapter):
            return export_traced(
                checkpoint(request.base, hashing.result), plan, precision, existing, held, out, progress
            )
    with staging(out) as stage:
        return write_task(out, stage, plan, dense, existing.manifest.base, progress)


def _has_values(dense: Dense, adapter: Adapter) -> bool:
    """Whether every weight has a value.

    A head of the base's own is not in the bundle while all tasks have brought theirs.
    """
    return dense.graph.weights.keys() <= dense.stored.keys() | changes_by_parameter(dense.stored, adapter).keys()


def export_traced(
    source: Source,
    plan: Plan,
    precision: Precision,
    existing: Bundle | None,
    held: tuple[TensorFile, ...],
    out: Path,
    progress: Progress,
) -> Exported:
    """Trace ``source`` and write the task.

    ``held`` are the files of the base's weights that the bundle has, undamaged.
    """
    with staging(out) as stage:
        dense = traced_dense(source, plan.head, precision, plan.adapter, held, stage, progress)
        base = _staged_base(stage, source, precision, existing, dense)
        return write_task(out, stage, plan, dense, base, progress)


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
    read = read_peft(adapter)
    check_base(read, existing.manifest.base.sha256)
    head = _module_head(existing) or head_of(read, existing.path / "base", apart=_apart(existing))
    files = existing.manifest.base.weights
    dense = known_dense(existing, head, tuple(TensorFile(existing.present(file)) for file in files))
    if dense is None:
        raise BundleError(
            f"{bundle}: no task has a {head.task_type} head of {head.outputs} outputs yet; add the first with 'lorafuse"
            " export', from the base"
        )
    plan = Plan(task, read, head, _labels(labels, head, read), store)
    with ThreadPoolExecutor(1) as pool, staging(bundle) as stage:
        checks = [
            pool.submit(existing.checked, file) for file in files
        ]  # while the tensors are merged; waited for before anything is changed
        return write_task(
            bundle, stage, plan, dense, existing.manifest.base, progress, lambda: [check.result() for check in checks]
        )


def write_task(
    out: Path,
    stage: Path,
    plan: Plan,
    dense: Dense,
    base: Base,
    progress: Progress,
    before: Callable[[], object] = lambda: None,
) -> Exported:
    """Merge, stage the task's files, and commit them once ``before`` has returned."""
    progress("merging")
    stored = dense.stored
    targets = changes_by_parameter(stored, plan.adapter)
    _check_places(plan.adapter, targets, dense.graph)
    weights, changed = _write_changed(stage, plan, dense, stored, targets)
    model = _write_graph(stage, plan, dense, weights)
    task = Task(
        graph=graph_digest(dense.proto),
        model=model,
        weights=weights,
        store=plan.store,
        adapter=_copy_adapter(stage, plan.task, plan.adapter),
        adapter_sha256=plan.adapter.sha256,
        labels=plan.labels,
    )
    before()
    progress("writing the bundle")
    bundle = commit(out, stage, lambda current: _with_task(current, base, plan.task, task, dense.graph))
    return Exported(
        bundle=bundle,
        task=plan.task,
        traced=dense.traced,
        base_bytes=sum(file.size for file in dense.added),
        graph_bytes=model.size,
        changed_bytes=weights.size if weights else 0,
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


def _module_head(bundle: Bundle) -> Head | None:
    """The one head of a bundle that was made of a Python module, whose adapters say nothing about it."""
    heads = {graph.head for graph in bundle.manifest.graphs.values()}
    return heads.pop() if len(heads) == 1 and all(head.task_type == MODULE for head in heads) else None


def _apart(bundle: Bundle) -> bool:
    """Whether the base itself has its embeddings apart: a task's graph does whose adapter would have left them one
    tensor.

    A task whose adapter changes one of the two says nothing about the base. On a base that ties them, a further task's
    trained tokens would then reach one of the two only.
    """
    return any(
        _unadapted_ties(bundle, task) for task in bundle.manifest.tasks.values() if not bundle.graph(task).head.tied
    )


def _unadapted_ties(bundle: Bundle, task: Task) -> bool:
    """Whether the task's adapter, by itself, leaves the embeddings tied."""
    base, folder = bundle.path / "base", (bundle.path / task.adapter[0].path).parent if task.adapter else None
    return head_of(adapter_of(folder, base), base, bundle.graph(task).head.task_type).tied


def _labels(given: tuple[str, ...], head: Head, adapter: Adapter) -> tuple[str, ...]:
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


def _check_places(adapter: Adapter, targets: Iterable[str], graph: Graph) -> None:
    unused = sorted(set(targets) - graph.weights.keys())
    if unused:
        raise ExportError(
            f"{adapter.path}: tensor '{unused[0]}' has no place in the graph; the adapter was trained on another model"
        )


def _write_changed(
    stage: Path, plan: Plan, dense: Dense, stored: ModelWeights, targets: Targets
) -> tuple[File | None, list[str]]:
    """Merge one tensor after the other and stage those for the task's file; the names of all that change."""
    order = dense.graph.weights
    kept = {name for name, changes in targets.items() if plan.store == "dense" or brought_whole(changes)}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in dense.proto.graph.initializer}
    expected = {key(name, order[name]): (dense.dtypes[name], shapes[name]) for name in kept}
    widest_first = dict(
        sorted(targets.items(), key=lambda target: (-dense.dtypes[target[0]].itemsize, target[0]))
    )  # keeps every tensor aligned
    changed = []
    with TensorWriter(stage / "task.safetensors", expected) as writer:
        for merged in merge(stored, widest_first, plan.adapter.path, {name: dense.dtypes[name] for name in targets}):
            changed.append(merged.parameter)
            if merged.parameter in kept:
                writer.add(
                    key(merged.parameter, order[merged.parameter]), to_graph(merged.stored, order[merged.parameter])
                )
    if not kept:
        (stage / "task.safetensors").unlink()
        return None, changed
    return named_by_content(stage / "task.safetensors", plan.task), changed


def _write_graph(stage: Path, plan: Plan, dense: Dense, weights: File | None) -> File:
    """Stage the graph, pointed at the task's tensors and the base's; without tensors of its own it is one that tasks
    share.
    """
    files = (*dense.weights, TensorFile(stage / weights.path)) if weights else dense.weights
    proto = pointed(dense.proto, dense.graph.weights, files)
    (stage / "task.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    return named_by_content(stage / "task.onnx", plan.task if weights else "base")


def _copy_adapter(stage: Path, task: str, adapter: Adapter) -> tuple[File, ...]:
    """Keep the adapter beside what was made of it: a bundle can be verified against its formula without other files."""
    if not adapter.files:
        return ()
    folder = f"adapters/{task}-{adapter.sha256[:8]}"
    (stage / folder).mkdir(parents=True)
    for file in adapter.files:
        shutil.copyfile(file, stage / folder / file.name)
    return tuple(describe(stage, f"{folder}/{file.name}") for file in adapter.files)


def _staged_base(stage: Path, source: Source, precision: Precision, existing: Bundle | None, dense: Dense) -> Base:
    if existing is not None:
        return msgspec.structs.replace(existing.manifest.base, weights=(*existing.manifest.base.weights, *dense.added))
    (stage / "base").mkdir()
    for file in source.files:
        shutil.copyfile(file, stage / "base" / file.name)
    files = tuple(describe(stage, f"base/{file.name}") for file in source.files)
    return Base(
        source.fingerprint(),
        precision,
        longest=source.longest,
        vocabulary=source.vocabulary,
        weights=dense.added,
        files=files,
    )


def _with_task(current: Manifest | None, base: Base, name: str, task: Task, graph: Graph) -> Manifest:
    """The current manifest with the task added: what another export has added meanwhile stays."""
    if current is None:
        return Manifest(schema=SCHEMA, base=base, graphs={task.graph: graph}, tasks={name: task}, versions=_versions())
    if (current.base.sha256, current.base.precision) != (base.sha256, base.precision):
        raise BundleError(
            f"task '{name}': another export has made this bundle for another base meanwhile; use a bundle of its own"
        )
    former = current.tasks.get(name)
    if former is not None and (former.model, former.adapter_sha256) == (task.model, task.adapter_sha256):
        task = msgspec.structs.replace(task, engines=former.engines)
    tasks = dict(sorted({**current.tasks, name: task}.items()))
    if task.graph in current.graphs:
        graph = msgspec.structs.replace(graph, engines=current.graphs[task.graph].engines)
    graphs = {**current.graphs, task.graph: graph}
    added = tuple(file for file in base.weights if file not in current.base.weights)
    return msgspec.structs.replace(
        current,
        base=msgspec.structs.replace(current.base, weights=(*current.base.weights, *added)),
        graphs={digest: graphs[digest] for digest in sorted({task.graph for task in tasks.values()})},
        tasks=tasks,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {tool: metadata.version(tool) for tool in TOOLS}
