"""Exporting a task: an adapter over a base becomes a graph and the tensors that differ, in a bundle.

The base is traced once per distinct head. A further task with a known head needs neither torch nor the checkpoint's
loader: its graph is an existing task's, pointed at its own tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from exporter.base_graph import BaseGraph, held_weights, known_graph, traced_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.manifest_file import check_task_name
from exporter.bundle.recipe import Recipe, ordered
from exporter.bundle.records import MODEL, Base, Head, Precision, Store
from exporter.bundle.staging import current_bundle, describe, staging
from exporter.bundle.structure import of_graphs, read_structure
from exporter.bundle.task_part import brought_whole
from exporter.bundle.task_types import MODULE, task_type
from exporter.dense_base import dense_folder, write_dense
from exporter.heads import embeddings_apart, heads_of
from exporter.source import Source, checkpoint
from exporter.writing import Exported, Graphs, TaskDraft, known_structure, stored_values, weights_of, write_task
from lora.adapter import Adapter
from lora.bases.opening import Base as Opened
from lora.bases.opening import open_base
from lora.errors import BundleError, CheckpointError, ExportError
from lora.formats.read import ReadOptions, read_adapter
from lora.merging.merge import check_base
from lora.merging.several import Blending, Weighted
from lora.progress import Progress, unheard


@dataclass(frozen=True)
class Adapters:
    """Adapters of any format with their weights, how to read what their files leave open, and how to combine them."""

    paths: tuple[tuple[Path, float], ...]
    options: ReadOptions = field(default_factory=ReadOptions)
    blending: Blending = field(default_factory=Blending)


@dataclass(frozen=True)
class Request:
    """What to export: the base, the adapter or several, the task's name, and its class labels.

    Without an adapter, the task is the base as it is; labels may be empty.

    ``task_type`` overrides the adapter's, ``precision`` None is the bundle's, or float32 in a new one. A quantized base
    is exported only with ``dequantize``.
    """

    base: Path
    adapter: Path | Adapters | None
    task: str
    labels: tuple[str, ...] = ()
    task_type: str | None = None
    precision: Precision | None = None
    store: Store = "dense"
    dequantize: bool = False


def export_task(request: Request, out: Path, progress: Progress = unheard) -> Exported:
    """Merge ``request.adapter`` into ``request.base`` and write the task into the bundle ``out``, created if need be.

    A task of the same name is replaced. Raises a LorafuseError, and leaves the bundle as it was, when the adapter can't
    be read or does not fit, the bundle holds another base or precision, the labels do not match the head, or the disk
    is full.
    """
    check_task_name(request.task)
    progress("reading the adapter")
    recipe = recipe_of(request.adapter)
    opened = open_base(request.base, request.dequantize)
    with dense_folder(opened) as folder:
        exported = _exported(request, recipe, opened, folder, out, progress)
    return replace(exported, formula=opened.formula)


def _exported(
    request: Request, recipe: Recipe, opened: Opened, folder: Path, out: Path, progress: Progress
) -> Exported:
    """Export from the dense base in ``folder``, to which the weights of a quantized one are written if need be."""
    adapter = recipe.adapter if recipe.adapters else unadapted(request.base)
    heads = heads_of(adapter, folder, request.task_type, embeddings_apart(opened.tensors))
    existing = current_bundle(out)
    precision = precision_of(existing, request.precision)
    draft = TaskDraft(request.task, recipe, heads, _labels(request.labels, heads, adapter), request.store)
    with ThreadPoolExecutor(1) as pool:  # hashing gigabytes goes on beside whatever follows
        hashing = pool.submit(opened.fingerprint)
        if existing is not None or _records_base(recipe):
            _check_bases(recipe, hashing.result())
            check_same_base(existing, hashing.result())
        known = _known_graphs(existing, heads) if existing else None
        if existing is None or known is None or not _have_values(known, recipe):
            write_dense(opened, folder)
            source = checkpoint(folder, hashing.result, str(request.base))
            return export_traced(source, draft, precision, existing, out, progress)
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
            graphs[role] = traced_graph(source, role, head, precision, draft.recipe, held, stage, progress)
            held = graphs[role].weights
        base = _staged_base(stage, source, precision, existing, draft.heads, graphs)
        return write_task(out, stage, draft, graphs, base, progress)


def add_task(
    bundle: Path,
    adapter: Path | Adapters,
    task: str,
    labels: tuple[str, ...] = (),
    store: Store = "dense",
    progress: Progress = unheard,
) -> Exported:
    """Add a task to a bundle without its base's checkpoint.

    The bundle has the base's weights, and a graph for each head that it knows.

    Raises BundleError when no task has the adapter's head, or the base's weights are damaged, and what ``export_task``
    raises.
    """
    check_task_name(task)
    progress("reading the adapter")
    existing = open_bundle(bundle)
    base = existing.manifest.base
    recipe = recipe_of(adapter)
    read = recipe.adapter
    _check_bases(recipe, base.sha256)
    heads = _module_heads(existing) or heads_of(read, existing.path / "base", apart=not base.tied)
    weights = tuple(existing.described(file) for file in base.weights)
    structure = read_structure(existing)
    graphs = {role: known_graph(existing, role, head, weights, structure) for role, head in heads.items()}
    known = {role: graph for role, graph in graphs.items() if graph is not None}
    if absent := [head for role, head in heads.items() if role not in known]:
        raise BundleError(
            f"{bundle}: no task has a {absent[0].task_type} head of {absent[0].outputs} outputs yet; add the first with"
            " 'lorafuse export', from the base"
        )
    draft = TaskDraft(task, recipe, heads, _labels(labels, heads, read), store)
    with ThreadPoolExecutor(1) as pool, staging(bundle) as stage:
        # While the tensors are merged; waited for before anything is changed.
        checks = [pool.submit(existing.checked, file) for file in base.weights]
        return write_task(bundle, stage, draft, known, base, progress, lambda: [check.result() for check in checks])


def recipe_of(given: Path | Adapters | None) -> Recipe:
    """The adapters, read; none of the unadapted base. Raises AdapterError when one can't be read."""
    if given is None:
        return Recipe(())
    adapters = Adapters(((given, 1.0),)) if isinstance(given, Path) else given
    read = [Weighted(read_adapter(path, adapters.options), weight) for path, weight in adapters.paths]
    return Recipe(ordered(read), adapters.options, adapters.blending)


def unadapted(base: Path) -> Adapter:
    """An adapter that changes nothing, which messages call by its ``base``."""
    return Adapter(base, "none", (), "", ())


def _records_base(recipe: Recipe) -> bool:
    return any(weighted.adapter.base_sha256 is not None for weighted in recipe.adapters)


def _check_bases(recipe: Recipe, base_sha256: str) -> None:
    for weighted in recipe.adapters:
        check_base(weighted.adapter, base_sha256)


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
    try:
        structure = read_structure(existing)
    except (BundleError, CheckpointError):
        return None
    graphs = {role: known_graph(existing, role, head, held, structure) for role, head in heads.items()}
    known = {role: graph for role, graph in graphs.items() if graph is not None}
    return known if len(known) == len(heads) else None


def _have_values(graphs: Graphs, recipe: Recipe) -> bool:
    """Whether every weight has a value.

    A head of the base's own is not in the bundle while all tasks have brought theirs.
    """
    stored = stored_values(graphs)
    weights = weights_of(graphs)
    absent = weights.keys() - stored.keys()
    if not absent:
        return True
    structure = of_graphs(known_structure(graphs), weights, weights)
    changes = recipe.targets(stored, structure)
    return all(name in changes and brought_whole(changes[name]) for name in absent)


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
