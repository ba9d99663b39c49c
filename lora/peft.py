"""Reading a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

Keys are ``base_model.model.<module>.lora_A.weight`` and ``lora_B``; saved modules and biases stand under
``base_model.model.<parameter>``. Every tensor is consumed, or the reader refuses the file and names the tensor.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from lora.adapter import Adapter, LowRank, Replacement
from lora.errors import AdapterError, CheckpointError
from lora.peft_config import PeftConfig, read_config
from lora.tensorfile import Array, TensorFile, file_sha256

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter in ``folder`` into its normal form.

    Raises AdapterError when a file is missing or damaged, a field can't be honoured, or a tensor is left over.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder; expected a PEFT adapter ({CONFIG} and {WEIGHTS})")
    config = read_config(folder / CONFIG)
    tensors = _open_weights(folder)
    updates, replacements = _take_all(tensors, config)
    files = (folder / CONFIG, folder / WEIGHTS)
    return Adapter(
        path=folder,
        files=files,
        sha256=hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest(),
        task_type=config.task_type,
        updates=updates,
        replacements=replacements,
        base_sha256=tensors.metadata.get("base_sha256"),
    )


def _open_weights(folder: Path) -> TensorFile:
    if (folder / PICKLE).exists() and not (folder / WEIGHTS).exists():
        raise AdapterError(f"{folder / PICKLE}: a pickle can run code when it is read; save the adapter again as {WEIGHTS}")
    try:
        return TensorFile(folder / WEIGHTS)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _take_all(tensors: TensorFile, config: PeftConfig) -> tuple[tuple[LowRank, ...], tuple[Replacement, ...]]:
    updates, replacements = [], []
    for key in sorted(tensors):
        name = key.removeprefix(PREFIX)
        if name == key:
            raise _left_over(tensors, key)
        if name.endswith(A):
            updates.append(_low_rank(tensors, name.removesuffix(A), config))
        elif name.endswith(B):
            if PREFIX + name.removesuffix(B) + A not in tensors:
                raise AdapterError(f"{tensors.path}: tensor '{key}' has no lora_A beside it; the file is incomplete, save it again")
        elif _is_saved_module(name, config) or (config.bias != "none" and name.endswith(".bias")):
            replacements.append(Replacement(name, _finite(tensors, key)))
        else:
            raise _left_over(tensors, key)
    if not updates and not replacements:
        raise AdapterError(f"{tensors.path}: holds no tensors; expected lora_A and lora_B of at least one module")
    return tuple(updates), tuple(replacements)


def _low_rank(tensors: TensorFile, module: str, config: PeftConfig) -> LowRank:
    key_a, key_b = PREFIX + module + A, PREFIX + module + B
    if key_b not in tensors:
        raise AdapterError(f"{tensors.path}: tensor '{key_a}' has no lora_B beside it; the file is incomplete, save it again")
    a, b, rank = _finite(tensors, key_a), _finite(tensors, key_b), config.rank(module)
    if a.ndim != 2 or b.ndim != 2:
        raise AdapterError(f"{tensors.path}: module '{module}' has factors of shapes {a.shape} and {b.shape}; only linear layers are supported yet")
    if a.shape[0] != rank or b.shape[1] != rank:
        raise AdapterError(
            f"{tensors.path}: module '{module}' has factors A {a.shape} and B {b.shape}, but {CONFIG} says rank {rank}; the two files do not belong together"
        )
    return LowRank(module, a, b, config.scaling(module), transposed=config.fan_in_fan_out)


def _finite(tensors: TensorFile, key: str) -> Array:
    values = tensors[key]
    if values.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
        raise AdapterError(f"{tensors.path}: tensor '{key}' has dtype {values.dtype}; expected a floating-point type")
    if not np.isfinite(values.astype(np.float32)).all():
        raise AdapterError(f"{tensors.path}: tensor '{key}' holds NaN or infinity; the training has diverged")
    return values


def _is_saved_module(name: str, config: PeftConfig) -> bool:
    """Whether the tensor belongs to a module of ``modules_to_save``, which names a module by its path or a suffix of it."""
    return any(f".{module}." in f".{name}" for module in config.modules_to_save or ())


def _left_over(tensors: TensorFile, key: str) -> AdapterError:
    return AdapterError(f"{tensors.path}: tensor '{key}' belongs to no LoRA layer, saved module or saved bias; merging would drop it")
