"""The two axis orders of a weight: the model's own, and the one the graph reads it in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from exporter.bundle.records import Weight
from lora.files.tensorfile import Array, TensorFile

Order = tuple[int, ...] | None
WeightMap = Mapping[str, Weight]


def key(name: str, order: Order) -> str:
    """The name under which a weights file keeps a parameter: it says the axis order, so that two orders never mix."""
    return name if order is None else f"{name}@{','.join(map(str, order))}"


def to_graph(values: Array, order: Order) -> Array:
    """From the model's axis order to the graph's, contiguous."""
    return np.ascontiguousarray(values if order is None else values.transpose(order))


def to_model(values: Array, order: Order) -> Array:
    """From the graph's axis order to the model's; a view."""
    return values if order is None else values.transpose(np.argsort(order))


def home(name: str, weight: Weight, files: Iterable[TensorFile]) -> TensorFile | None:
    """The last of ``files`` that holds the weight in its shape and dtype."""
    stored, found = key(name, weight.order), None
    for file in files:
        span = file.spans.get(stored)
        if span is not None and (span.shape, span.dtype.name) == (weight.shape, weight.dtype):
            found = file
    return found


class ModelWeights(Mapping[str, Array]):
    """Weights kept in the graph's order, seen under their parameters' names and in the model's order.

    A file later in ``files`` wins over an earlier one: a task's over the base's. A tensor of another shape or dtype
    than the graph's weight belongs to another graph (a head of another size) and is left out.
    """

    def __init__(self, files: Iterable[TensorFile], weights: WeightMap) -> None:
        self._weights = weights
        self._home: dict[str, TensorFile] = {}
        files = tuple(files)
        for name, weight in weights.items():
            found = home(name, weight, files)
            if found is not None:
                self._home[name] = found

    def __getitem__(self, name: str) -> Array:
        file, order = self._home[name], self._weights[name].order
        return to_model(file[key(name, order)], order)

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)
