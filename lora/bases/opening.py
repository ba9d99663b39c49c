"""Opening a base, whatever it is stored as, and saying what stands for W in W + ΔW.

A quantized base has two dense readings that differ: the weights before quantization, which the file no longer has, and
what the quantized ones stand for. An adapter fits the one it was trained on, so neither is ever taken for the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora.bases.bnb4 import Bnb4, is_bnb4
from lora.bases.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, fingerprint, read_config
from lora.bases.gguf_llama import MAGIC, GgufBase
from lora.bases.structure import BaseStructure
from lora.bases.tensors import BaseTensors
from lora.errors import CheckpointError
from lora.files.tensorfile import file_sha256

DENSE = "W + ΔW"
BITSANDBYTES = "bitsandbytes"
# Where config.json says how the weights are quantized, at its top or inside a part such as text_config.
CONFIG_KEYS = ("quantization_config", "compression_config")
# Files in which older or other tools say it instead.
SIDE_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
    "quantization_map.json": "quanto",
}
# The tensors that a method leaves in a module, where no file says it. The first match counts.
SIGNATURES = (
    ((".qweight", ".qzeros", ".g_idx"), "GPTQ"),
    ((".qweight", ".qzeros"), "AWQ"),
    ((".qweight",), "GPTQ or the like"),
    ((".W_q",), "HQQ"),
    ((".codes", ".codebooks"), "AQLM"),
    ((".SCB", ".weight"), "bitsandbytes 8-bit"),
    ((".weight_scale_inv", ".weight"), "fp8 in blocks"),
    ((".weight_packed", ".weight_scale"), "compressed-tensors"),
    ((".weight_scale", ".weight"), "fp8 or 8-bit with scales"),
    ((".weight_scales", ".weight"), "EETQ"),
    ((".weight._data", ".weight._scale"), "quanto"),
    (("_blocks", "_scales"), "MXFP4"),
)


@dataclass(frozen=True)
class Base:
    """A base's dense weights by parameter name, read one at a time, and the ``formula`` of a merge into them.

    ``path`` is what was opened. ``folder`` holds config.json and the tokenizer (None: a GGUF file has no such folder),
    and ``config`` is that configuration for a dense model: it says nothing of a quantization. ``structure`` is what is
    known of the model; None until it was asked for.
    """

    path: Path
    tensors: BaseTensors
    formula: str
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    structure: BaseStructure | None = None

    def fingerprint(self) -> str:
        """SHA-256 that identifies the weights as they are stored."""
        return file_sha256(self.path) if self.folder is None else fingerprint(self.folder)


def open_base(path: Path, dequantize: bool = False) -> Base:
    """Open a checkpoint folder or a GGUF file. A quantized base is opened only with ``dequantize``.

    Raises CheckpointError when it can't be read, is quantized and ``dequantize`` is not given, or is quantized in a way
    that can't be undone here.
    """
    if path.suffix == ".gguf" or _is_gguf(path):
        return _open_gguf(path, dequantize)
    _check_folder(path)
    config = read_config(path)
    declared = _declared(path, config)
    stored = Checkpoint(path)
    if is_bnb4(stored):
        tensors = Bnb4(stored, path)
        _check_names(path, stored, set(tensors.states))
        formula = _formula(path, "bitsandbytes", _bnb4_types(tensors), dequantize)
        return Base(path, tensors, formula, path, _dense_config(config))
    if declared is not None:
        raise CheckpointError(
            f"{path / CONFIG}: says that the weights are bitsandbytes 4-bit, but none has a quant state; "
            f"if they are dense, remove {CONFIG_KEYS[0]}, else save the base again"
        )
    _check_names(path, stored, set())
    return Base(path, stored, DENSE, path, config)


def _open_gguf(path: Path, dequantize: bool) -> Base:
    tensors = GgufBase(path)
    formula = _formula(path, "GGUF", ", ".join(tensors.quantized), dequantize) if tensors.quantized else DENSE
    return Base(path, tensors, formula)


def _formula(path: Path, kind: str, types: str, dequantize: bool) -> str:
    formula = f"dequant({types}) + ΔW"
    if not dequantize:
        raise CheckpointError(
            f"{path}: this base is quantized ({kind}: {types}), and an adapter fits the weights that it was trained on;"
            f" give the unquantized base for W16 + ΔW, or pass --dequantize for {formula} (right for QLoRA on these"
            " very weights)"
        )
    return formula


def _bnb4_types(tensors: Bnb4) -> str:
    return "W4, " + ", ".join(sorted({state.quant_type for state in tensors.states.values()}))


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _check_folder(path: Path) -> None:
    if path.is_file():
        raise CheckpointError(
            f"{path}: neither a checkpoint folder nor a GGUF file; give the folder with {CONFIG} and {SINGLE}"
        )
    files = sorted(path.glob("*.gguf"))
    if files and not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        raise CheckpointError(
            f"{path}: holds no safetensors weights but GGUF files; give one of them, such as {files[0]}"
        )


def _declared(path: Path, config: Mapping[str, Any]) -> str | None:
    """What the files beside the weights say: None, or bitsandbytes for 4-bit. Any other method is refused here, by
    name.
    """
    for side_file, method in SIDE_FILES.items():
        if (path / side_file).is_file():
            raise _refusal(path / side_file, method)
    declared = None
    for key, entry in _quantizations(config):
        method = str(
            entry.get("quant_method")
            or (BITSANDBYTES if "load_in_4bit" in entry or "load_in_8bit" in entry else "not named")
        )
        if method != BITSANDBYTES:
            raise _refusal(path / CONFIG, method, f" in {key}")
        if entry.get("load_in_8bit"):
            raise _refusal(path / CONFIG, "bitsandbytes 8-bit", f" in {key}")
        declared = BITSANDBYTES
    return declared


def _quantizations(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for owner in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in CONFIG_KEYS:
            entry = owner.get(key)
            if isinstance(entry, dict) and entry:
                yield key, entry


def _dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {inner: value[inner] for inner in value if inner not in CONFIG_KEYS} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _check_names(path: Path, stored: Checkpoint, known: set[str]) -> None:
    """Refuse weights that are quantized though no file says so: by the tensors' names, or a matrix of integers."""
    for name in stored:
        for (first, *others), method in SIGNATURES:
            if name.endswith(first) and all(name.removesuffix(first) + other in stored for other in others):
                raise _refusal(path, method, f" by tensor '{name}'")
        span = stored.span(name)
        if name.endswith(".weight") and name not in known and len(span.shape) > 1 and span.dtype.kind in "iub":
            raise _refusal(path, "not named", f" by tensor '{name}' of {span.dtype}")


def _refusal(path: Path, method: str, where: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path}: quantized by method '{method}'{where}, which can't be undone here; give the unquantized base"
    )
