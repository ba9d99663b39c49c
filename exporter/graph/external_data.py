"""ONNX external data: where an initializer's bytes lie, changed without touching the bytes.

Format: https://onnx.ai/onnx/repo-docs/ExternalData.html — file name beside the model, offset and length in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from exporter.bundle.layout import WeightMap, key
from lora.errors import BundleError, ExportError
from lora.files.tensorfile import TensorFile


def parsed(model: bytes) -> onnx.ModelProto:
    """A serialized model's graph; external data stays where it is."""
    return onnx.load_model_from_string(model)


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph alone: external data stays on disk. Raises BundleError when the file is not an ONNX model."""
    return parsed_file(path, path.read_bytes())


def parsed_file(path: Path, content: bytes) -> onnx.ModelProto:
    """As ``load_graph``, of the content that the file has."""
    try:
        return parsed(content)
    except DecodeError as error:
        raise BundleError(f"{path}: not an ONNX model ({error}); export the task again") from error


def pointed(graph: onnx.ModelProto, weights: WeightMap, files: Iterable[TensorFile]) -> onnx.ModelProto:
    """A copy of ``graph`` whose weights lie in ``files``; of two files that hold a weight in its shape, the later wins.

    Raises ExportError naming a weight that no file holds.
    """
    files = list(files)
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            _point(tensor, key(tensor.name, weights[tensor.name].order), files)
    return copy


def _point(tensor: onnx.TensorProto, stored: str, files: list[TensorFile]) -> None:
    homes = [file for file in files if stored in file and file.spans[stored].shape == tuple(tensor.dims)]
    if not homes:
        raise ExportError(
            f"weight '{tensor.name}' of shape {tuple(tensor.dims)} is neither in the base nor in the adapter; export"
            " the task from a checkpoint that has it"
        )
    span = homes[-1].spans[stored]
    del tensor.external_data[:]
    for name, value in (("location", homes[-1].path.name), ("offset", span.offset), ("length", span.length)):
        tensor.external_data.add(key=name, value=str(value))
