"""What families of models call the projections of their attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora.errors import AdapterError

# Attentions whose projections are called by a letter: MPNet's, and T5's, of which the last two are LongT5's encoder's.
TERSE = ("attention.attn", "SelfAttention", "EncDecAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")
SEPARATE = {
    "q": ("q_proj", "query", "q_lin", *(f"{attention}.q" for attention in TERSE), "query_proj"),
    "k": ("k_proj", "key", "k_lin", *(f"{attention}.k" for attention in TERSE), "key_proj"),
    "v": ("v_proj", "value", "v_lin", *(f"{attention}.v" for attention in TERSE), "value_proj"),
    "o": (
        "o_proj",
        "out_proj",
        "attention.output.dense",
        "out_lin",
        *(f"{attention}.o" for attention in TERSE),
        "attn.c_proj",
        "attention.dense",
    ),
}
PARTS = ("q", "k", "v")
FUSED = (
    "c_attn",
    "query_key_value",
    "qkv_proj",
    "Wqkv",
    "attention.self.in_proj",
)  # DeBERTa's in_proj; Mamba's is no attention's
IN_ORDER = ("c_attn",)  # of the fused, those that may have queries, keys and values in three equal blocks


def ends_in(path: str, names: Sequence[str]) -> bool:
    """Whether a module's path is one of these names, or ends in one."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def attention_targets(model: Any) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The paper's choice, queries and values, as (targets, parts) of an ``Injection``.

    A fused projection whose blocks are unknown is taken whole.

    Raises AdapterError when the model has no projection by a name that is known.
    """
    layers = {path: module for path, module in model.named_modules() if getattr(module, "weight", None) is not None}
    queries, values = (_found(SEPARATE[part], layers) for part in "qv")
    if queries and values:
        return queries + values, (True,)
    fused = _found(FUSED, layers)
    if not fused:
        raise AdapterError(
            f"{type(model).__name__} has no queries and values by a name that is known; name the modules with --targets"
        )
    projections = {path: layer for path, layer in layers.items() if ends_in(path, fused)}
    queries_and_values = (True, False, True)
    return fused, queries_and_values if all(map(_lies_in_order, projections, projections.values())) else (True,)


def _found(names: Iterable[str], layers: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the names that a layer has."""
    return tuple(name for name in names if any(ends_in(path, (name,)) for path in layers))


def _lies_in_order(path: str, layer: Any) -> bool:
    """Whether a fused projection's queries, keys and values are known to lie one after the other."""
    return ends_in(path, IN_ORDER) and _has_three_blocks(layer)


def fused_widths(config: Any, outputs: int) -> tuple[int, int, int] | None:
    """How many outputs of a fused projection are queries, keys and values.

    None when the configuration's heads do not add up to its width.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return next(
        (
            (size * heads, size * pairs, size * pairs)
            for pairs in _pairs(config, heads)
            if size * (heads + 2 * pairs) == outputs
        ),
        None,
    )


def _pairs(config: Any, heads: int) -> list[int]:
    """How many heads of keys and values there may be, in the order to try.

    One for each head of queries, one for all (multi-query), or one for a group of them.
    """
    grouped = [getattr(config, name, None) for name in ("num_key_value_heads", "num_kv_heads")]
    return [heads, *([1] if getattr(config, "multi_query", False) else []), *(number for number in grouped if number)]


def _has_three_blocks(layer: Any) -> bool:
    """Whether the blocks lie one after the other, as in GPT-2.

    GPTBigCode's c_attn is a Linear: queries, keys and values of one head after another's, or one head of the latter
    two.
    """
    return type(layer).__name__ == "Conv1D" and layer.weight.shape[1] == 3 * layer.weight.shape[0]
