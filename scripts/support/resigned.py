"""A bundle as an attacker hands it over: changed, and its sizes and hashes made right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from exporter.bundle.manifest_file import MANIFEST

Record = dict[str, Any]


def manifest_of(bundle: Path) -> Record:
    """The manifest as JSON has it."""
    content: Record = json.loads((bundle / MANIFEST).read_bytes())
    return content


def edit_manifest(bundle: Path, change: Callable[[Record], object]) -> Path:
    """The bundle, after ``change`` was done to its manifest."""
    content = manifest_of(bundle)
    change(content)
    (bundle / MANIFEST).write_text(json.dumps(content))
    return bundle


def replace_content(bundle: Path, path: str, content: bytes) -> Path:
    """The bundle with other content in the file ``path``, which the manifest describes as it is now."""
    (bundle / path).unlink()  # not in place: copies of a bundle may share files
    (bundle / path).write_bytes(content)
    return resign(bundle)


def resign(bundle: Path) -> Path:
    """The bundle with the size and the hash of every file as it is on the disk."""

    def describe(manifest: Record) -> None:
        for file in files_in(manifest):
            _describe(bundle, file)

    return edit_manifest(bundle, describe)


def files_in(value: Any) -> Iterator[Record]:
    """Every record of a file in a manifest."""
    if isinstance(value, dict):
        if value.keys() == {"path", "size", "sha256"}:
            yield value
        else:
            for held in value.values():
                yield from files_in(held)
    elif isinstance(value, list):
        for held in value:
            yield from files_in(held)


def edit_graph(bundle: Path, task: str, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The bundle, after ``change`` was done to the task's graph."""
    path = part_of(bundle, task)["model"]["path"]
    model = onnx.load(bundle / path, load_external_data=False)
    change(model)
    return replace_content(bundle, path, model.SerializeToString())


def part_of(bundle: Path, task: str) -> Record:
    """The task's one part, as the manifest has it."""
    part: Record = manifest_of(bundle)["tasks"][task]["parts"]["model"]
    return part


def weights_of(manifest: Record, task: str) -> Record:
    """The weight map of the task's graph."""
    weights: Record = manifest["graphs"][manifest["tasks"][task]["parts"]["model"]["graph"]]["weights"]
    return weights


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    """The graph's initializer of that name."""
    found: onnx.TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def external_data(tensor: onnx.TensorProto, **values: object) -> None:
    """Say of a tensor where it lies; what is not named stays."""
    for entry in tensor.external_data:
        entry.value = str(values.get(entry.key, entry.value))


def _describe(bundle: Path, file: Record) -> None:
    path = bundle / file["path"]
    if path.is_file():
        content = path.read_bytes()
        file.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
