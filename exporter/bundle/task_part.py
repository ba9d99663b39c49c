"""A part of a task, opened: what is recorded of it, and its tensors, each read and compared with its hash once.

No torch, no onnx: an embedding process loads tasks through this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from exporter.bundle.graph_file import GraphFile, read_graph
from exporter.bundle.layout import ModelWeights, WeightMap
from exporter.bundle.linked import check_claimed, check_homes, check_mapped, linked
from exporter.bundle.manifest import Bundle
from exporter.bundle.recipe import Recipe, read_recipe
from exporter.bundle.records import MODEL, Graph, Part, Task
from exporter.bundle.structure import of_graphs, read_structure, unread
from lora.adapter import Change, Replacement
from lora.errors import BundleError
from lora.files.mapped import Content
from lora.files.tensorfile import Array, TensorFile
from lora.wording import printable


@dataclass(frozen=True)
class TaskPart:
    """A part of a task, with its graph. A model of one part has the role "model".

    Its tensors are opened when they are first asked for. Raises BundleError then where a file is damaged.
    """

    bundle: Bundle
    name: str
    role: str
    task: Task
    part: Part
    graph: Graph

    @cached_property
    def base(self) -> ModelWeights:
        """The base's weights that the graph can read, by parameter name.

        A base's own head is not among them where the task brought one of another size.
        """
        return ModelWeights(self._base_files, self.graph.weights)

    @cached_property
    def own(self) -> ModelWeights:
        """The tensors that the bundle stores for the task, by parameter name."""
        return ModelWeights(self._own_files, self.graph.weights)

    @property
    def own_names(self) -> frozenset[str]:
        """The names in ``own``, from the file's header alone: nothing is hashed, for no value is read."""
        files = [self._claimed(self.bundle.described(file)) for file in self.part.own_weights]
        return frozenset(ModelWeights(files, self.graph.weights))

    @property
    def model_path(self) -> Path:
        """Where the part's ONNX file lies, for messages."""
        return self.bundle.path / self.part.model.path

    @cached_property
    def model(self) -> bytes:
        """The part's ONNX file: the bytes that were compared with its hash."""
        return self.bundle.content(self.part.model)

    @cached_property
    def model_graph(self) -> GraphFile:
        """What the ONNX file has, after it was held against the weight map and the weights files."""
        found, weights = read_graph(self.model_path, self.model), self.graph.weights
        check_mapped(self.model_path, found, weights)
        check_homes(self.model_path, found, weights, (*self._base_files, *self._own_files))
        return found

    def weights_of(self, graph: GraphFile) -> dict[str, Array]:
        """The tensors that a form of the part's graph names, by initializer and in the graph's axis order: the base's,
        and the task's own where the bundle stores them.
        """
        return linked(self.model_path, graph, self.graph.weights, (*self._base_files, *self._own_files))

    @property
    def weights_files(self) -> dict[str, Content]:
        """The bytes of the weights files that a graph may name, by their names beside it."""
        return {file.path.name: file.content for file in (*self._base_files, *self._own_files)}

    @cached_property
    def changes(self) -> dict[str, list[Change]]:
        """{parameter: its changes} of the adapter that the task was made of; none where it is the unadapted base."""
        recipe = self.recipe
        if not recipe.adapters:
            return {}
        base = self.base if len(self.task.parts) == 1 else ModelWeights(self._base_files, self._weights_of_all_parts)
        known = self._weights_of_all_parts
        structure = of_graphs(read_structure(self.bundle), known, base)
        changes = recipe.targets(base, structure)
        for name in changes.keys() - known.keys() - unread(structure, changes, known):
            raise BundleError(
                f"{recipe.name}: changes '{printable(name)}', which has no place in the graph; export the task again"
            )
        return {name: made for name, made in changes.items() if name in self.graph.weights}

    @property
    def merged_at_load(self) -> dict[str, list[Change]]:
        """Of ``changes``, those that are merged whenever the task is loaded; none of a task that is stored dense."""
        if not self.task.merges_at_load:
            return {}
        return {name: changes for name, changes in self.changes.items() if not brought_whole(changes)}

    @property
    def changed_names(self) -> frozenset[str]:
        """The parameters whose values are the task's and not the base's."""
        return self.own_names | self.merged_at_load.keys()

    def weights_sha256(self, adapted: bool = True) -> str:
        """Identifies the weights that an engine was built from: the base's, and for the task those that it adds."""
        base = self.bundle.manifest.base
        added = [*(file.sha256 for file in self.part.own_weights), self.task.adapter_sha256] if adapted else []
        return hashlib.sha256(" ".join([base.sha256, base.precision, *added]).encode()).hexdigest()

    @cached_property
    def _base_files(self) -> tuple[TensorFile, ...]:
        return tuple(self.bundle.tensors(file) for file in self.bundle.manifest.base.weights)

    @cached_property
    def _own_files(self) -> tuple[TensorFile, ...]:
        return tuple(self._claimed(self.bundle.tensors(file)) for file in self.part.own_weights)

    def _claimed(self, file: TensorFile) -> TensorFile:
        check_claimed(file, self.graph.weights)
        return file

    @cached_property
    def recipe(self) -> Recipe:
        """What the task was made of: its adapters, as the bundle keeps them."""
        return read_recipe([self.bundle.mapped(file) for file in self.task.adapter])

    @property
    def _weights_of_all_parts(self) -> WeightMap:
        graphs = [self.bundle.manifest.graphs[part.graph] for part in self.task.parts.values()]
        return {name: weight for graph in graphs for name, weight in graph.weights.items()}


def task_part(bundle: Bundle, task: str, role: str = MODEL) -> TaskPart:
    """A part of a task. Raises BundleError listing the tasks, or the task's parts, that there are."""
    record = bundle.task(task)
    if role not in record.parts:
        parts = ", ".join(sorted(record.parts))
        raise BundleError(f"{bundle.path}: task '{task}' has no part '{role}'; give one of its parts: {parts}")
    part = record.parts[role]
    return TaskPart(bundle, task, role, record, part, bundle.manifest.graphs[part.graph])


def task_parts(bundle: Bundle, task: str) -> tuple[TaskPart, ...]:
    """All parts of a task, in the order of their roles. Raises BundleError when there is no such task."""
    return tuple(task_part(bundle, task, role) for role in sorted(bundle.task(task).parts))


def brought_whole(changes: Sequence[Change]) -> bool:
    """Whether the adapter brings the tensor itself, so that there is nothing to merge."""
    return all(isinstance(change, Replacement) for change in changes)
