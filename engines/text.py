"""From text to a prediction: the base's own tokenizer before the engine, the task's labels after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from exporter.bundle.manifest import Bundle, Graph
from lora.errors import BundleError
from lora.tensorfile import Array

if TYPE_CHECKING:  # a program that brings its own token ids needs no tokenizer
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Prediction:
    """A class and its probability, or, for a regression, the value and no label."""

    label: str | None
    score: float


class TextEncoder:
    """Turns texts into the inputs of a bundle's graphs. Raises BundleError when the bundle has no tokenizer."""

    def __init__(self, bundle: Bundle) -> None:
        from tokenizers import Tokenizer

        files = {file.path: file for file in bundle.manifest.base.files}
        if "base/tokenizer.json" not in files:
            raise BundleError(f"{bundle.path}: the base came without tokenizer.json; give token ids instead of text")
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(bundle.checked(files["base/tokenizer.json"])))
        self._tokenizer.enable_truncation(max_length=bundle.manifest.base.longest)
        padding = self._tokenizer.padding or {}
        self._tokenizer.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"))

    def encode(self, texts: Sequence[str], graph: Graph) -> dict[str, Array]:
        """The graph's inputs for a batch of texts: int64 arrays of shape (batch, longest text)."""
        encodings = self._tokenizer.encode_batch(list(texts))
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
            "token_type_ids": [encoding.type_ids for encoding in encodings],
        }
        return {port.name: np.array(columns[port.name], dtype=port.dtype) for port in graph.inputs}


def predictions(logits: Array, labels: Sequence[str]) -> list[Prediction]:
    """One prediction a row of ``logits``, shape (batch, outputs)."""
    if not labels:
        return [Prediction(None, float(row[0])) for row in logits]
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    return [Prediction(labels[int(row.argmax())], float(row.max())) for row in probabilities]
