"""The torch model that a bundle's graph came from, run on any weights: the reference that engines are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from exporter.bundle.changes import merged_at_load
from exporter.bundle.task_part import TaskPart
from exporter.bundle.task_types import MODULE
from exporter.transformers_base import skeleton
from lora.errors import ExportError
from lora.files.tensorfile import Array
from lora.merging.merge import apply

Inputs = Mapping[str, Array]
Runner = Callable[[Inputs], Array]


def base_values(part: TaskPart) -> dict[str, Array]:
    """The unadapted weights by parameter name; what the base does not have (a trained head) is the task's."""
    return {**part.own, **part.base}


def merged_values(part: TaskPart) -> dict[str, Array]:
    """The weights that the task is run with, by parameter name: as the bundle stores them, or merges them at load."""
    return {**part.base, **part.own, **merged_at_load(part)}


def exact_values(part: TaskPart) -> dict[str, Array]:
    """The weights as the formula has them, in float64, from the base and the adapter."""
    values = {name: np.asarray(values, np.float64) for name, values in base_values(part).items()}
    return values | {name: apply(changes, values[name], np.float64) for name, changes in part.changes.items()}


def torch_runner(part: TaskPart, values: Mapping[str, Array], exact: bool = False) -> Runner:
    """A runner of the torch model on ``values``, which gives its first output.

    It computes in the bundle's precision, or in float64 for ``exact``.

    Raises ExportError where the base was not made by transformers: what made it is not in the bundle.
    """
    import torch

    from exporter.graph.signature import signature

    graph, bundle, head = part.graph, part.bundle, part.graph.head
    absent = sorted(graph.weights.keys() - values.keys())
    assert not absent, f"no values for weights of the graph: {absent}"
    if head.task_type == MODULE:
        raise ExportError(
            f"{bundle.path}: task '{part.name}' was exported from a Python module, which the bundle can't rebuild;"
            " compare with the module itself"
        )
    model = skeleton(bundle.path / "base", head, bundle.manifest.base.precision, part.role)
    model = model.to(torch.float64) if exact else model
    unknown = model.load_state_dict(
        {name: _tensor(array) for name, array in values.items()}, strict=False
    ).unexpected_keys
    assert not unknown, f"the graph has weights that the model lacks: {unknown}"
    module = signature(model, head, part.role).module

    def run(inputs: Inputs) -> Array:
        with torch.no_grad():
            output: Array = module({name: _tensor(values) for name, values in inputs.items()})[0].numpy()
        return output

    return run


def _tensor(values: Array) -> Any:
    """A torch tensor of the same dtype; numpy's bfloat16 comes from ml_dtypes, which torch does not know."""
    import torch

    if values.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(values).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))
