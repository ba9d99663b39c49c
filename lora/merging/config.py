"""The configuration of a merged model: the base's, but for what the merge has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lora.adapter import Replacement
from lora.bases.checkpoint import INPUT_EMBEDDINGS
from lora.bases.opening import Base
from lora.bases.structure import BaseStructure
from lora.files.tensorfile import shape_of
from lora.merging.merge import Targets
from lora.merging.untying import Untying

LABELS, CLASSIFIERS = "id2label", ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
# The last layer of a classifier, where it has several.
LAST = ("out_proj", "classifier", "score")
DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the name in transformers 4
Config = dict[str, Any]


def merged_config(base: Base, untying: Untying, dtype: str | None) -> Config:
    """What config.json is to say; ``dtype`` is what the weights are to be loaded in, None for the base's."""
    config: Config = json.loads(json.dumps(base.config))
    if untying.flag:
        _everywhere(config, "tie_word_embeddings", False)
        config["tie_word_embeddings"] = False
    if dtype is not None:
        for key in DTYPE_KEYS:
            _everywhere(config, key, dtype)
        if not any(key in config for key in DTYPE_KEYS):
            config["dtype"] = dtype
    _set_vocabulary(config, base, untying.targets)
    if base.structure is not None:
        _set_head(config, base, base.structure, untying.targets)
    return config


def _everywhere(config: Config, key: str, value: object) -> None:
    """Set ``key`` where it stands, in parts such as text_config too."""
    if key in config:
        config[key] = value
    for part in config.values():
        if isinstance(part, dict):
            _everywhere(part, key, value)


def _set_vocabulary(config: Config, base: Base, targets: Targets) -> None:
    """A replaced embedding of another size is a resized vocabulary."""
    for name, value in _replaced(targets).items():
        if name.endswith(INPUT_EMBEDDINGS) and name in base.tensors:
            before, after = shape_of(base.tensors, name)[0], value.value.shape[0]
            for part in (config, *(part for part in config.values() if isinstance(part, dict))):
                if before != after and part.get("vocab_size") == before:
                    part["vocab_size"] = after


def _set_head(config: Config, base: Base, structure: BaseStructure, targets: Targets) -> None:
    """A head that is new, or of another size, makes another class of model: it is named, and its labels counted."""
    heads = {
        name: change.value.shape
        for name, change in _replaced(targets).items()
        if change.value.ndim == 2 and (name not in base.tensors or shape_of(base.tensors, name) != change.value.shape)
    }
    if not heads or not structure.model:
        return
    config["architectures"] = [structure.model]
    last = next((name for part in LAST for name in heads if name.split(".")[-2] == part), None)
    if last is None or not structure.model.endswith(CLASSIFIERS):
        return
    count = heads[last][0]
    if len(config.get(LABELS) or ()) != count:
        names = [f"LABEL_{index}" for index in range(count)]
        config[LABELS] = {str(index): name for index, name in enumerate(names)}
        config["label2id"] = {name: index for index, name in enumerate(names)}


def _replaced(targets: Targets) -> Mapping[str, Replacement]:
    return {
        name: change for name, changes in targets.items() for change in changes[:1] if isinstance(change, Replacement)
    }
