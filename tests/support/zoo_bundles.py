"""Cases of the zoo as tasks of bundles: exported, verified and run, and held against PEFT's unmerged forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import load
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import Graph
from exporter.bundle.task_part import TaskPart, task_parts
from exporter.proof.from_checkpoint import of_checkpoint
from exporter.proof.verify import Verification, verify
from exporter.task import Exported, Request, export_task
from lora.files.tensorfile import Array
from scripts.support.zoo import Case, output, save_adapter, save_base
from scripts.support.zoo_cases import all_cases

CASES = {case.name: case for case in all_cases()}
TASK = "task"


@dataclass(frozen=True)
class Made:
    """A base and an adapter in a folder, how the model is called, and what it answers with the adapter unmerged."""

    folder: Path
    inputs: Mapping[str, torch.Tensor]
    expected: Array

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def export(self, out: Path | None = None, **more: Any) -> Exported:
        """Into a bundle of its own, or one that has tasks of the same base, whose graph need not be traced again."""
        return export_task(Request(self.base, self.adapter, TASK, **more), out or self.folder / "bundle")

    def feed(self, part: TaskPart) -> dict[str, Array]:
        return feed(part.graph, self.inputs)

    def answers(self, bundle: Bundle) -> dict[str, Array]:
        """What the task answers, by the names of its outputs."""
        (part,) = task_parts(bundle, TASK)
        with load(bundle.path, TASK, threads=1) as session:
            return dict(session.run(self.feed(part)))

    def difference(self, answers: Mapping[str, Array]) -> float:
        """Of the output that has the shape of the model's, of its largest element."""
        found = [values for values in answers.values() if values.shape == self.expected.shape]
        return min(float(np.abs(values - self.expected).max() / np.abs(self.expected).max()) for values in found)

    def verified(self, bundle: Bundle) -> list[Verification]:
        """Each part against the checkpoint."""
        found = []
        for part in task_parts(bundle, TASK):
            with of_checkpoint(part, self.base) as reference:
                found.append(verify(part, [self.feed(part)], {}, reference))
        return found


def make(case: Case, folder: Path) -> Made:
    save_base(case, folder / "base")
    wrapped, _ = save_adapter(case, folder / "base", folder / "adapter")
    inputs = case.inputs(wrapped.base_model.model)
    return Made(folder, inputs, np.asarray(output(wrapped, inputs)))


def feed(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    """The inputs, and what the graph takes beside them: nothing padded, nothing cached."""
    batch, length = next((values.shape for name, values in inputs.items() if name == "input_ids"), (2, 1))
    sizes = {"batch": batch, "sequence": length, "total_sequence": length, "past_sequence": 0}
    made = {}
    for port in graph.inputs:
        shape = [sizes[size] if isinstance(size, str) and port.name not in inputs else size for size in port.shape]
        if port.name in inputs:
            made[port.name] = np.asarray(inputs[port.name])
        elif port.name == "position_ids":
            made[port.name] = np.tile(np.arange(length), (batch, 1))
        else:
            fill = 0 if port.name == "token_type_ids" else 1
            made[port.name] = np.full(shape, fill, port.dtype)
    return made
