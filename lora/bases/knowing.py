"""Making a base known: what is written down, else what a caller asks of transformers, else what names alone say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lora.bases.architectures import written_down
from lora.bases.gguf_llama import GgufBase
from lora.bases.opening import Base
from lora.bases.structure import BaseStructure, of_names
from lora.bases.tensors import tied_as
from lora.files.tensorfile import Array
from lora.formats.model_class import ModelClass

# Asks transformers about the base in a folder, of these stored tensors; None where that is not installed, or knows no
# such model.
Ask = Callable[[Path, Mapping[str, Array], ModelClass], BaseStructure | None]


def known(base: Base, wanted: ModelClass, ask: Ask | None = None) -> Base:
    """``base`` with its structure, as the model in which an adapter was trained (``wanted``).

    Where neither knows a configuration, what could be read in two ways is left open, for the merge to refuse. A base
    without a configuration is no model of transformers: there the adapter's own word is taken.
    """
    config = base.tensors.config if isinstance(base.tensors, GgufBase) else base.config
    structure = written_down(config, base.tensors, wanted)
    if structure is None and ask is not None and base.folder is not None and base.config:
        structure = ask(base.folder, base.tensors, wanted)
    if structure is None:
        return replace(base, structure=of_names(base.tensors, "unknown" if base.config else "flagged"))
    return replace(base, structure=structure, tensors=tied_as(base.tensors, structure.shared()))
