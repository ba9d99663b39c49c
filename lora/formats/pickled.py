"""Torch state dicts (``.bin``, ``.ckpt``, ``.pt``): pickles, which can run code unless torch's restricted reader opens
them.

The only module here that imports torch, and only when such a file is read.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.files.tensorfile import Array, numpy_dtype

# Before it, the restricted reader could be made to run code: CVE-2025-32434 (mended in 2.6) and CVE-2026-24747 (in
# 2.10).
SAFE_TORCH = (2, 10)


def read_pickle(source: Path | MappedFile) -> dict[str, Array]:
    """{name: array} of a state dict. Nothing in the file is run.

    Raises AdapterError when torch is missing or too old, the file is damaged, or it holds anything besides tensors.
    """
    path = source.path if isinstance(source, MappedFile) else source
    torch = _torch(path)
    if isinstance(source, Path) and not source.is_file():
        raise AdapterError(f"{path}: no such file; expected a torch state dict")
    try:
        state = torch.load(
            source if isinstance(source, Path) else io.BytesIO(source.content), map_location="cpu", weights_only=True
        )
    except (
        Exception
    ) as error:  # bytes of anybody's making: what the readers of zip, tar and pickle raise on them is no short list
        raise AdapterError(
            f"{path}: damaged, or holds more than tensors, which could run code when read ({type(error).__name__});"
            " save the state dict alone, as safetensors"
        ) from error
    if not isinstance(state, dict) or not state:
        raise AdapterError(f"{path}: holds no tensors by name; save the state dict itself, as safetensors")
    return {_name(path, name): _array(torch, path, name, value) for name, value in state.items()}


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise AdapterError(
            f"{path}: reading a torch file needs torch; install it, or convert the file to safetensors"
        ) from error
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise AdapterError(
            f"{path}: torch {torch.__version__} can be made to run code by such a file; update it to 2.10, or convert"
            " the file to safetensors"
        )
    return torch


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str):
        raise AdapterError(
            f"{path}: holds no tensors by name (a key is {name!r}); save the state dict itself, as safetensors"
        )
    return name


def _array(torch: Any, path: Path, name: str, value: Any) -> Array:
    """The tensor as numpy has it. Numpy lacks bfloat16: its bytes are taken over and given ml_dtypes' type."""
    if not isinstance(value, torch.Tensor):
        raise AdapterError(
            f"{path}: '{name}' is a {type(value).__name__}, not a tensor; save the state dict alone, as safetensors"
        )
    values = value.detach()
    try:
        if values.dtype == torch.bfloat16:
            return np.asarray(values.view(torch.int16).numpy().view(numpy_dtype("bfloat16")))
        return np.asarray(values.numpy())
    except (RuntimeError, TypeError) as error:  # sparse, quantised, without data
        raise AdapterError(
            f"{path}: tensor '{name}' ({values.dtype}, {values.layout}) has no plain values; save the adapter in a"
            " dense float type"
        ) from error
