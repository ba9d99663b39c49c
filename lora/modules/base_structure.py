"""A base's structure as transformers knows it: its model class on the meta device, without weights, in about a second.

transformers' own table renames and joins the stored tensors, and its own ``_tied_weights_keys`` say what is tied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora.bases.structure import BaseStructure, Kind, Parameter, Piece, with_aliases
from lora.errors import CheckpointError
from lora.files.tensorfile import Array, shape_of
from lora.formats.model_class import ModelClass

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Stored:
    """The stored tensors that make one parameter, by the pattern of the conversion that joins them."""

    converter: Any
    names: dict[str, list[str]]


def ask_transformers(folder: Path, tensors: Mapping[str, Array], wanted: ModelClass) -> BaseStructure | None:
    """What ``structure_by_transformers`` says; None where transformers knows no such model."""
    try:
        return structure_by_transformers(folder, tensors, wanted)
    except CheckpointError:
        return None


def structure_by_transformers(folder: Path, tensors: Mapping[str, Array], wanted: ModelClass) -> BaseStructure:
    """The structure of the base in ``folder`` (its config.json) whose stored ``tensors`` these are.

    ``wanted`` says in which class the adapter was trained, as far as its file does. Raises CheckpointError when
    transformers does not know the configuration.
    """
    model = _skeleton(folder, wanted)
    stored, converted = _homes(model, {name: shape_of(tensors, name) for name in tensors})
    if wanted.name is not None and not stored:  # the class of a part, which this base has under other names
        return structure_by_transformers(folder, tensors, ModelClass())
    return _structure(model, stored, converted)


def structure_of_model(model: Any, tensors: Mapping[str, Array]) -> BaseStructure:
    """The structure of ``model``, on the meta device, over the base whose stored ``tensors`` these are."""
    return _structure(model, *_homes(model, {name: shape_of(tensors, name) for name in tensors}))


def _structure(model: Any, stored: Mapping[str, tuple[Piece, ...]], converted: Mapping[str, str]) -> BaseStructure:
    parameters = {
        name: Parameter(
            _kind(module, name, parameter), tuple(parameter.shape), stored.get(name, ()), converted.get(name, "")
        )
        for name, module, parameter in _parameters(model)
    }
    prefix = model.base_model_prefix
    return with_aliases(
        BaseStructure(
            model=type(model).__name__,
            parameters=parameters,
            tied=_tied(model),
            flag_unties=_flag_unties(model.config),
            complete=True,
            prefix=f"{prefix}." if prefix else "",
        )
    )


def _skeleton(folder: Path, wanted: ModelClass) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        config.__dict__.pop("quantization_config", None)  # the dense model's names, whatever the weights are stored as
        made_by = _class(transformers, config, wanted)
        if made_by.config_class is not None and not isinstance(config, made_by.config_class):
            config = made_by.config_class.from_pretrained(folder)
        with torch.device("meta"):
            return made_by._from_config(config)
    except (ValueError, KeyError, OSError, AttributeError, TypeError, ImportError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} can't make this model ({first_line});"
            " install the version that the base was saved with"
        ) from error


def _class(transformers: Any, config: Any, wanted: ModelClass) -> Any:
    """The adapter's own class; that of its task; or the one that saved the base."""
    if wanted.name is not None and hasattr(transformers, wanted.name):
        return getattr(transformers, wanted.name)
    if wanted.task_type in AUTO_CLASSES:
        known = getattr(transformers, AUTO_CLASSES[wanted.task_type])._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    names = getattr(config, "architectures", None) or []
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    return transformers.AutoModel._model_mapping[type(config)]


def _parameters(model: Any) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name, module, parameter


def _kind(module: nn.Module, name: str, parameter: nn.Parameter) -> Kind:
    from transformers.pytorch_utils import Conv1D

    match module:
        case nn.Linear():
            return "linear"
        case Conv1D():
            return "conv1d"
        case nn.Embedding():
            return "embedding"
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return "convolution"
        case nn.MultiheadAttention():
            return "attention"
    if parameter.ndim == 3 and ("Expert" in type(module).__name__ or ".experts." in name):
        return "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
    return "norm" if "Norm" in type(module).__name__ else "other"


def _tied(model: Any) -> tuple[tuple[str, ...], ...]:
    groups: dict[str, list[str]] = defaultdict(list)
    for target, source in sorted(model.all_tied_weights_keys.items()):
        groups[source].append(target)
    return tuple((source, *targets) for source, targets in sorted(groups.items()))


def _flag_unties(config: Any) -> bool:
    """Whether the flag, set to false, is kept and changes nothing else. T5 takes it for another setting."""
    fields = config.to_dict()
    tied, untied = (type(config).from_dict({**fields, "tie_word_embeddings": flag}).to_dict() for flag in (True, False))
    return untied.get("tie_word_embeddings") is False and not {
        name for name in tied if tied[name] != untied.get(name)
    } - {"tie_word_embeddings"}


def _homes(model: Any, shapes: Shapes) -> tuple[dict[str, tuple[Piece, ...]], dict[str, str]]:
    """{parameter: where it is stored}, and {parameter: a conversion that is not understood here}."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    homes: dict[str, tuple[Piece, ...]] = {}
    joined: dict[str, _Stored] = {}
    for name in sorted(shapes, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:  # spelled as the module spells it already
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            continue
        if pattern is None:
            homes[renamed] = (Piece(name),)
        else:
            group = joined.setdefault(renamed, _Stored(by_pattern[pattern], {}))
            group.names.setdefault(pattern, []).append(name)
    converted: dict[str, str] = {}
    for parameter, group in joined.items():
        pieces = _pieces(parameter, group, shapes)
        if pieces is None:
            words = ", ".join(type(one).__name__ for one in group.converter.operations)
            converted |= dict.fromkeys(_targets(parameter, group.converter), words)
        else:
            homes |= pieces
    return homes, converted


def _pieces(parameter: str, group: _Stored, shapes: Shapes) -> dict[str, tuple[Piece, ...]] | None:
    """Where a parameter's parts lie, by the conversions that join or cut; None for any other conversion."""
    patterns = sorted(group.names, key=group.converter.source_patterns.index)
    match [(type(one).__name__, getattr(one, "dim", None)) for one in group.converter.operations]:
        case [("MergeModulelist", 0)]:
            names = group.names[patterns[0]]
            return {parameter: tuple(Piece(name, ((index, index + 1),)) for index, name in enumerate(names))}
        case [("MergeModulelist", 0), ("Concatenate", 1)]:
            return {parameter: tuple(_joined_experts([group.names[pattern] for pattern in patterns], shapes))}
        case [("Concatenate", 0)]:
            names = [name for pattern in patterns for name in group.names[pattern]]
            return {parameter: tuple(Piece(name, (rows,)) for name, rows in _rows(names, shapes))}
        case [("Chunk", 0)]:
            (name,) = group.names[patterns[0]]
            targets = _targets(parameter, group.converter)
            size = shapes[name][0] // len(targets)
            return {
                target: (Piece(name, of=((index * size, (index + 1) * size),)),) for index, target in enumerate(targets)
            }
    return None


def _joined_experts(columns: list[list[str]], shapes: Shapes) -> Iterator[Piece]:
    """Of each expert, its gate and its up projection, one below the other."""
    for expert, names in enumerate(zip(*columns, strict=True)):
        for name, rows in _rows(list(names), shapes):
            yield Piece(name, ((expert, expert + 1), rows))


def _rows(names: list[str], shapes: Shapes) -> Iterator[tuple[str, tuple[int, int]]]:
    start = 0
    for name in names:
        yield name, (start, start + shapes[name][0])
        start += shapes[name][0]


def _targets(parameter: str, converter: Any) -> list[str]:
    first = converter.target_patterns[0]
    return [parameter.replace(first, target) for target in converter.target_patterns]
