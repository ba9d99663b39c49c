"""What a task is held against: its model in float64, one layer's weights at a time, by the adapter's formula.

Without the base's checkpoint, the weights and their reading are the bundle's own. The reference of a checkpoint, in
``from_checkpoint``, shares neither with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
OF_THE_BUNDLE = "the bundle's own reading of its base; give --base FOLDER to hold it against the checkpoint"


@dataclass(frozen=True)
class Reference:
    """``words`` say which reference it is. ``exact`` and ``base`` give a parameter of the adapted model, in float64,
    and of the unadapted one; ``adapted`` and ``unadapted`` run these models in float64. ``release`` gives their memory
    back: the reference can't be asked afterwards.
    """

    words: str
    exact: Callable[[str], Array]
    base: Callable[[str], Array]
    adapted: Runner
    unadapted: Runner
    release: Callable[[], None] = lambda: None


def of_bundle(part: TaskPart) -> Reference:
    """The reference that needs nothing but the bundle.

    Raises ExportError where the base was not made by transformers: what made it is not in the bundle.
    """
    base = base_values(part)

    def exact(name: str) -> Array:
        return apply(part.changes[name], base[name], np.float64) if name in part.changes else _wide(base[name])

    return Reference(
        OF_THE_BUNDLE,
        exact,
        base.__getitem__,
        streamed_runner(part, exact),
        streamed_runner(part, lambda name: _wide(base[name])),
    )


def base_values(part: TaskPart) -> dict[str, Array]:
    """The unadapted weights by parameter name; what the base does not have (a trained head) is the task's."""
    return {**part.own, **part.base}


def merged_values(part: TaskPart) -> dict[str, Array]:
    """The weights that the task is run with, by parameter name: as the bundle stores them, or merges them at load."""
    return {**part.base, **part.own, **merged_at_load(part)}


def torch_runner(part: TaskPart, values: Mapping[str, Array]) -> Runner:
    """A runner of the torch model on ``values`` in the bundle's precision, which gives its first output.

    Raises ExportError as ``of_bundle`` does.
    """
    import torch

    from exporter.graph.signature import signature
    from exporter.proof.formula import as_tensor

    absent = sorted(part.graph.weights.keys() - values.keys())
    assert not absent, f"no values for weights of the graph: {absent}"
    model = _model(part)
    held = model.state_dict()
    unknown = sorted(values.keys() - held.keys())
    assert not unknown, f"the graph has weights that the model lacks: {unknown}"
    with torch.no_grad():
        for name, array in values.items():  # one at a time: a second copy of all would double the memory
            held[name].copy_(as_tensor(array))
    return caller(signature(model, part.graph.head, part.role).module)


def streamed_runner(part: TaskPart, value: Callable[[str], Array]) -> Runner:
    """A runner of the torch model in float64, on the values of the graph's weights by their names."""
    from torch import Tensor

    from exporter.graph.signature import signature
    from exporter.proof.formula import as_tensor
    from exporter.proof.streaming import Streamed

    model, weights = _model(part), part.graph.weights
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(as_tensor(value(name)))
    homes: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        if name in weights:
            homes.setdefault(id(parameter), name)
    stored = {name: homes[id(parameter)] for name, parameter in named if id(parameter) in homes}

    def of_graph(names: tuple[str, ...]) -> Tensor | None:
        found = next((stored[name] for name in names if name in stored), None)
        return None if found is None else as_tensor(value(found))

    module = signature(model, part.graph.head, part.role).module
    return caller(module, Streamed(model, of_graph).run)


def caller(module: Any, run: Callable[[Callable[[], Any]], Any] | None = None) -> Runner:
    """Arrays in, the first output as an array out; ``run`` is what the call is run by."""
    import torch

    from exporter.proof.formula import as_tensor

    def called(inputs: Inputs) -> Array:
        given = {name: as_tensor(values) for name, values in inputs.items()}
        with torch.no_grad():
            output: Array = (module(given)[0] if run is None else run(lambda: module(given)[0])).numpy()
        return output

    return called


def _model(part: TaskPart) -> Any:
    bundle, head = part.bundle, part.graph.head
    if head.task_type == MODULE:
        raise ExportError(
            f"{bundle.path}: task '{part.name}' was exported from a Python module, which the bundle can't rebuild;"
            " compare with the module itself"
        )
    return skeleton(bundle.path / "base", head, bundle.manifest.base.precision, part.role)


def _wide(values: Array) -> Array:
    return np.asarray(values, np.float64)
