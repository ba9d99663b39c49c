"""An adapter's way between a torch model and PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Field and key names: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora.adapter import LowRank, Replacement
from lora.errors import AdapterError
from lora.files.durable import flush, staging_folder
from lora.files.tensorfile import Lazy, write_tensors
from lora.formats.peft import CONFIG, EMBEDDING_A, EMBEDDING_B, LINEAR_A, LINEAR_B, PREFIX, WEIGHTS, read_peft
from lora.modules.layers import CHILD, Injection, Lora, adapted, attach


def save(
    model: nn.Module, injection: Injection, folder: Path, task_type: str | None = None, base_sha256: str | None = None
) -> None:
    """Write what was trained into a new folder: the factors, and the heads whole.

    The folder is there whole or not at all.

    A fused layer's parts are one product with zeros between the blocks, of ``parts · rank`` and the same scaling.
    Raises AdapterError when the folder exists or can't be written, or the file could not say how the layers store their
    weights.
    """
    if folder.exists():
        raise AdapterError(f"{folder}: exists already; choose another folder, or remove it")
    count = sum(injection.parts)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "r": injection.rank * count,
        "lora_alpha": injection.alpha * count,
        "lora_dropout": injection.dropout,
        "target_modules": injection.targets if isinstance(injection.targets, str) else sorted(injection.targets),
        "modules_to_save": sorted(injection.heads) or None,
        "fan_in_fan_out": _fan_in_fan_out(model, folder),
        "bias": "none",
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    tensors = {name: _lazy(values) for name, values in _trained(model).items()}
    try:
        with staging_folder(folder) as stage:
            (stage / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            write_tensors(
                stage / WEIGHTS, tensors, {"format": "pt", **({"base_sha256": base_sha256} if base_sha256 else {})}
            )
            flush(stage / CONFIG)
            stage.chmod(0o755)
            stage.rename(folder)
            flush(folder.parent)
    except OSError as error:
        raise AdapterError(
            f"{folder}: can't be written ({error.strerror}); choose a folder that is yours, with room in it"
        ) from error


def _fan_in_fan_out(model: nn.Module, folder: Path) -> bool:
    """Whether the file says (in, out).

    It says so once for all layers: a reader goes by the shape where it can, so square ones decide.
    """
    layers = [
        (layer.weight.shape, factors.transposed)
        for _, layer, factors in adapted(model)
        if not isinstance(layer, nn.Embedding)
    ]
    square = {transposed for shape, transposed in layers if shape[0] == shape[1]}
    if len(square) > 1:
        raise AdapterError(
            f"{folder}: has square layers stored (out, in) and others stored (in, out), which PEFT's file can't tell"
            " apart; train them apart"
        )
    return square.pop() if square else any(transposed for _, transposed in layers)


def load(model: nn.Module, folder: Path) -> None:
    """Attach the adapter in ``folder`` to ``model``, where it may be trained on; all else is frozen.

    Raises AdapterError as reading it does, and when it changes the model in a way that has no layer here:
    ``lorafuse merge`` knows more forms.
    """
    model.requires_grad_(False)
    for change in read_peft(folder).changes:
        match change:
            case LowRank(magnitude=None, layout="linear" | "transposed"):
                layer = _found(model.get_submodule, change.module, folder)
                if CHILD in layer._modules:
                    raise AdapterError(
                        f"{folder}: '{change.module}' of the model has LoRA already; load it into a model that has none"
                    )
                attach(layer, _factors(layer, change, folder))
            case Replacement():
                parameter = _found(model.get_parameter, change.parameter, folder)
                if tuple(parameter.shape) != change.value.shape:
                    raise AdapterError(
                        f"{folder}: '{change.parameter}' has shape {change.value.shape}, in the model"
                        f" {tuple(parameter.shape)}; load another base"
                    )
                parameter.data = torch.from_numpy(change.value.astype("float32")).to(parameter.data)
                parameter.requires_grad = True
            case _:
                raise AdapterError(
                    f"{folder}: changes the model by more than low-rank products and whole modules; merge it with"
                    " 'lorafuse merge'"
                )


def _factors(layer: nn.Module, change: LowRank, folder: Path) -> Lora:
    factors = Lora(layer, change.rank, change.scaling)
    for name, values in (("A", change.a), ("B", change.b)):
        parameter = factors.get_parameter(name)
        if tuple(parameter.shape) != values.shape:
            raise AdapterError(
                f"{folder}: {name} of '{change.module}' has shape {values.shape}, expected {tuple(parameter.shape)};"
                " load another base"
            )
        parameter.data = torch.from_numpy(values.astype("float32"))
    return factors


def _found(get: Any, name: str, folder: Path) -> Any:
    try:
        return get(name)
    except AttributeError as error:
        raise AdapterError(f"{folder}: the model has no '{name}'; the adapter was trained on another") from error


def _trained(model: nn.Module) -> Mapping[str, Tensor]:
    """The tensors by their keys in PEFT's file."""
    tensors: dict[str, Tensor] = {}
    for path, layer, factors in adapted(model):
        embedding = isinstance(layer, nn.Embedding)
        tensors[PREFIX + path + (EMBEDDING_A if embedding else LINEAR_A)] = factors.A
        tensors[PREFIX + path + (EMBEDDING_B if embedding else LINEAR_B)] = factors.whole()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f".{CHILD}." not in name:
            tensors[PREFIX + name] = parameter
    return tensors


def _lazy(values: Tensor) -> Lazy:
    array = values.detach().float().cpu().contiguous().numpy()
    return Lazy(array.dtype, array.shape, lambda: array)
