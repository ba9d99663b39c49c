"""A task's engine beside the unadapted base's: the same layers, the same tactics?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from engines.backends import Backend, BackendName, Inspectable, Model, backend
from engines.backends.tensorrt.layers import LayerDifference, layer_differences, layers_of
from engines.serving.load import plan_of
from exporter.bundle.task_part import TaskPart


@dataclass(frozen=True)
class Compared:
    """How many layers the task's engine has, where the base's differs from it, and the bytes of both plans."""

    layers: int
    differences: tuple[LayerDifference, ...]
    size: int
    base_size: int

    @property
    def equal(self) -> bool:
        """Whether nothing but weights differs."""
        return not self.differences and self.size == self.base_size


def compared(part: TaskPart, name: BackendName) -> Compared:
    """Hold the task's own engine against the unadapted one of its graph, by TensorRT's inspector.

    Raises EngineError when one of them was not built or can't be used, NoDeviceError without a device.
    """
    chosen = backend(name)
    bases, ours = (plan_of(part, name, chosen, adapted) for adapted in (False, True))
    said = _layers(part, chosen, ours)
    return Compared(
        len(layers_of(said)),
        tuple(layer_differences(said, _layers(part, chosen, bases))),
        ours.stat().st_size,
        bases.stat().st_size,
    )


def _layers(part: TaskPart, chosen: Backend, plan: Path) -> str:
    with chosen.load(Model(b"", part.bundle.path), plan) as session:
        return cast("Inspectable", session).layers()  # of the backends only TensorRT's have engines
