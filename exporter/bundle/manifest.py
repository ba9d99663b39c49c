"""The bundle: one base, many tasks, in a folder that stock ONNX runtimes read. This module is the format, for readers.

    manifest.json                      what is here, with a SHA-256 for every file
    base-<hash>.safetensors            the base's weights, once, in the graph's layout
    base/config.json, tokenizer.json   what rebuilds the torch model and turns text into tokens
    <task>-<hash>.onnx                 the task's graph; weights are external data in the two safetensors files
    <task>-<hash>.safetensors          the tensors that the task changes
    base-<hash>.onnx                   the unadapted graph, shared by tasks that are merged when they are loaded
    adapters/<task>-<hash>/            the adapter the task was merged from
    engines/                           built engines and the timing caches of their builds

Graphs and weights lie in one folder because ONNX external data may not leave its model's folder or follow a link.
Names carry a hash of the content, so that replacing a task never overwrites a file that the current manifest names.
Standard library, msgspec and numpy only: an embedding process reads bundles through this module.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import msgspec

from lora.errors import BundleError
from lora.files.tensorfile import file_sha256
from lora.wording import printable

SCHEMA = 3
MANIFEST = "manifest.json"
TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
FOLDERS = ("adapters", "base", "engines")
# Task types (PEFT's names, and one of ours for images) whose outputs are classes, with labels.
CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS")
MODULE = "MODULE"  # a torch module that the caller brought
Precision = Literal["float32", "float16", "bfloat16"]
Store = Literal["dense", "factors"]
Mode = Literal["rebuild", "refit", "stripped"]
RESERVED = frozenset({"manifest", *FOLDERS})
CLOCK_STEP = (
    2 * 10**9
)  # ns: a file that changes twice within a step of its file system's clock may show one time for both


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
    """What distinguishes one dense graph over a base from another: the task type (PEFT's name for it) and the number of
    outputs.

    ``tied`` says that a language model's output embedding, where the base ties it to the input's, still is.
    """

    task_type: str
    outputs: int
    tied: bool = True

    @property
    def classifies(self) -> bool:
        """Whether the outputs are classes, or the one value of a regression."""
        return self.task_type in CLASSIFIERS


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


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dense graph, shared by every task with the same head.

    ``weights`` is the weight map: each parameter's name, which is its initializer's too, with the axis order in which
    the graph stores it (None: as the model has it). ``engines``, by backend, are those of the unadapted model, which
    tasks share by refitting where their mode allows.
    """

    head: Head
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: dict[str, tuple[int, ...] | None]
    engines: dict[str, Engine] = {}


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task: the digest of its graph, its files, its class labels (none for a regression) and its engines by backend.

    ``store`` says whether the changed tensors are in ``weights``, merged, or are merged from ``adapter`` whenever the
    task is loaded; then ``weights`` holds the tensors that the adapter brings whole. It is None where there are none.
    """

    graph: str
    model: File
    weights: File | None
    store: Store
    adapter: tuple[File, ...]
    adapter_sha256: str
    labels: tuple[str, ...]
    engines: dict[str, Engine] = {}

    @property
    def own_weights(self) -> tuple[File, ...]:
        """The file of the task's own tensors; none where it has none."""
        return (self.weights,) if self.weights else ()


class Base(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base: the fingerprint of the checkpoint, its weights in the graph's layout, and its side files.

    ``longest`` is the longest sequence it takes, in tokens, and ``vocabulary`` the number of its token ids.
    ``precision`` is the dtype of the graphs' weights and products.
    """

    sha256: str
    precision: Precision
    longest: int
    vocabulary: int
    weights: tuple[File, ...]
    files: tuple[File, ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole bundle. ``timing_caches`` are TensorRT's, by what they hold for: flavour, version and device."""

    schema: int
    base: Base
    graphs: dict[str, Graph]
    tasks: dict[str, Task]
    versions: dict[str, str]
    timing_caches: dict[str, File] = {}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest.

    ``_seen`` holds the state (inode, size, time of change) of each file whose hash was compared: who goes from task to
    task does not hash a base again that nobody touched. The time is the kernel's, which no program sets.
    """

    path: Path
    manifest: Manifest
    _seen: dict[File, tuple[int, int, int]] = field(default_factory=dict, repr=False, compare=False)

    def task(self, name: str) -> Task:
        """The task of that name. Raises BundleError listing the tasks there are."""
        if name not in self.manifest.tasks:
            known = ", ".join(sorted(self.manifest.tasks)) or "none"
            raise BundleError(f"{self.path}: no task '{name}' in this bundle; it holds: {known}")
        return self.manifest.tasks[name]

    def graph(self, task: Task) -> Graph:
        """The graph that the task shares with those of the same head."""
        return self.manifest.graphs[task.graph]

    def weights_sha256(self, task: Task | None = None) -> str:
        """What an engine's weights are told by: the base's checkpoint and precision, and what the task adds (None:
        nothing).
        """
        base = self.manifest.base
        added = [*(file.sha256 for file in task.own_weights), task.adapter_sha256] if task else []
        return hashlib.sha256(" ".join([base.sha256, base.precision, *added]).encode()).hexdigest()

    def present(self, file: File) -> Path:
        """The file's path, after its size was compared. Raises BundleError when it is missing or of another size."""
        path = self.path / file.path
        with reading(path):
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path}: missing from the bundle; export the task again")
            if path.stat().st_size != file.size:
                raise BundleError(
                    f"{path}: {path.stat().st_size} bytes, but the manifest says {file.size}; export the task again"
                )
        return path

    def checked(self, file: File) -> Path:
        """The file's path, after its size and SHA-256 were compared. Raises BundleError when they differ."""
        path = self.present(file)
        with reading(path):
            found = path.stat()
            state = found.st_ino, found.st_size, found.st_ctime_ns
            if self._seen.get(file) != state:
                settled = time.time_ns() - found.st_ctime_ns > CLOCK_STEP
                check_sha256(path, file, file_sha256(path))
                if settled:
                    self._seen[file] = state
        return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises BundleError where the block can't read ``path``, a file of a bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror}); export the task again") from error


def check_sha256(path: Path, file: File, found: str) -> None:
    """Raises BundleError unless the SHA-256 that was found is the file's."""
    if found != file.sha256:
        raise BundleError(f"{path}: content does not match the manifest's SHA-256; export the task again")


def open_bundle(path: Path) -> Bundle:
    """Open the bundle in ``path``. Raises BundleError when it is not one, is damaged, or is of a newer schema."""
    manifest = path / MANIFEST
    with reading(path):
        found = manifest.is_file()
    if not found:
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}); create one with 'lorafuse export'")
    return Bundle(path, _decode(manifest))


def task_files(task: Task) -> Iterator[File]:
    """Every file that belongs to ``task`` alone."""
    yield from (task.model, *task.own_weights, *task.adapter)
    yield from (engine.file for engine in task.engines.values() if engine.file is not None)


def all_files(manifest: Manifest) -> Iterator[File]:
    """Every file that the manifest names."""
    yield from (*manifest.base.weights, *manifest.base.files, *manifest.timing_caches.values())
    yield from (
        engine.file
        for graph in manifest.graphs.values()
        for engine in graph.engines.values()
        if engine.file is not None
    )
    for task in manifest.tasks.values():
        yield from task_files(task)


def check_task_name(name: str) -> None:
    """Raises BundleError unless ``name`` can stand at the head of a file name."""
    if not TASK_NAME.fullmatch(name) or name in RESERVED:
        raise BundleError(
            f"task name {name!r} can't be used; expected lower-case letters, digits, '_', '.', '-', and none of"
            f" {', '.join(sorted(RESERVED))}"
        )


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes: the same manifest gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


def _decode(path: Path) -> Manifest:
    try:
        content = path.read_bytes()
        schema = msgspec.json.decode(content, type=_Schema).schema
        if schema > SCHEMA:
            raise BundleError(f"{path}: schema {schema} is newer than this program reads ({SCHEMA}); update lorafuse")
        if schema < SCHEMA:
            raise BundleError(
                f"{path}: schema {schema} is of an earlier lorafuse, and this one reads {SCHEMA}; export the tasks"
                " again"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
        _check_graphs(path, manifest)
        _check_references(path, manifest)
        _check_folders(path.parent, manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path}: not a bundle's manifest ({printable(' '.join(str(error).split()))}); export the tasks again"
        ) from error
    return manifest


class _Schema(msgspec.Struct):
    schema: int


def _check_graphs(path: Path, manifest: Manifest) -> None:
    if manifest.base.longest < 0:
        raise BundleError(
            f"{path}: the base's longest is {manifest.base.longest}; expected a number of tokens, or 0 for none; export"
            " the tasks again"
        )
    for digest, graph in manifest.graphs.items():
        if not graph.outputs:
            raise BundleError(f"{path}: the graph {digest[:12]!r}… has no outputs; export its tasks again")
        if not graph.head.task_type.isprintable():
            raise BundleError(
                f"{path}: the graph {digest[:12]!r}… is of the task type {graph.head.task_type!r}, which can't be"
                " printed; export its tasks again"
            )


def _check_references(path: Path, manifest: Manifest) -> None:
    for name, task in manifest.tasks.items():
        check_task_name(name)
        if task.graph not in manifest.graphs:
            raise BundleError(
                f"{path}: task '{name}' names the graph {task.graph[:12]!r}…, which the manifest lacks; export the task"
                " again"
            )
        head = manifest.graphs[task.graph].head
        if task.labels and head.classifies and head.outputs > 1 and len(task.labels) != head.outputs:
            raise BundleError(
                f"{path}: task '{name}' has {len(task.labels)} labels, but its head has {head.outputs} outputs; export"
                " the task again"
            )
    for file in all_files(manifest):
        pure = PurePosixPath(file.path)
        if (
            pure.is_absolute()
            or ".." in pure.parts
            or pure.parts in ((), (MANIFEST,))
            or "\\" in file.path
            or not file.path.isprintable()
        ):
            raise BundleError(
                f"{path}: file path {file.path!r} leaves the bundle, is its manifest or can't be printed; refusing to"
                " follow it"
            )


def _check_folders(bundle: Path, manifest: Manifest) -> None:
    """A folder that is a link would lead the reading, writing and removal of files out of the bundle."""
    named = {parent for file in all_files(manifest) for parent in PurePosixPath(file.path).parents if parent.parts}
    for folder in sorted(named.union(map(PurePosixPath, FOLDERS))):
        if (bundle / folder).is_symlink():
            raise BundleError(f"{bundle / folder}: a link, which may lead out of the bundle; refusing to follow it")
