"""Reading a PEFT adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, a torch state
dict).

Keys are ``base_model.model.<module>.<slot>``, where the slot says which part of the layer the tensor is; saved modules
and biases stand under ``base_model.model.<parameter>``. ``base_layer`` in a path is PEFT's wrapper around the module.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from lora.adapter import Adapter, Change, Increment, Layout, LowRank, Replacement, Rows
from lora.errors import AdapterError
from lora.files.mapped import MappedFile
from lora.formats.factors import Factors, identity, open_factors
from lora.formats.peft_config import MethodConfig, PeftConfig, parse_config, read_config
from lora.formats.peft_types import method_changes, refuse_unknown_method

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LINEAR_A, LINEAR_B, LINEAR_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE, TOKENS = ".lora_magnitude_vector", ".token_adapter.trainable_tokens_delta"
WRAPPER = ".base_layer"
SLOTS = "lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save"
# The name of an adapter within a key, which PEFT leaves out when it saves.
ADAPTER_NAME = re.compile(rf"\.(?P<slot>{SLOTS})\.(?P<name>(?!weight$|bias$)[^.]+)(?=\.|$)")
# PEFT saves these whole when the vocabulary was resized, whether or not modules_to_save names them.
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "tok_embeddings")


def read_peft(folder: Path) -> Adapter:
    """Read the adapter in ``folder``.

    Raises AdapterError when a file is missing or damaged, a field can't be honoured, or a tensor is left over.
    """
    config = read_config(folder / CONFIG)
    _refuse_unknown(folder, config)  # before files are asked for that such a method does not have
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
    _refuse_unknown(folder, config)
    return _adapter(folder, config, (by_name[CONFIG], by_name[tensors[0]]))


def _refuse_unknown(folder: Path, config: PeftConfig | MethodConfig) -> None:
    if isinstance(config, MethodConfig):
        refuse_unknown_method(folder / CONFIG, config.peft_type)


def _adapter(
    folder: Path, config: PeftConfig | MethodConfig, files: tuple[Path | MappedFile, Path | MappedFile]
) -> Adapter:
    opened, metadata = open_factors(files[1])
    factors = _without_adapter_names(opened)
    return Adapter(
        path=folder,
        format="PEFT",
        files=tuple(file.path if isinstance(file, MappedFile) else file for file in files),
        sha256=identity(files),
        changes=_changes(factors, config),
        task_type=config.task_type,
        base_sha256=metadata.get("base_sha256"),
        model_class=config.model_class,
    )


def _without_adapter_names(factors: Factors) -> Factors:
    """Keys as PEFT saves them; where a state dict was saved as it is, its keys hold the adapter's name ("default").

    Raises AdapterError when the file holds several adapters.
    """
    matches = {key: ADAPTER_NAME.search(key) for key in factors.names()}
    names = {match["name"] for match in matches.values() if match is not None}
    if not names:
        return factors
    if len(names) > 1:
        raise AdapterError(
            f"{factors.path}: holds the adapters {', '.join(sorted(names))} at once; save the one that is meant with"
            " save_pretrained"
        )
    plain = {_plain(key, match): key for key, match in matches.items() if ".original_module." not in key}
    return factors.renamed(plain)


def _plain(key: str, match: re.Match[str] | None) -> str:
    """The key without the adapter's name: of a module that is saved whole, without the copy's own name too."""
    if match is None:
        return key
    if match["slot"] == "modules_to_save":
        return key[: match.start()] + key[match.end() :]
    rest = "" if match["slot"] == "lora_magnitude_vector" else key[match.end() :]
    return f"{key[: match.start()]}.{match['slot']}{rest}"


def _changes(factors: Factors, config: PeftConfig | MethodConfig) -> tuple[Change, ...]:
    if isinstance(config, MethodConfig):
        return method_changes(factors, config, PREFIX)
    return peft_changes(factors, config, PREFIX)


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
    module, parameters = _unwrapped(path), _bare_parameters(factors, config, prefix, path)
    lookup = f"{module}.{parameters[0]}" if parameters else module
    rank, scaling = config.rank(lookup), config.scaling(lookup)
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


def _bare_parameters(factors: Factors, config: PeftConfig, prefix: str, path: str) -> tuple[str, ...]:
    """The parameters of this module that ``target_parameters`` names; which of several a tensor is for, its shape
    tells, and where their ranks differ, those.
    """
    module = _unwrapped(path)
    named = [target.rpartition(".") for target in config.target_parameters or ()]
    parameters = tuple(name for owner, _, name in named if owner and f".{module}".endswith(f".{owner}"))
    if not parameters and not config.targets(module):
        parameters = tuple(name for owner, _, name in named if not owner)
    if len({_rank_and_scaling(config, module, parameter) for parameter in parameters}) < 2:
        return parameters
    return _by_rank(factors, config, prefix, path, parameters)


def _rank_and_scaling(config: PeftConfig, module: str, parameter: str) -> tuple[int, float]:
    lookup = f"{module}.{parameter}"
    return config.rank(lookup), config.scaling(lookup)


def _by_rank(
    factors: Factors, config: PeftConfig, prefix: str, path: str, parameters: tuple[str, ...]
) -> tuple[str, ...]:
    """A has rank times experts rows, and all of a module's parameters have as many experts: that tells whose each is.

    Raises AdapterError where more than one reading is left.
    """
    module = _unwrapped(path)
    keys = [key for key in factors.names() if key.endswith(LINEAR_A)]
    paths = [key.removeprefix(prefix).removesuffix(LINEAR_A) for key in keys]
    rows = {one: factors.shape(key)[0] for one, key in zip(paths, keys, strict=True) if _unwrapped(one) == module}
    readings = set()
    for order in itertools.permutations(parameters, len(rows)):
        ranks = [config.rank(f"{module}.{parameter}") for parameter in order]
        experts = {size / rank for size, rank in zip(rows.values(), ranks, strict=True)}
        if len(experts) == 1 and next(iter(experts)).is_integer():
            readings.add(order[list(rows).index(path)])
    if len({_rank_and_scaling(config, module, parameter) for parameter in readings}) != 1:
        raise AdapterError(
            f"{factors.path}: the parameters {', '.join(parameters)} of '{module}' differ in rank or alpha, and the"
            " file does not say whose a tensor is"
        )
    return tuple(sorted(readings, key=parameters.index))


def _is_saved(name: str, config: PeftConfig) -> bool:
    """A tensor of ``modules_to_save`` (named by its path or a suffix of it), a saved bias, or a saved embedding."""
    if any(f"{module}." in name for module in config.modules_to_save or ()):  # PEFT asks for the path's end only
        return True
    if config.bias != "none" and name.endswith(".bias"):
        return not name.endswith(LINEAR_BIAS)
    module, _, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias") or ".lora_" in name:
        return False
    return module.endswith(WRAPPER) or _unwrapped(module).rpartition(".")[2] in EMBEDDINGS


def _unwrapped(path: str) -> str:
    return path.replace(WRAPPER, "")
