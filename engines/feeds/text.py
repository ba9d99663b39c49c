"""From text to a graph's inputs and back: the base's own tokenizer before the engine, the task's labels after it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.feeds.inputs import empty_cache
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import Graph
from exporter.bundle.task_types import task_type
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array

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
        path, content = bundle.path / "base/tokenizer.json", bundle.content(files["base/tokenizer.json"])
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises nothing more particular
            raise BundleError(
                f"{path}: not a tokenizer that can be read ({' '.join(str(error).split())[:160]}); give token ids"
                " instead of text"
            ) from error
        self._longest = bundle.manifest.base.longest
        self._padding = self._tokenizer.padding or {}
        self._config = base_config(bundle, "config.json")

    def encode(self, texts: Sequence[str], graph: Graph) -> dict[str, Array]:
        """The graph's inputs for a batch of texts: int64 arrays of shape (batch, longest text).

        A decoder also gets an empty cache.

        A text is cut to what the base takes. Raises EngineError for one that has no tokens.
        """
        self._tokenizer.enable_truncation(max_length=self._longest)
        self._pad(left=task_type(graph.head.task_type).decodes)
        encodings = self._tokenizer.encode_batch(list(texts))
        for text, encoding in zip(texts, encodings, strict=True):
            if not any(encoding.attention_mask):
                raise EngineError(f"text {text!r:.40} has no tokens; give one that has")
        mask = np.array([encoding.attention_mask for encoding in encodings])
        columns = {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": mask,
            "token_type_ids": [encoding.type_ids for encoding in encodings],
            "position_ids": positions(mask),
            "decoder_input_ids": [[self._config.get("decoder_start_token_id") or 0]] * len(encodings),
        }
        tokens = {
            port.name: np.array(columns[port.name], dtype=port.dtype) for port in graph.inputs if port.name in columns
        }
        return tokens | empty_cache(graph, len(encodings))

    def encode_prompts(self, texts: Sequence[str], graph: Graph) -> dict[str, Array]:
        """As ``encode``, for texts to which tokens are added.

        Raises EngineError for one that leaves no room for any: cut, it would be another.
        """
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for text, encoding in zip(texts, self._tokenizer.encode_batch(list(texts)), strict=True):
            if len(encoding.ids) >= self._longest:
                raise EngineError(
                    f"text {text!r:.40} has {len(encoding.ids)} tokens, and the base takes {self._longest} with what"
                    " follows; give a shorter one"
                )
        return self.encode(texts, graph)

    def completion(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """What ``tokens`` add to the prompt's text: by themselves they may lose the space that they begin with."""
        before, whole = self.decode(prompt), self.decode([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.decode(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens)))

    def _pad(self, left: bool) -> None:
        """Turn padding on. A tokenizer without settings for it takes the model's padding token.

        Earlier Llamas say -1, which is no token.
        """
        pad_id = self._padding.get("pad_id", max(0, self._config.get("pad_token_id") or 0))
        pad_token = self._padding.get("pad_token", self._tokenizer.id_to_token(pad_id) or "[PAD]")
        self._tokenizer.enable_padding(direction="left" if left else "right", pad_id=pad_id, pad_token=pad_token)


def base_config(bundle: Bundle, name: str) -> dict[str, Any]:
    """A JSON file that came with the base; empty where there was none."""
    file = next((file for file in bundle.manifest.base.files if file.path == f"base/{name}"), None)
    content = json.loads(bundle.content(file)) if file else {}
    return content if isinstance(content, dict) else {}


def positions(mask: Array) -> Array:
    """The position of each token in its row, of the shape of ``mask``; 0 for padding on either side."""
    counted: Array = np.maximum(mask.cumsum(axis=-1) - 1, 0)
    return counted


def predictions(logits: Array, labels: Sequence[str]) -> list[Prediction]:
    """One prediction a row of ``logits``, shape (batch, outputs). Raises EngineError where they are no numbers."""
    if not np.isfinite(logits).all():
        row = int(np.flatnonzero(~np.isfinite(logits).all(axis=-1))[0])
        raise EngineError(
            f"the outputs of text {row + 1} are not finite: the model overflows; export it in float32 or bfloat16"
        )
    if not labels:
        return [Prediction(None, float(row[0])) for row in logits]
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=-1, keepdims=True)
    return [Prediction(labels[int(row.argmax())], float(row.max())) for row in probabilities]
