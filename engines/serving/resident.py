"""The resident form of a graph: one session for all its tasks, each of which hands over its tensors with every run."""

from __future__ import annotations

from collections.abc import Iterable

from engines.backends import Model, Weights
from engines.serving.load import weights_of
from engines.serving.overridable import overridable
from engines.serving.task_values import task_values
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import TaskPart, task_part
from lora.errors import LorafuseError


def exchanged_names(bundle: Bundle, digest: str) -> frozenset[str]:
    """What any task of the graph changes: with every run the session is given all of it.

    A task that is damaged harms no other; who asks for it is told.
    """
    return frozenset[str]().union(*(_changed_if_sound(part) for part in _parts_of(bundle, digest)))


def resident_model(part: TaskPart, exchanged: Iterable[str]) -> Model:
    """The graph on the base's weights, with what tasks exchange as inputs."""
    values = task_values(part, exchanged, adapted=False)
    weights = weights_of(part, part.model_graph)
    tensors = {**weights.tensors, **values}
    return Model(overridable(part.model, values), part.bundle.path, weights=Weights(tensors, weights.files))


def _parts_of(bundle: Bundle, digest: str) -> Iterable[TaskPart]:
    for name, task in bundle.manifest.tasks.items():
        for role, part in task.parts.items():
            if part.graph == digest:
                yield task_part(bundle, name, role)


def _changed_if_sound(part: TaskPart) -> frozenset[str]:
    try:
        return part.changed_names
    except LorafuseError:
        return frozenset()
