"""Where a dense model comes from: what an export needs to know of a base that transformers or the caller made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.bundle.records import Head, Precision
from exporter.heads import embeddings_apart
from exporter.transformers_base import base_structure, base_weights, input_limits, known_config, skeleton, tied_groups
from lora.bases.checkpoint import weight_files
from lora.bases.structure import BaseStructure
from lora.files.tensorfile import Array, TensorFile

if TYPE_CHECKING:  # a task with a known head is exported without torch
    from exporter.graph.signature import Signature

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Source:
    """A base that can be traced. ``name`` is what messages call it.

    ``fingerprint`` takes seconds to make, so it is asked for late.

    ``signature`` makes a module to trace of a part of the model; ``weights`` gives the real values by parameter name,
    without those that an adapter replaces (``replaced``); ``tied`` says which parameters are one tensor, ``structure``
    what each parameter is (None: nobody knows). ``files`` are copied into the bundle; ``longest`` and ``vocabulary``
    are the base's limits in tokens.
    """

    name: str
    fingerprint: Callable[[], str]
    signature: Callable[[str, Head, Precision], Signature]
    weights: Callable[[str, Head, Iterable[str]], Mapping[str, Array]]
    tied: Callable[[Head], tuple[tuple[str, ...], ...]]
    structure: Callable[[str, Head], BaseStructure | None]
    files: tuple[Path, ...]
    longest: int
    vocabulary: int


def checkpoint(folder: Path, fingerprint: Callable[[], str], name: str) -> Source:
    """The base in ``folder``, a checkpoint that transformers knows. Raises ExportError where it does not."""

    def traced(role: str, head: Head, precision: Precision) -> Signature:
        from exporter.graph.signature import signature

        return signature(skeleton(folder, head, precision, role), head, role)

    longest, vocabulary = input_limits(folder, known_config(folder))
    return Source(
        name=name,
        fingerprint=fingerprint,
        signature=traced,
        weights=lambda role, head, replaced: base_weights(folder, head, replaced, role),
        tied=lambda head: () if embeddings_apart(stored_names(folder)) else tied_groups(folder, head),
        structure=lambda role, head: base_structure(folder, head, role),
        files=tuple(folder / name for name in SIDE_FILES if (folder / name).is_file()),
        longest=longest,
        vocabulary=vocabulary,
    )


def stored_names(folder: Path) -> Iterable[str]:
    """The names of all tensors in a checkpoint's files."""
    return (name for path in weight_files(folder) for name in TensorFile(path))
