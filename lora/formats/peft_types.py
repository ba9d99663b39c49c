"""PEFT's other methods, each known by the ``peft_type`` in its configuration: merged where it has a dense form that
follows from the file by a formula, else refused by name.

With s the scaling, ∘ the elementwise and ⊗ the Kronecker product:

    LOHA              W' = W + s · (w1a·w1b) ∘ (w2a·w2b)             s = alpha / r
    LOKR              W' = W + s · w1 ⊗ w2                           s = alpha / r; either may be a product of two
    VERA              W' = W + diag(b) · B · diag(d) · A             A and B are shared by all layers
    IA3               W' = diag(l) · W and bias' = l ∘ bias; of a feed-forward layer W' = W · diag(l)
    LN_TUNING         the normalisation's weight and bias are replaced
    TRAINABLE_TOKENS  rows of the embedding are replaced

Each of the first three is a product of two matrices, of a higher rank: it is read as such. Sources: LyCORIS (Yeh et
al. 2023), VeRA (Kopiczko et al. 2024, eq. 2), IA3 (Liu et al. 2022, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lora.adapter import Change, LowRank, Replacement, Rows, Scale
from lora.errors import AdapterError
from lora.files.tensorfile import Array
from lora.formats.factors import Factors
from lora.formats.peft_config import MethodConfig

# Why a method can't be merged; one that is not listed has no formula here yet.
PROMPTS = "it adds trained vectors to the input or to the keys and values, and changes no weight"
REASONS: Mapping[str, str] = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "ADAPTION_PROMPT": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "XLORA": "it chooses between adapters for every token",
    "POLY": "it chooses between adapters for every task",
    "ADALORA": "its scaling follows from how many ranks were left at the end of training, which its file does not say",
    "LILY": "its layers share experts that are chosen for every token",
}
OTHERWISE = "there is no formula for it here"
CURE = "merge it with PEFT (merge_and_unload) and give the result as a base, where PEFT can"

Reader = Callable[[Factors, MethodConfig, str], Iterator[Change]]


def method_changes(factors: Factors, config: MethodConfig, prefix: str) -> tuple[Change, ...]:
    """Every change that the file's tensors make; all keys bear ``prefix``. Replaced tensors come first."""
    updates = list(_reader(factors, config)(factors, config, prefix))
    saved = [
        Replacement(key.removeprefix(prefix), factors.take(key))
        for key in factors.left()
        if key.startswith(prefix) and config.is_saved(key.removeprefix(prefix))
    ]
    factors.done()
    return (*saved, *updates)


def refuse_unknown_method(path: Any, peft_type: str) -> None:
    """Raises AdapterError for a method that is not merged here, saying why."""
    if peft_type not in READERS:
        reason = REASONS.get(peft_type, OTHERWISE)
        raise AdapterError(f"{path}: field 'peft_type' is {peft_type!r}, which can't be merged: {reason}; {CURE}")


def _reader(factors: Factors, config: MethodConfig) -> Reader:
    refuse_unknown_method(factors.path, config.peft_type)
    return READERS[config.peft_type]


def _modules(factors: Factors, prefix: str, slot: str) -> Iterator[str]:
    """The paths of the modules that have a tensor of this slot."""
    for key in factors.names():
        if key.startswith(prefix) and key.endswith(slot):
            yield key.removeprefix(prefix).removesuffix(slot)


def _loha(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    for module in _modules(factors, prefix, ".hada_w1_a"):
        path = prefix + module
        if f"{path}.hada_t1" in factors:
            raise _effective_convolution(factors, module)
        w1a, w1b, w2a, w2b = (factors.take(f"{path}.hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
        rank = w1a.shape[-1]
        _check_pair(factors, module, w1a, w1b)
        _check_pair(factors, module, w2a, w2b)
        # (P·Q) ∘ (R·S) has as its columns all products of a column of P with one of R, and as rows those of Q and S.
        b = np.einsum("or,os->ors", _wide(w1a), _wide(w2a)).reshape(w1a.shape[0], -1)
        a = np.einsum("ri,si->rsi", _wide(w1b), _wide(w2b)).reshape(-1, w1b.shape[1])
        yield LowRank(module, a, b, a.shape[0], config.scaling(module, rank), "flat")


def _lokr(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    found = {*_modules(factors, prefix, ".lokr_w1"), *_modules(factors, prefix, ".lokr_w1_a")}
    for module in sorted(found):
        path = prefix + module
        if f"{path}.lokr_t2" in factors:
            raise _effective_convolution(factors, module)
        w1 = _product(factors, module, f"{path}.lokr_w1")
        columns, rows = _kronecker_factors(factors, module, f"{path}.lokr_w2")
        # w1 ⊗ (P·Q) = (w1 ⊗ P) · (1 ⊗ Q); a kernel's extent is part of Q's columns.
        b = np.kron(w1, columns)
        a = np.kron(np.eye(w1.shape[1], dtype=np.float32), rows.reshape(rows.shape[0], -1))
        yield LowRank(module, a, b, a.shape[0], config.scaling(module), "flat")


def _kronecker_factors(factors: Factors, module: str, key: str) -> tuple[Array, Array]:
    """w2 as a product: of its two factors, or of the identity with itself."""
    if key in factors:
        w2 = _wide(factors.take(key))
        return np.eye(w2.shape[0], dtype=np.float32), w2
    left, right = factors.take(f"{key}_a"), factors.take(f"{key}_b")
    _check_pair(factors, module, left, right)
    return _wide(left), _wide(right)


def _product(factors: Factors, module: str, key: str) -> Array:
    if key in factors:
        return _wide(factors.take(key))
    left, right = factors.take(f"{key}_a"), factors.take(f"{key}_b")
    _check_pair(factors, module, left, right)
    return np.asarray(_wide(left) @ _wide(right))


def _vera(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    shared = [f"{prefix.removesuffix('model.')}vera_{part}" for part in "AB"]  # base_model.vera_A
    if any(key not in factors for key in shared):
        raise AdapterError(
            f"{factors.path}: has no '{shared[0]}': it was saved without its projections (save_projection: false),"
            " which only the torch that made them can draw again; save it with them"
        )
    all_a, all_b = (_wide(factors.take(key)) for key in shared)
    for module in _modules(factors, prefix, ".vera_lambda_b"):
        b, d = (_wide(factors.take(f"{prefix}{module}.vera_lambda_{part}")) for part in "bd")
        yield LowRank(
            module,
            a=d[:, None] * all_a[: len(d)],
            b=b[:, None] * all_b[: len(b), : len(d)],
            rank=len(d),
            scaling=1.0,
            layout="sliced",
        )


def _ia3(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    for module in _modules(factors, prefix, ".ia3_l"):
        values = factors.take(f"{prefix}{module}.ia3_l")
        yield Scale(module, values.reshape(-1), "in" if values.ndim > 1 and values.shape[0] == 1 else "out")


def _layer_norms(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    slot = ".ln_tuning_layers"
    for key in factors.names():
        if key.startswith(prefix) and slot in key:
            yield Replacement(key.removeprefix(prefix).replace(slot, ""), factors.take(key))


def _tokens(factors: Factors, config: MethodConfig, prefix: str) -> Iterator[Change]:
    for module in _modules(factors, prefix, ".trainable_tokens_delta"):
        values = factors.take(f"{prefix}{module}.trainable_tokens_delta")
        if values.ndim != 2 or len(values) != len(config.token_indices or ()):
            raise AdapterError(
                f"{factors.path}: '{module}' has trained tokens of shape {values.shape}, but the configuration lists"
                f" {len(config.token_indices or ())} token indices"
            )
        yield Rows(module, tuple(config.token_indices or ()), values)


READERS: Mapping[str, Reader] = {
    "LOHA": _loha,
    "LOKR": _lokr,
    "VERA": _vera,
    "IA3": _ia3,
    "LN_TUNING": _layer_norms,
    "TRAINABLE_TOKENS": _tokens,
}


def _wide(values: Array) -> Array:
    return values.astype(np.float32)


def _check_pair(factors: Factors, module: str, left: Array, right: Array) -> None:
    if left.ndim != 2 or right.ndim < 2 or left.shape[1] != right.shape[0]:
        raise AdapterError(
            f"{factors.path}: module '{module}' has factors {left.shape} and {right.shape}, which have no product; the"
            " file is damaged, save it again"
        )


def _effective_convolution(factors: Factors, module: str) -> AdapterError:
    return AdapterError(
        f"{factors.path}: module '{module}' was trained with use_effective_conv2d, which can't be merged here; {CURE}"
    )
