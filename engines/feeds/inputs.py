"""A graph's inputs where no text gives them: the sizes of its axes, and arrays of those sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exporter.bundle.records import Graph, Port
from lora.files.tensorfile import Array, numpy_dtype

CACHED = "past_key_values."  # what the inputs of a decoder's cache are called

Sizes = Mapping[str, int]


def sizes(batch: int, length: int, past: int = 0) -> dict[str, int]:
    """The size of every axis that an exported graph may name.

    A row has ``length`` tokens, after ``past`` tokens in a decoder's cache.
    """
    return {
        "batch": batch,
        "sequence": length,
        "past_sequence": past,
        "total_sequence": past + length,
        "decoder_sequence": length,
    }


def takes_tokens(graph: Graph) -> bool:
    """Whether the graph takes token ids, and so has a sequence whose length the caller chooses."""
    return any(port.name == "input_ids" for port in graph.inputs)


def random_inputs(graph: Graph, vocabulary: int, axes: Sizes, seed: int) -> dict[str, Array]:
    """Inputs of the given sizes: random ids, pixels and cache, a mask of ones, types of zero.

    Times do not depend on them.
    """
    random = np.random.default_rng(seed)
    inputs = {}
    for port in graph.inputs:
        inputs[port.name] = _values(port.name, port.dtype, _shape(port, axes), vocabulary, axes, random).astype(
            numpy_dtype(port.dtype)
        )
    return inputs


def empty_cache(graph: Graph, rows: int) -> dict[str, Array]:
    """A decoder's key-value cache before the first token: arrays of length 0 in the graph's dtype.

    Other graphs have none.
    """
    axes = sizes(rows, length=0)
    return {
        port.name: np.zeros(_shape(port, axes), numpy_dtype(port.dtype))
        for port in graph.inputs
        if port.name.startswith(CACHED)
    }


def _shape(port: Port, axes: Sizes) -> tuple[int, ...]:
    return tuple(axes[axis] if isinstance(axis, str) else axis for axis in port.shape)


def _values(
    name: str, dtype: str, shape: tuple[int, ...], vocabulary: int, axes: Sizes, random: np.random.Generator
) -> Array:
    if name.endswith("input_ids"):
        return random.integers(0, vocabulary, shape)
    if name == "attention_mask":
        return np.ones(shape)
    if name == "position_ids":
        past = axes.get("past_sequence", 0)
        return np.broadcast_to(np.arange(past, past + shape[-1]), shape)
    return random.normal(size=shape) if "float" in dtype else np.zeros(shape)
