"""A GGUF file of a Llama as the weights of transformers' model: its names, its order of rows, dequantized one at a
time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package ``gguf`` parses the file and undoes the
quantization.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora.bases.checkpoint import OUTPUT_EMBEDDING
from lora.bases.tensors import BaseTensors
from lora.errors import CheckpointError
from lora.files.tensorfile import Array, numpy_dtype

MAGIC = b"GGUF"
ARCHITECTURE, MODEL = "llama", "LlamaForCausalLM"
PLAIN = ("F32", "F16", "BF16")  # stored as they are: not quantized
EMBEDDING = "model.embed_tokens.weight"
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The factors of the rotary embedding, which in transformers come from the configuration and are no parameters.
ROTARY = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd\.weight")
NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


class GgufBase(BaseTensors):
    """The parameters of a Llama in a GGUF file, by transformers' names.

    F32, F16 and BF16 tensors keep their dtype; quantized ones become float32. ``quantized`` names their types, the most
    frequent first. ``tied`` is the output embedding, where the file leaves it out: it is found, not listed.
    Raises CheckpointError when the package ``gguf`` is missing, the file is damaged, lacks a tensor, or is no Llama.
    """

    def __init__(self, path: Path) -> None:
        reader = _open(path)
        _check_kind(path, reader)
        self._heads = _heads(path, reader)
        self._tensors = _by_parameter(path, reader.tensors)
        _check_complete(path, self._tensors, _number(path, reader, "llama.block_count"))
        counts = Counter(tensor.tensor_type.name for tensor in self._tensors.values())
        self.quantized = tuple(name for name, _ in counts.most_common() if name not in PLAIN)
        self.tied = {} if OUTPUT_EMBEDDING in self._tensors else {OUTPUT_EMBEDDING: EMBEDDING}
        # What transformers' configuration of this model would say of its structure.
        self.config = {"model_type": ARCHITECTURE, "architectures": [MODEL], "tie_word_embeddings": bool(self.tied)}
        for name in self._tensors:
            self._check_shape(path, name)

    def __getitem__(self, name: str) -> Array:
        values = _values(self._tensors[self.tied.get(name, name)])
        heads = self._reordered(name)
        return _halves(values, heads) if heads else values

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self.tied

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, without dequantizing it. (GGUF lists the dimensions innermost first.)"""
        return tuple(int(size) for size in reversed(self._tensors[self.tied.get(name, name)].shape))

    def _reordered(self, name: str) -> int:
        """How many heads' rows are in another order in this parameter: of a query or key projection's; else 0."""
        return self._heads.get(name.split(".")[-2], 0)

    def _check_shape(self, path: Path, name: str) -> None:
        heads, shape = self._reordered(name), self.shape(name)
        if 0 in shape or not shape:
            raise CheckpointError(f"{path}: '{name}' has the shape {shape}; fetch or convert the file again")
        if heads and shape[0] % (2 * heads):
            raise CheckpointError(
                f"{path}: '{name}' has {shape[0]} rows, which {heads} heads don't divide into pairs; fetch or convert"
                " the file again"
            )


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            f"{path}: reading GGUF needs the package gguf; run: pip install 'lorafuse[gguf]'"
        ) from error
    try:
        return gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; expected a GGUF file") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole GGUF file ({error!r}); fetch or convert it again") from error


def _check_kind(path: Path, reader: Any) -> None:
    """One whole Llama in this machine's byte order, every tensor of a type that can be dequantized."""
    architecture, kind, parts = (
        _field(path, reader, key) for key in ("general.architecture", "general.type", "split.count")
    )
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{path}: general.architecture is {architecture!r}; only '{ARCHITECTURE}' is read from GGUF: give the base"
            " as safetensors"
        )
    if kind not in (None, "model"):
        raise CheckpointError(f"{path}: general.type is {kind!r}; expected a model")
    if parts not in (None, 0, 1):
        raise CheckpointError(f"{path}: one of {parts} parts of a split model; join them with llama-gguf-split --merge")
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: written for the other byte order; convert it again on this kind of machine")
    for tensor_type in {tensor.tensor_type for tensor in reader.tensors}:
        if not _can_dequantize(tensor_type):
            raise CheckpointError(
                f"{path}: tensors of type {tensor_type.name} can't be dequantized by this version of gguf; give the"
                " base as safetensors"
            )


def _can_dequantize(tensor_type: Any) -> bool:
    """Tried on one block of zeros."""
    import gguf

    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[tensor_type][1]), np.uint8), tensor_type)
    except NotImplementedError:
        return False
    return True


def _field(path: Path, reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: {key} can't be read ({error!r}); fetch or convert the file again") from error


def _number(path: Path, reader: Any, key: str, default: int | None = None) -> int:
    value = _field(path, reader, key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{path}: {key} is {value!r}; expected a positive number: fetch or convert the file again"
        )
    return value


def _heads(path: Path, reader: Any) -> dict[str, int]:
    """{projection: its heads}, of the two whose rows GGUF reorders.

    Without head_count_kv, keys have as many heads as queries.
    """
    queries = _number(path, reader, "llama.attention.head_count")
    return {"q_proj": queries, "k_proj": _number(path, reader, "llama.attention.head_count_kv", queries)}


def _by_parameter(path: Path, tensors: list[Any]) -> dict[str, Any]:
    named = {}
    for tensor in tensors:
        if ROTARY.fullmatch(tensor.name):
            continue
        match = NAME.fullmatch(tensor.name)
        table = INNER if match and match["layer"] else OUTER
        if match is None or match["part"] not in table:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} has no place in a dense Llama (experts?); give the base as safetensors"
            )
        prefix = f"model.layers.{int(match['layer'])}." if match["layer"] else ""
        named[f"{prefix}{table[match['part']]}.{match['kind']}"] = tensor
    return named


def _check_complete(path: Path, named: Mapping[str, Any], layers: int) -> None:
    present = {name.split(".")[2] for name in named if name.startswith("model.layers.")}
    if len(present) != layers:
        raise CheckpointError(
            f"{path}: holds {len(present)} layers, but llama.block_count is {layers}; fetch or convert the file again"
        )
    expected = [
        EMBEDDING,
        "model.norm.weight",
        *(f"model.layers.{layer}.{part}.weight" for layer in range(layers) for part in INNER.values()),
    ]
    missing = [name for name in expected if name not in named]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are missing, the first is '{missing[0]}'; fetch or convert the file again"
        )


def _values(tensor: Any) -> Array:
    if tensor.tensor_type.name == "BF16":  # gguf hands out its bytes
        return np.asarray(tensor.data.view(numpy_dtype("bfloat16")))
    if tensor.tensor_type.name in PLAIN:
        return np.asarray(tensor.data)
    import gguf

    return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type))


def _halves(values: Array, heads: int) -> Array:
    """From GGUF's order of a query's or key's rows to transformers'.

    ggml turns neighbouring rows (2i, 2i + 1) of a head by the i-th angle, transformers the rows (i, i + d/2) of its two
    halves. So the converter interleaved the halves: file row 2i + j is transformers' row j · d/2 + i, for j in {0, 1},
    and splitting a head's rows into (d/2, 2) and swapping these two axes undoes it. Biases are reordered likewise.
    https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py (``LlamaModel.permute``)
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
