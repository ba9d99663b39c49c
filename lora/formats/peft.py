"""Reading a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, a torch state
dict).

Keys are ``base_model.model.<module>.<slot>``, where the slot says which part of the layer the tensor is; saved modules
and biases stand under ``base_model.model.<parameter>``. ``base_layer`` in a path is PEFT's wrapper around the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora.adapter import Adapter, Change, Increment, Layout, LowRank, Replacement, Rows
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.formats.factors import Factors, identity, open_factors
from lora.formats.peft_config import PeftConfig, parse_config, read_config

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LINEAR_A, LINEAR_B, LINEAR_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE, TOKENS = ".lora_magnitude_vector", ".token_adapter.trainable_tokens_delta"
WRAPPER = ".base_layer"
# PEFT saves these whole when the vocabulary was resized, whether or not modules_to_save names them.
EMBEDDINGS = ("embed_tokens", "lm_head")


def read_peft(folder: Path) -> Adapter:
    """Read the adapter in ``folder``.

    Raises AdapterError when a file is missing or damaged, a field can't be honoured, or a tensor is left over.
    """
    config = read_config(folder / CONFIG)
    pickled = (folder / PICKLE).exists() and not (folder / WEIGHTS).exists()
    files = (folder / CONFIG, folder / (PICKLE if pickled else WEIGHTS))
    return _adapter(folder, config, files)


def read_peft_files(folder: Path, files: Sequence[MappedFile]) -> Adapter:
    """Read an adapter from its files, which are in memory: whatever else lies in ``folder`` is no part of it.

    Raises AdapterError as ``read_peft`` does, and when the files are not one configuration and one file of tensors.
    """
    by_name = {file.path.name: file for file in files}
    tensors = [name for name in (WEIGHTS, PICKLE) if name in by_name]
    if len(by_name) != len(files) or len(tensors) != 1 or by_name.keys() != {CONFIG, tensors[0]}:
        names = ", ".join(sorted(file.path.name for file in files))
        raise AdapterError(f"{folder}: the adapter is the files {names}; expected {CONFIG}, and {WEIGHTS} or {PICKLE}")
    config = parse_config(by_name[CONFIG].path, bytes(by_name[CONFIG].content))
    return _adapter(folder, config, (by_name[CONFIG], by_name[tensors[0]]))


def _adapter(folder: Path, config: PeftConfig, files: tuple[Path | MappedFile, Path | MappedFile]) -> Adapter:
    factors, metadata = open_factors(files[1])
    return Adapter(
        path=folder,
        format="PEFT",
        files=tuple(file.path if isinstance(file, MappedFile) else file for file in files),
        sha256=identity(files),
        changes=peft_changes(factors, config, PREFIX),
        task_type=config.task_type,
        base_sha256=metadata.get("base_sha256"),
    )


def peft_changes(factors: Factors, config: PeftConfig, prefix: str) -> tuple[Change, ...]:
    """Every change that the file's tensors make: replaced tensors first, updates on top of them.

    All keys bear ``prefix``.
    """
    replaced: list[Change] = []
    updates: list[Change] = []
    for key in factors.names():
        name = key.removeprefix(prefix)
        if name == key and prefix:
            continue  # left over, and named at the end
        if name.endswith(LINEAR_A):
            updates += _linear(factors, config, prefix, name.removesuffix(LINEAR_A))
        elif name.endswith(EMBEDDING_A):
            updates.append(_embedding(factors, config, prefix, name.removesuffix(EMBEDDING_A)))
        elif name.endswith(TOKENS):
            updates.append(_tokens(factors, config, prefix, name.removesuffix(TOKENS)))
        elif _is_saved(name, config):
            replaced.append(Replacement(_unwrapped(name), factors.take(key)))
    factors.done()
    return (*replaced, *updates)


def _linear(factors: Factors, config: PeftConfig, prefix: str, path: str) -> list[Change]:
    """A linear or convolutional layer, an attention's input projection, or a stack of experts; with lora_B's bias, if
    any.
    """
    module, parameters = _unwrapped(path), _bare_parameters(path, config)
    lookup = f"{module}.{parameters[0]}" if parameters else module
    rank, scaling = config.rank(lookup), config.scaling(lookup)
    if {(config.rank(name), config.scaling(name)) for name in (f"{module}.{parameter}" for parameter in parameters)} - {
        (rank, scaling)
    }:
        raise AdapterError(
            f"{factors.path}: the parameters {', '.join(parameters)} of '{module}' differ in rank or alpha, and the"
            " file does not say whose a tensor is"
        )
    a, b = factors.take_pair(prefix + path + LINEAR_A, prefix + path + LINEAR_B, None if parameters else rank, module)
    layout: Layout = (
        "experts" if parameters else "conv" if a.ndim > 2 else "transposed" if config.fan_in_fan_out else "linear"
    )
    changes: list[Change] = [
        LowRank(
            module=module,
            a=a,
            b=b,
            rank=rank,
            scaling=scaling,
            layout=layout,
            magnitude=factors.take(prefix + path + MAGNITUDE) if config.use_dora else None,
            parameters=parameters or ("weight", "in_proj_weight"),
        )
    ]
    if config.lora_bias:
        changes.append(Increment(module, factors.take(prefix + path + LINEAR_BIAS), scaling))
    return changes


def _embedding(factors: Factors, config: PeftConfig, prefix: str, path: str) -> LowRank:
    module = _unwrapped(path)
    a, b = factors.take_pair(prefix + path + EMBEDDING_A, prefix + path + EMBEDDING_B, config.rank(module), module)
    magnitude = factors.take(prefix + path + MAGNITUDE) if config.use_dora else None
    return LowRank(module, a, b, config.rank(module), config.scaling(module), "transposed", magnitude)


def _tokens(factors: Factors, config: PeftConfig, prefix: str, path: str) -> Rows:
    module, values = _unwrapped(path), factors.take(prefix + path + TOKENS)
    rows = config.token_rows(module)
    if values.ndim != 2 or len(rows) != values.shape[0]:
        raise AdapterError(
            f"{factors.path}: '{module}' has trained tokens of shape {values.shape}, but {CONFIG} lists {len(rows)}"
            " token indices"
        )
    return Rows(module, rows, values)


def _bare_parameters(path: str, config: PeftConfig) -> tuple[str, ...]:
    """The parameters of this module that ``target_parameters`` names; which of several a tensor is for, its shape
    tells.
    """
    module = _unwrapped(path)
    named = (target.rpartition(".") for target in config.target_parameters or ())
    return tuple(parameter for owner, _, parameter in named if f".{module}".endswith(f".{owner}"))


def _is_saved(name: str, config: PeftConfig) -> bool:
    """A tensor of ``modules_to_save`` (named by its path or a suffix of it), a saved bias, or a saved embedding."""
    if any(f".{module}." in f".{name}" for module in config.modules_to_save or ()):
        return True
    if config.bias != "none" and name.endswith(".bias"):
        return not name.endswith(LINEAR_BIAS)
    return (
        name.endswith(f"{WRAPPER}.weight") or _unwrapped(name).removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS
    )


def _unwrapped(path: str) -> str:
    return path.replace(WRAPPER, "")
