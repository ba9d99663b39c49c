"""How a model is called: what its graph takes and gives, by name, and which axes are dynamic.

Names follow transformers' arguments; the key-value cache of a decoder is flat tensors, named as in Optimum's exports.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from exporter.bundle.records import MODEL, Head
from exporter.bundle.task_types import task_type
from lora.errors import ExportError

TEXT = {0: "batch", 1: "sequence"}
# Distinct sizes above 1, so that no axis can be taken for a constant or for another.
BATCH, SEQUENCE, PAST, TARGET = 2, 16, 5, 7


@dataclass(frozen=True)
class Signature:
    """How a module is called: one dictionary of inputs, a tuple of outputs, and their names.

    ``module.model`` is the model whose parameters' names the graph keeps. ``axes`` are the dynamic ones, by input.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]


def signature(model: Any, head: Head, role: str = MODEL) -> Signature:
    """The signature of a transformers model with ``head``, or of the part of it that has ``role``.

    Floating-point inputs and outputs are float32 whatever the model computes in.
    """
    if role != MODEL:
        return _tower(model, role)
    kind = task_type(head.task_type)
    if kind.decodes:
        return _decoder(model)
    outputs = kind.outputs
    if model.main_input_name == "pixel_values":
        return _pixels(model, ("image_embeds", *outputs) if hasattr(model, "visual_projection") else outputs)
    if model.main_input_name == "input_features":
        return _features(model, outputs)
    inputs, axes = _tokens(model.config), {}
    if head.task_type == "SEQ_2_SEQ_LM":
        inputs.pop("token_type_ids", None)
        inputs["decoder_input_ids"] = torch.ones(BATCH, TARGET, dtype=torch.long)
        axes["decoder_input_ids"] = {0: "batch", 1: "decoder_sequence"}
    return Signature(Named(model, outputs), inputs, dict.fromkeys(inputs, TEXT) | axes, outputs)


class Called(nn.Module):
    """Any module, called with its inputs by name; one output or several are always a tuple."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self._dtype = dtype

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs in float32."""
        given = self.model(**in_dtype(self._dtype, inputs))
        return tuple(map(widened, given if isinstance(given, tuple | list) else (given,)))


class Named(nn.Module):
    """A model called with a dictionary, whose outputs are picked by name."""

    def __init__(self, model: Any, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._outputs = outputs

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs in float32 (in float64 where the model computes in it)."""
        given = self._part()(**in_dtype(self.model.dtype, inputs))
        return tuple(widened(given[name]) for name in self._outputs)

    def _part(self) -> Any:
        return self.model


class Encoder(Named):
    """The encoder of an encoder-decoder model."""

    def _part(self) -> Any:
        return self.model.get_encoder()


class Tower(nn.Module):
    """One tower of a model of text and images, with its projection into the space that both share."""

    def __init__(self, model: Any, features: str) -> None:
        super().__init__()
        self.model = model
        self._features = features

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Embeddings (batch, projection) and the last hidden state, in float32 (float64 where it computes in it)."""
        given = getattr(self.model, self._features)(**in_dtype(self.model.dtype, inputs))
        return widened(given.pooler_output), widened(given.last_hidden_state)


class Decoder(nn.Module):
    """A language model with a key-value cache: prefill (an empty past) and decoding (one token) are the same graph."""

    def __init__(self, model: Any, cached: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._cached = cached
        # Renamed in transformers 5.24; the old name goes in 5.40.
        self._argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits (batch, sequence, vocabulary) in float32, then the keys and values of past and present.

        Keys and values are in the model's dtype.
        """
        from transformers import DynamicCache

        inputs = in_dtype(self.model.dtype, inputs)
        tensors = [inputs[name] for name in self._cached]
        cache: Any = DynamicCache(ddp_cache_data=list(zip(tensors[::2], tensors[1::2], strict=True)))
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        given = self.model(**tokens, **{self._argument: cache}, use_cache=True)
        return widened(given.logits), *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def _tokens(config: Any) -> dict[str, Tensor]:
    """Token types only where the model tells several apart (BERT's sentence pairs)."""
    pairs = getattr(config, "type_vocab_size", 0) > 1
    names = ("input_ids", "attention_mask", "token_type_ids") if pairs else ("input_ids", "attention_mask")
    return {name: torch.ones(BATCH, SEQUENCE, dtype=torch.long) for name in names}


def _decoder(model: Any) -> Signature:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    cached = tuple(f"past_key_values.{name}" for name in layers)
    inputs = {
        "input_ids": torch.ones(BATCH, SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long),
        "position_ids": torch.arange(PAST, PAST + SEQUENCE).repeat(BATCH, 1),
        **{name: torch.ones(BATCH, heads, PAST, width, dtype=model.dtype) for name in cached},
    }
    axes = {"input_ids": TEXT, "attention_mask": {0: "batch", 1: "total_sequence"}, "position_ids": TEXT}
    return Signature(
        module=Decoder(model, cached),
        inputs=inputs,
        axes=axes | {name: {0: "batch", 2: "past_sequence"} for name in cached},
        outputs=("logits", *(f"present.{name}" for name in layers)),
    )


def _tower(model: Any, role: str) -> Signature:
    """A tower of CLIP and its like, by the methods that transformers gives them."""
    if role == "text":
        inputs = {name: torch.ones(BATCH, SEQUENCE, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        module = Tower(model, "get_text_features")
        return Signature(module, inputs, dict.fromkeys(inputs, TEXT), ("text_embeds", "last_hidden_state"))
    inputs = _pixel_inputs(model.config.vision_config)
    module = Tower(model, "get_image_features")
    return Signature(module, inputs, {"pixel_values": {0: "batch"}}, ("image_embeds", "last_hidden_state"))


def _pixels(model: Any, outputs: tuple[str, ...]) -> Signature:
    return Signature(Named(model, outputs), _pixel_inputs(model.config), {"pixel_values": {0: "batch"}}, outputs)


def _pixel_inputs(config: Any) -> dict[str, Tensor]:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return {"pixel_values": torch.ones(BATCH, config.num_channels, size, size)}


def _features(model: Any, outputs: tuple[str, ...]) -> Signature:
    """Whisper's encoder: mel bins by frames, of which its convolutions halve the number and its positions fix it."""
    config = model.config
    if not hasattr(config, "max_source_positions"):
        raise ExportError(
            f"{config.model_type}: takes audio in a way that can't be exported yet; expected a Whisper model"
        )
    inputs = {"input_features": torch.ones(BATCH, config.num_mel_bins, 2 * config.max_source_positions)}
    return Signature(Encoder(model, outputs), inputs, {"input_features": {0: "batch"}}, outputs)


def in_dtype(dtype: torch.dtype, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs, floating-point ones in ``dtype``."""
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in inputs.items()}


def widened(values: Tensor) -> Tensor:
    """Half precision as float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
