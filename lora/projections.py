"""What families of models call the projections of their attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora.errors import AdapterError

# T5's kinds of attention; the latter two are LongT5's encoder's, whichever the configuration chooses.
T5 = ("SelfAttention", "EncDecAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")
SEPARATE = {
    "q": ("q_proj", "query", "q_lin", *(f"{attention}.q" for attention in T5), "query_proj"),
    "k": ("k_proj", "key", "k_lin", *(f"{attention}.k" for attention in T5), "key_proj"),
    "v": ("v_proj", "value", "v_lin", *(f"{attention}.v" for attention in T5), "value_proj"),
    "o": ("o_proj", "out_proj", "attention.output.dense", "out_lin", *(f"{attention}.o" for attention in T5), "attn.c_proj", "attention.dense"),
}
PARTS = ("q", "k", "v")
FUSED = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")
IN_ORDER = ("c_attn",)  # of the fused, those with queries, keys and values in three equal blocks


def ends_in(path: str, names: Sequence[str]) -> bool:
    """Whether a module's path is one of these names, or ends in one."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def attention_targets(model: Any) -> tuple[tuple[str, ...], tuple[bool, ...]]:
    """The paper's choice, queries and values, as (targets, parts) of an ``Injection``; a fused projection without known blocks, whole.

    Raises AdapterError when the model has no projection by a name that is known.
    """
    paths = [path for path, module in model.named_modules() if getattr(module, "weight", None) is not None]
    used = tuple(name for part in "qv" for name in SEPARATE[part] if any(ends_in(path, (name,)) for path in paths))
    if used:
        return used, (True,)
    fused = tuple(name for name in FUSED if any(ends_in(path, (name,)) for path in paths))
    if not fused:
        raise AdapterError(f"{type(model).__name__} has no queries and values by a name that is known; name the modules with --targets")
    return fused, (True, False, True) if set(fused) <= set(IN_ORDER) else (True,)
