"""From a bundle of schema 3 to one of schema 4, without the base: nothing that was exported is lost.

Only the manifest is written anew, and its replacement is the one step that makes the change: a run that is killed
leaves the bundle as it was. What schema 3 did not hold is read from what it names: shapes and dtypes of weights from
the tasks' graphs, and whether the base ties its embeddings from the tasks' adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from exporter.base_graph import weight_map
from exporter.bundle.manifest import Bundle
from exporter.bundle.manifest_file import MANIFEST, UPGRADED, check_manifest
from exporter.bundle.records import MODEL, SCHEMA, Base, Engine, File, Graph, Head, Manifest, Part, Port, Store, Task
from exporter.bundle.staging import replace_manifest
from exporter.bundle.task_types import task_type
from exporter.graph.external_data import parsed_file
from exporter.heads import head_of
from lora.bases.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDING
from lora.errors import BundleError
from lora.formats.peft import read_peft
from lora.wording import printable


class _Graph3(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    head: Head
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weights: dict[str, tuple[int, ...] | None]
    engines: dict[str, Engine] = {}


class _Task3(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    graph: str
    model: File
    weights: File | None
    store: Store
    adapter: tuple[File, ...]
    adapter_sha256: str
    labels: tuple[str, ...]
    engines: dict[str, Engine] = {}


class _Manifest3(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: int
    base: Base
    graphs: dict[str, _Graph3]
    tasks: dict[str, _Task3]
    versions: dict[str, str]
    timing_caches: dict[str, File] = {}


def upgrade(path: Path) -> Bundle:
    """Upgrade the bundle in ``path``.

    Raises BundleError, and leaves it as it was, when it is not of schema 3, or a graph or an adapter is damaged.
    """
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}); create one with 'lorafuse export'")
    return replace_manifest(path, lambda content: _upgraded(path, content))


def _upgraded(path: Path, content: bytes) -> Manifest:
    former = _read(path / MANIFEST, content)
    tasks = {name: _task(task) for name, task in former.tasks.items()}
    plain = Manifest(SCHEMA, former.base, {}, tasks, former.versions, former.timing_caches)
    bundle = Bundle(path, plain)
    graphs = {digest: _graph(bundle, former, digest) for digest in former.graphs}
    base = msgspec.structs.replace(former.base, tied=_tied(path, former))
    manifest = msgspec.structs.replace(plain, graphs=graphs, base=base)
    check_manifest(path / MANIFEST, manifest)
    return manifest


def _read(path: Path, content: bytes) -> _Manifest3:
    try:
        schema = msgspec.json.decode(content, type=dict[str, Any]).get("schema")
        if schema != UPGRADED:
            what = "nothing to upgrade" if schema == SCHEMA else f"expected schema {UPGRADED}; export the tasks again"
            raise BundleError(f"{path}: schema {schema}: {what}")
        return msgspec.json.decode(content, type=_Manifest3)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path}: not a bundle's manifest ({printable(' '.join(str(error).split()))}); export the tasks again"
        ) from error


def _task(task: _Task3) -> Task:
    part = Part(task.graph, task.model, task.weights, _engines(task.engines))
    return Task({MODEL: part}, task.store, task.adapter, task.adapter_sha256, task.labels)


def _engines(engines: Mapping[str, Engine]) -> tuple[Engine, ...]:
    return tuple(engine for _, engine in sorted(engines.items()))


def _graph(bundle: Bundle, former: _Manifest3, digest: str) -> Graph:
    graph = former.graphs[digest]
    models = [task.model for task in former.tasks.values() if task.graph == digest]
    if not models:
        raise BundleError(f"{bundle.path / MANIFEST}: no task has the graph {digest[:12]!r}…; export the tasks again")
    weights = weight_map(parsed_file(bundle.path / models[0].path, bundle.content(models[0])), graph.weights)
    if absent := sorted(graph.weights.keys() - weights.keys()):
        raise BundleError(
            f"{bundle.path / models[0].path}: has no weight {absent[0]!r}, which the manifest names; export the task"
            " again"
        )
    return Graph(MODEL, graph.head, graph.inputs, graph.outputs, weights, _engines(graph.engines))


def _tied(path: Path, former: _Manifest3) -> tuple[tuple[str, ...], ...]:
    """The embeddings that the base ties: none where a task has them apart whose adapter leaves them tied."""
    embeddings: set[str] = set()
    for task, graph in _language_models(former):
        if not graph.head.tied and _leaves_tied(path, task, graph):
            return ()
        embeddings.update(name for name in graph.weights if name.endswith(INPUT_EMBEDDINGS))
    output = _output_embedding(former)
    return tuple((name, output) for name in sorted(embeddings))


def _language_models(former: _Manifest3) -> Iterator[tuple[_Task3, _Graph3]]:
    for task in former.tasks.values():
        graph = former.graphs.get(task.graph)
        if graph is not None and task_type(graph.head.task_type).models_language:
            yield task, graph


def _leaves_tied(path: Path, task: _Task3, graph: _Graph3) -> bool:
    """Whether the task's adapter, by itself, leaves the embeddings one tensor."""
    if not task.adapter:
        return True
    adapter = read_peft((path / task.adapter[0].path).parent)
    return head_of(adapter, path / "base", graph.head.task_type).tied


def _output_embedding(former: _Manifest3) -> str:
    """Its name, where a graph has it apart; tied, it bears the input's."""
    names = [name for graph in former.graphs.values() for name in graph.weights if name.endswith(OUTPUT_EMBEDDING)]
    return names[0] if names else OUTPUT_EMBEDDING
