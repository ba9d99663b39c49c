"""The two axis orders of a weight: the model's own, and the one the graph reads it in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np

from lora.files.tensorfile import Array, TensorFile

WeightMap = Mapping[str, tuple[int, ...] | None]
Shapes = Mapping[str, tuple[int, ...]]


def key(name: str, order: tuple[int, ...] | None) -> str:
    """The name under which a weights file keeps a parameter: it says the axis order, so that two orders never mix."""
    return name if order is None else f"{name}@{','.join(map(str, order))}"


def to_graph(values: Array, order: tuple[int, ...] | None) -> Array:
    """From the model's axis order to the graph's, contiguous."""
    return np.ascontiguousarray(values if order is None else values.transpose(order))


def to_model(values: Array, order: tuple[int, ...] | None) -> Array:
    """From the graph's axis order to the model's; a view."""
    return values if order is None else values.transpose(np.argsort(order))


class ModelWeights(Mapping[str, Array]):
    """Weights kept in the graph's order, seen under their parameters' names and in the model's order.

    A file later in ``files`` wins over an earlier one: a task's over the base's. A tensor of another shape than
    ``shapes``, by key and in the graph's order, is another graph's (a head's) and left out.
    """

    def __init__(self, files: Iterable[TensorFile], weights: WeightMap, shapes: Shapes = MappingProxyType({})) -> None:
        self._weights = weights
        home = {
            stored: file
            for file in files
            for stored in file
            if file.shape(stored) == shapes.get(stored, file.shape(stored))
        }
        self._home = {name: home[key(name, order)] for name, order in weights.items() if key(name, order) in home}

    def __getitem__(self, name: str) -> Array:
        order = self._weights[name]
        return to_model(self._home[name][key(name, order)], order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)
