"""The torch model that a bundle's graph came from, run on any weights: the reference that engines are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from exporter.arms import bundled_changes
from exporter.base import skeleton
from exporter.bundle.manifest import Bundle
from exporter.layout import ModelWeights
from lora.merge import apply
from lora.tensorfile import Array, TensorFile

Inputs = Mapping[str, Array]
Runner = Callable[[Inputs], Array]


def base_values(bundle: Bundle, task: str) -> dict[str, Array]:
    """The unadapted weights by parameter name; what the base does not have (a trained head) is the task's."""
    return {**merged_values(bundle, task), **_stored(bundle, task, of_base=True)}


def merged_values(bundle: Bundle, task: str) -> dict[str, Array]:
    """The weights as the bundle stores them for ``task``, by parameter name."""
    return {**_stored(bundle, task, of_base=True), **_stored(bundle, task, of_base=False)}


def exact_values(bundle: Bundle, task: str) -> dict[str, Array]:
    """The weights as the formula has them, in float64, from the base and the adapter."""
    values = {name: np.asarray(values, np.float64) for name, values in base_values(bundle, task).items()}
    return values | {name: apply(changes, values[name], np.float64) for name, changes in bundled_changes(bundle, task).items()}


def torch_runner(bundle: Bundle, task: str, values: Mapping[str, Array]) -> Runner:
    """The first output of the torch model on ``values``, computed in their dtype."""
    import torch

    model = skeleton(bundle.path / "base", bundle.graph(bundle.task(task)).head)
    state = {name: torch.from_numpy(np.array(array)) for name, array in values.items()}
    model = model.to(next(iter(state.values())).dtype)
    tied = set(model.load_state_dict(state, strict=False).missing_keys) - dict(model.named_buffers()).keys()
    assert all(_shares_storage(model, name, state) for name in tied), f"the graph lacks weights of the model: {sorted(tied)}"

    def run(inputs: Inputs) -> Array:
        with torch.no_grad():
            output: Array = model(**{name: torch.from_numpy(values) for name, values in inputs.items()})[0].numpy()
        return output

    return run


def _shares_storage(model: object, name: str, state: Mapping[str, object]) -> bool:
    """Whether the parameter is another name of one that was loaded."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # type: ignore[attr-defined]
    return any(parameters[name] is parameters[other] for other in state if other in parameters)


def _stored(bundle: Bundle, task: str, of_base: bool) -> ModelWeights:
    record = bundle.task(task)
    files = bundle.manifest.base.weights if of_base else (record.weights,)
    return ModelWeights([TensorFile(bundle.checked(file)) for file in files], bundle.graph(record).weights)
