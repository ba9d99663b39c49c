"""A task that is stored as factors, as a model with dense weights: what a builder needs that knows no merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.bundle.changes import in_graph_order, merged_at_load
from exporter.bundle.layout import key
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import File
from exporter.bundle.task_part import TaskPart
from exporter.graph.external_data import pointed
from exporter.variants.graphs import merged_graph
from lora.files.tensorfile import Array, Lazy, TensorFile, write_tensors


def densified(part: TaskPart, folder: Path) -> bytes:
    """The part's ONNX model, with its external data in ``folder``.

    The merged tensors are written there, and the bundle's files copied.

    Not linked: ONNX refuses external data with several links, and whoever loads the bundle meanwhile would meet that.
    """
    bundle, weights = part.bundle, part.graph.weights
    values = in_graph_order(part, merged_at_load(part))
    stored = (*bundle.manifest.base.weights, *part.part.own_weights)
    files = [_copied(bundle, file, folder) for file in stored]
    merged = folder / "merged.safetensors"
    write_tensors(merged, {key(name, weights[name].order): _lazy(tensor) for name, tensor in values.items()})
    graph = pointed(merged_graph(part), weights, [TensorFile(file) for file in (*files, merged)])
    content: bytes = graph.SerializeToString()
    return content


def _copied(bundle: Bundle, file: File, folder: Path) -> Path:
    """A copy of the very bytes that were compared."""
    path = folder / file.path
    path.write_bytes(bundle.mapped(file).content)
    return path


def _lazy(values: Array) -> Lazy:
    return Lazy(values.dtype, values.shape, lambda: np.asarray(values))
