"""The bundle: one base, many tasks, in a folder that stock ONNX runtimes read. This is the format, for readers.

    manifest.json                      what is here, with a SHA-256 for every file
    base-<hash>.safetensors            the base's weights, once, in the graphs' layout
    base/config.json, tokenizer.json   what rebuilds the torch model and turns text into tokens
    base/structure-<hash>.json         what each parameter is; older bundles, and modules', have none
    <task>-<hash>.onnx                 a task's graph; weights are external data in the two safetensors files
    <task>-<hash>.safetensors          the tensors that the task changes
    base-<hash>.onnx                   an unadapted graph, shared by tasks that leave it alone or are merged at load
    adapters/<task>-<hash>/            the adapters that the task was merged from, and their recipe
    engines/                           built engines and the timing caches of their builds

A model of several parts (two towers, an encoder and a decoder) has a graph and a weights file for each:
``<task>-<part>-<hash>.onnx``. Graphs and weights lie in one folder because ONNX external data may not leave its model's
folder or follow a link. Names carry a hash of the content, so that replacing a task never overwrites a file that the
current manifest names. Standard library and msgspec only: an embedding process reads bundles through this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from exporter.bundle.task_types import task_type

SCHEMA = 4
MODEL = "model"  # the part of a model that has one
Precision = Literal["float32", "float16", "bfloat16"]
Store = Literal["dense", "factors"]
Mode = Literal["rebuild", "refit", "stripped"]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the bundle: its path relative to the bundle, size in bytes and SHA-256 in hex."""

    path: str
    size: int
    sha256: str


class Port(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph; a dimension is a size or the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What distinguishes one dense graph over a base from another: the task type and the number of outputs.

    ``tied`` says that a language model's output embedding, where the base ties it to the input's, still is.
    """

    task_type: str
    outputs: int
    tied: bool = True

    @property
    def classifies(self) -> bool:
        """Whether the outputs are classes, or the one value of a regression."""
        return task_type(self.task_type).classifies


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A built engine: of which backend and version, for which target, from which graph and weights.

    ``model_sha256`` is that of the ONNX model it was built from (an engine that tasks share: the graph's digest), and
    ``weights_sha256`` that of the weights in it. ``mode`` says whether its weights can be exchanged, and ``refittable``
    which. ``proven`` holds {task: weights_sha256} of those whose outputs, refitted, equalled those of an engine that
    was built from them.
    """

    backend: str
    version: str
    target: str
    model_sha256: str
    weights_sha256: str
    file: File | None = None
    mode: Mode = "rebuild"
    refittable: tuple[str, ...] = ()
    proven: dict[str, str] = {}


class Quantized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a weight is stored in integers: of which type, and a scale for each ``block`` of elements along ``axis``."""

    type: Literal["int4", "int8"] = msgspec.field(name="as")
    block: int
    axis: int


class Weight(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight of a graph, as its initializer is read: the shape, the dtype, and how its file stores it.

    ``order`` is the axis order in which the graph stores the model's parameter (None: as the model has it).
    """

    order: tuple[int, ...] | None
    shape: tuple[int, ...]
    dtype: str
    stored: Literal["plain"] | Quantized = "plain"


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dense graph of a part of the model, shared by every task with the same head.

    ``weights`` is the weight map: each parameter's name, which is its initializer's too. ``engines`` are those of the
    unadapted graph, which tasks share by refitting where their mode allows; of a backend, one for each target.
    """

    part: str
    head: Head
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: dict[str, Weight]
    engines: tuple[Engine, ...] = ()


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a task has of a part of the model: the digest of its graph, its model and weights, and its engines.

    ``weights`` holds the merged tensors, or of a task stored as factors those that the adapter brings whole; None where
    there are none.
    """

    graph: str
    model: File
    weights: File | None = None
    engines: tuple[Engine, ...] = ()

    @property
    def own_weights(self) -> tuple[File, ...]:
        """The file of the task's own tensors; none where it has none."""
        return (self.weights,) if self.weights else ()


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task: its parts by their roles, the adapter that it was made of, and its class labels (none for a regression).

    ``store`` says whether the changed tensors are in the parts' ``weights``, merged, or are merged from ``adapter``
    whenever the task is loaded.
    """

    parts: dict[str, Part]
    store: Store
    adapter: tuple[File, ...]
    adapter_sha256: str
    labels: tuple[str, ...]

    @property
    def merges_at_load(self) -> bool:
        """Whether loading the task has to merge its adapter."""
        return self.store == "factors" and bool(self.adapter)


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base: the fingerprint of the checkpoint, its weights in the graphs' layout, and its side files.

    ``longest`` is the longest sequence it takes, in tokens, and ``vocabulary`` the number of its token ids.
    ``precision`` is the dtype of the graphs' weights and products. ``tied`` are groups of parameters that are one
    tensor in the base; ``structure`` is the file that says what each parameter is.
    """

    sha256: str
    precision: Precision
    longest: int
    vocabulary: int
    weights: tuple[File, ...]
    files: tuple[File, ...]
    tied: tuple[tuple[str, ...], ...] = ()
    structure: File | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole bundle. ``timing_caches`` are TensorRT's, by what they hold for: flavour, version and device."""

    schema: int
    base: Base
    graphs: dict[str, Graph]
    tasks: dict[str, Task]
    versions: dict[str, str]
    timing_caches: dict[str, File] = {}


def task_files(task: Task) -> Iterator[File]:
    """Every file that belongs to ``task`` alone, or that it shares with tasks that leave a part alone."""
    for part in task.parts.values():
        yield from (part.model, *part.own_weights)
        yield from plans(part.engines)
    yield from task.adapter


def plans(engines: Iterable[Engine]) -> Iterator[File]:
    """The files of the engines that have one."""
    yield from (engine.file for engine in engines if engine.file is not None)


def all_files(manifest: Manifest) -> Iterator[File]:
    """Every file that the manifest names."""
    base = manifest.base
    yield from (*base.weights, *base.files, *manifest.timing_caches.values())
    if base.structure is not None:
        yield base.structure
    for graph in manifest.graphs.values():
        yield from plans(graph.engines)
    for task in manifest.tasks.values():
        yield from task_files(task)


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes: the same manifest gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"
