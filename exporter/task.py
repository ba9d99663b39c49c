"""Exporting a task: an adapter over a base becomes a graph and the tensors that differ, in a bundle.

The base is traced once per distinct head. A further task with a known head needs neither torch nor the checkpoint's
loader: its graph is an existing task's, pointed at its own tensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import numpy as np
import onnx

from exporter.base import base_weights, check_config, head_of, input_limits, model_inputs, skeleton
from exporter.bundle.manifest import SCHEMA, Base, Bundle, File, Graph, Head, Manifest, Port, Task, check_task_name
from exporter.bundle.staging import commit, current_bundle, describe, named_by_content, staging
from exporter.digest import graph_digest
from exporter.external import load_graph, pointed
from exporter.layout import ModelWeights, key, to_graph
from lora.adapter import Adapter
from lora.bases.checkpoint import fingerprint
from lora.errors import BundleError, ExportError
from lora.fit import changes_by_parameter
from lora.formats.peft import read_peft
from lora.merge import check_base, merge
from lora.tensorfile import Array, Lazy, TensorFile, write_tensors

SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
TOOLS = ("lorafuse", "onnx")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What to export: folders of the base and the adapter, the task's name, its class labels (may be empty)."""

    base: Path
    adapter: Path
    task: str
    labels: tuple[str, ...] = ()


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
class _Dense:
    """The dense graph for a head, and the files that hold the base's weights for it."""

    graph: Graph
    proto: onnx.ModelProto
    weights: tuple[TensorFile, ...]
    added: tuple[File, ...]
    traced: bool


def export_task(request: Request, out: Path, progress: Progress = lambda step: None) -> Exported:
    """Merge ``request.adapter`` into ``request.base`` and write the task into the bundle ``out``, created if need be.

    A task of the same name is replaced. Raises a LorafuseError, and leaves the bundle as it was, when the adapter can't
    be read or does not fit, the bundle holds another base, the labels do not match the head, or the disk is full.
    """
    check_task_name(request.task)
    progress("reading the adapter")
    adapter = read_peft(request.adapter)
    head = head_of(adapter)
    labels = _labels(request, head)
    base_sha256 = fingerprint(request.base)
    check_base(adapter, base_sha256)
    existing = current_bundle(out)
    _check_same_base(existing, base_sha256)
    with staging(out) as stage:
        dense = _known_dense(existing, head) or _traced_dense(request, head, adapter, existing, stage, progress)
        progress("merging")
        changed = _merged(dense, adapter)
        model, weights = _write_task(stage, request.task, dense, changed)
        task = Task(
            graph=graph_digest(dense.proto),
            model=model,
            weights=weights,
            adapter=_copy_adapter(stage, request.task, adapter),
            adapter_sha256=adapter.sha256,
            labels=labels,
        )
        base = _staged_base(stage, request.base, base_sha256, existing, dense)
        progress("writing the bundle")
        bundle = commit(out, stage, lambda current: _with_task(current, base, request.task, task, dense.graph))
    return Exported(
        bundle=bundle,
        task=request.task,
        traced=dense.traced,
        base_bytes=sum(file.size for file in dense.added),
        graph_bytes=model.size,
        changed_bytes=weights.size,
        adapter_bytes=sum(file.size for file in task.adapter),
        changed=tuple(sorted(changed)),
    )


def _labels(request: Request, head: Head) -> tuple[str, ...]:
    if not request.labels:
        return () if head.outputs == 1 else tuple(f"LABEL_{index}" for index in range(head.outputs))
    if len(request.labels) != head.outputs:
        raise ExportError(f"{request.adapter}: the head has {head.outputs} outputs, but {len(request.labels)} labels were given; give one per output")
    return request.labels


def _check_same_base(existing: Bundle | None, base_sha256: str) -> None:
    if existing is not None and existing.manifest.base.sha256 != base_sha256:
        held = existing.manifest.base.sha256
        raise BundleError(f"{existing.path}: holds tasks of the base {held[:12]}…, but this base is {base_sha256[:12]}…; use a bundle of its own")


def _known_dense(existing: Bundle | None, head: Head) -> _Dense | None:
    """The dense graph of a task in the bundle that has the same head; none where a new trace must replace a damaged file."""
    weights = _held_weights(existing) if existing else ()
    if existing is None or len(weights) < len(existing.manifest.base.weights):
        return None
    for task in existing.manifest.tasks.values():
        graph = existing.graph(task)
        if graph.head == head:
            with suppress(BundleError):
                return _Dense(graph, load_graph(existing.checked(task.model)), weights, added=(), traced=False)
    return None


def _traced_dense(request: Request, head: Head, adapter: Adapter, existing: Bundle | None, stage: Path, progress: Progress) -> _Dense:
    """Trace the base with ``head``, and stage those of its weights that the bundle does not hold yet."""
    check_config(request.base)
    progress("tracing the base model (once for this head)")
    graph, proto = _trace(request.base, head)
    progress("writing the base's weights")
    values = base_weights(request.base, head, adapter.replaced)
    held = _held_weights(existing) if existing else ()
    absent = {key(name, order): _lazy(values[name], order) for name, order in graph.weights.items() if name in values}
    for file in held:
        absent = {name: tensor for name, tensor in absent.items() if name not in file}
    if not absent:
        return _Dense(graph, proto, held, added=(), traced=True)
    write_tensors(stage / "base.safetensors", absent)
    added = named_by_content(stage / "base.safetensors", "base")
    return _Dense(graph, proto, (*held, TensorFile(stage / added.path)), added=(added,), traced=True)


def _held_weights(bundle: Bundle) -> tuple[TensorFile, ...]:
    """The files of the base's weights, without damaged ones: an export writes those again."""
    held = []
    for file in bundle.manifest.base.weights:
        with suppress(BundleError):
            held.append(TensorFile(bundle.checked(file)))
    return tuple(held)


def _trace(base: Path, head: Head) -> tuple[Graph, onnx.ModelProto]:
    import torch

    from exporter.trace import trace

    # Distinct sizes above 1, so that no axis can be taken for a constant or for another.
    inputs = {name: torch.ones(2, 16, dtype=torch.long) for name in model_inputs(base)}
    traced = trace(skeleton(base, head), inputs, ("logits",), {0: "batch", 1: "sequence"})
    ports = [tuple(_port(value) for value in values) for values in (traced.graph.graph.input, traced.graph.graph.output)]
    return Graph(head=head, inputs=ports[0], outputs=ports[1], weights=traced.weights), traced.graph


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return Port(name=value.name, dtype=dtype, shape=tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))


def _lazy(values: Array, order: tuple[int, ...] | None) -> Lazy:
    shape = values.shape if order is None else tuple(values.shape[axis] for axis in order)
    return Lazy(values.dtype, shape, lambda: to_graph(values, order))


def _merged(dense: _Dense, adapter: Adapter) -> dict[str, Array]:
    """The task's changed tensors by parameter name; each has a place in the graph."""
    base = ModelWeights(dense.weights, dense.graph.weights)
    changed = {merged.parameter: merged.stored for merged in merge(base, changes_by_parameter(base, adapter), adapter.path)}
    unused = sorted(changed.keys() - dense.graph.weights.keys())
    if unused:
        raise ExportError(f"{adapter.path}: tensor '{unused[0]}' has no place in the graph; the adapter was trained on another model")
    return changed


def _write_task(stage: Path, name: str, dense: _Dense, changed: Mapping[str, Array]) -> tuple[File, File]:
    """Stage the task's tensors and its graph, which points at them and at the base's."""
    dtypes = {tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) for tensor in dense.proto.graph.initializer}
    weight_map = dense.graph.weights
    lazy = {key(parameter, weight_map[parameter]): _lazy(values.astype(dtypes[parameter]), weight_map[parameter]) for parameter, values in changed.items()}
    write_tensors(stage / "task.safetensors", lazy)
    weights = named_by_content(stage / "task.safetensors", name)
    proto = pointed(dense.proto, weight_map, (*dense.weights, TensorFile(stage / weights.path)))
    (stage / "task.onnx").write_bytes(proto.SerializeToString(deterministic=True))
    return named_by_content(stage / "task.onnx", name), weights


def _copy_adapter(stage: Path, task: str, adapter: Adapter) -> tuple[File, ...]:
    """Keep the adapter beside what was made of it: a bundle can be verified against its formula without other files."""
    folder = f"adapters/{task}-{adapter.sha256[:8]}"
    (stage / folder).mkdir(parents=True)
    for file in adapter.files:
        shutil.copyfile(file, stage / folder / file.name)
    return tuple(describe(stage, f"{folder}/{file.name}") for file in adapter.files)


def _staged_base(stage: Path, folder: Path, sha256: str, existing: Bundle | None, dense: _Dense) -> Base:
    if existing is not None:
        return msgspec.structs.replace(existing.manifest.base, weights=(*existing.manifest.base.weights, *dense.added))
    (stage / "base").mkdir()
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, stage / "base" / name)
    longest, vocabulary = input_limits(folder)
    files = tuple(describe(stage, f"base/{name}") for name in names)
    return Base(sha256=sha256, longest=longest, vocabulary=vocabulary, weights=dense.added, files=files)


def _with_task(current: Manifest | None, base: Base, name: str, task: Task, graph: Graph) -> Manifest:
    """The current manifest with the task added: what another export has added meanwhile stays."""
    if current is None:
        return Manifest(schema=SCHEMA, base=base, graphs={task.graph: graph}, tasks={name: task}, versions=_versions())
    if current.base.sha256 != base.sha256:
        raise BundleError(f"task '{name}': another export has made this bundle for another base meanwhile; use a bundle of its own")
    former = current.tasks.get(name)
    if former is not None and former.model == task.model:
        task = msgspec.structs.replace(task, engines=former.engines)
    tasks = dict(sorted({**current.tasks, name: task}.items()))
    graphs = {**current.graphs, task.graph: graph}
    added = tuple(file for file in base.weights if file not in current.base.weights)
    return Manifest(
        schema=SCHEMA,
        base=msgspec.structs.replace(current.base, weights=(*current.base.weights, *added)),
        graphs={digest: graphs[digest] for digest in sorted({task.graph for task in tasks.values()})},
        tasks=tasks,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {tool: metadata.version(tool) for tool in TOOLS}
