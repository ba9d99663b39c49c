"""Reading ``manifest.json``: decoded whole, and checked before anything that it names is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NoReturn

import msgspec

from exporter.bundle.records import SCHEMA, Engine, File, Graph, Manifest, Task, all_files
from lora.errors import BundleError
from lora.wording import printable

MANIFEST = "manifest.json"
FOLDERS = ("adapters", "base", "engines")
TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
ROLE = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED = frozenset({"manifest", *FOLDERS})
UPGRADED = 3  # the schema that ``lorafuse bundle upgrade`` reads


class _Schema(msgspec.Struct):
    schema: int


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file ``path``. Raises BundleError when it is damaged, or of another schema than this one."""
    try:
        content = path.read_bytes()
        _check_schema(path, msgspec.json.decode(content, type=_Schema).schema)
        manifest = msgspec.json.decode(content, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path}: not a bundle's manifest ({printable(' '.join(str(error).split()))}); export the tasks again"
        ) from error
    check_manifest(path, manifest)
    return manifest


def check_manifest(path: Path, manifest: Manifest) -> None:
    """Raises BundleError where what the manifest says does not go together, or leads out of the bundle."""
    if manifest.base.longest < 0:
        raise BundleError(
            f"{path}: the base's longest is {manifest.base.longest}; expected a number of tokens, or 0 for none; export"
            " the tasks again"
        )
    for digest, graph in manifest.graphs.items():
        _check_graph(path, digest, graph)
    for name, task in manifest.tasks.items():
        _check_task(path, name, task, manifest.graphs)
    for file in all_files(manifest):
        _check_path(path, file)
    _check_folders(path.parent, manifest)


def check_task_name(name: str) -> None:
    """Raises BundleError unless ``name`` can stand at the head of a file name."""
    if not TASK_NAME.fullmatch(name) or name in RESERVED:
        raise BundleError(
            f"task name {name!r} can't be used; expected lower-case letters, digits, '_', '.', '-', and none of"
            f" {', '.join(sorted(RESERVED))}"
        )


def _check_schema(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise BundleError(f"{path}: schema {schema} is newer than this program reads ({SCHEMA}); update lorafuse")
    if schema == UPGRADED:
        raise BundleError(
            f"{path}: schema {schema} is of an earlier lorafuse, and this one reads {SCHEMA}; run 'lorafuse bundle"
            f" upgrade {path.parent}'"
        )
    if schema < SCHEMA:
        raise BundleError(
            f"{path}: schema {schema} is of an earlier lorafuse, and this one reads {SCHEMA}; export the tasks again"
        )


def _check_graph(path: Path, digest: str, graph: Graph) -> None:
    def refuse(what: str) -> NoReturn:
        raise BundleError(f"{path}: the graph {digest[:12]!r}… {what}; export its tasks again")

    if not ROLE.fullmatch(graph.part):
        refuse(f"is of the part {graph.part!r}, which is no name of a part")
    if not graph.outputs:
        refuse("has no outputs")
    if not graph.head.task_type.isprintable():
        refuse(f"is of the task type {graph.head.task_type!r}, which can't be printed")
    if twice := _double_of(graph.engines):
        refuse(f"has two {printable(twice.backend)} engines for {twice.target!r}")
    for name, weight in graph.weights.items():
        if weight.order is not None and sorted(weight.order) != list(range(len(weight.shape))):
            refuse(f"stores {name!r} in an order of axes that its shape does not have")
        if weight.stored != "plain":
            raise BundleError(
                f"{path}: weight {name!r} is stored as {weight.stored.type}, which this version can't read; update"
                " lorafuse"
            )


def _check_task(path: Path, name: str, task: Task, graphs: dict[str, Graph]) -> None:
    check_task_name(name)
    if not task.parts:
        raise BundleError(f"{path}: task '{name}' has no parts; export the task again")
    for role, part in task.parts.items():
        graph = graphs.get(part.graph)
        if graph is None:
            raise BundleError(
                f"{path}: task '{name}' names the graph {part.graph[:12]!r}…, which the manifest lacks; export the task"
                " again"
            )
        if graph.part != role:
            raise BundleError(
                f"{path}: task '{name}' has as its part {role!r} a graph of the part {graph.part!r}; export the task"
                " again"
            )
        if twice := _double_of(part.engines):
            raise BundleError(
                f"{path}: task '{name}' has two {printable(twice.backend)} engines for {twice.target!r}; export the"
                " task again"
            )
        if task.labels and graph.head.classifies and graph.head.outputs not in (1, len(task.labels)):
            raise BundleError(
                f"{path}: task '{name}' has {len(task.labels)} labels, but its head has {graph.head.outputs} outputs;"
                " export the task again"
            )


def _double_of(engines: Iterable[Engine]) -> Engine | None:
    """An engine whose backend and target another has too; None where each has its own."""
    seen = set[tuple[str, str]]()
    for engine in engines:
        if (engine.backend, engine.target) in seen:
            return engine
        seen.add((engine.backend, engine.target))
    return None


def _check_path(path: Path, file: File) -> None:
    pure = PurePosixPath(file.path)
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in file.path
    if leaves or pure.parts in ((), (MANIFEST,)) or not file.path.isprintable():
        raise BundleError(
            f"{path}: file path {file.path!r} leaves the bundle, is its manifest or can't be printed; refusing to"
            " follow it"
        )


def _check_folders(bundle: Path, manifest: Manifest) -> None:
    """A folder that is a link would lead the reading, writing and removal of files out of the bundle."""
    named = {parent for file in all_files(manifest) for parent in PurePosixPath(file.path).parents if parent.parts}
    for folder in sorted(named.union(map(PurePosixPath, FOLDERS))):
        if _is_link(bundle / folder):
            raise BundleError(f"{bundle / folder}: a link, which may lead out of the bundle; refusing to follow it")


def _is_link(folder: Path) -> bool:
    try:
        return folder.is_symlink()
    except OSError as error:
        raise BundleError(f"{folder}: can't be read ({error.strerror}); export the tasks again") from error
