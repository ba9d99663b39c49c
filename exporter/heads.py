"""Which dense model an adapter was trained in: its task type and how many outputs it has. Reads JSON only, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.bundle.records import MODEL, Head
from exporter.bundle.structure import towers_of_class
from exporter.bundle.task_types import TASK_TYPES
from lora.adapter import Adapter, Blend, Replacement, Rows
from lora.bases.checkpoint import INPUT_EMBEDDINGS, OUTPUT_EMBEDDING, read_config
from lora.errors import ExportError

# What a task type alone does not say: the Whisper model that is exported is its encoder, whatever it was trained in.
ENCODERS = ("whisper",)
# Models of two parts, of which one is exported: what it is called, and what stands in the path of the other's modules.
ONE_OF_TWO: Mapping[str, tuple[str, str]] = {"whisper": ("encoder", "decoder")}
# What configurations call the width of a model's outputs.
WIDTHS = ("projection_dim", "hidden_size", "d_model", "dim", "n_embd")
# Models of two towers, which are two parts where an adapter changes the text's: what their modules' paths begin with.
TOWERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "clip": {"text": ("text_model", "text_projection"), "vision": ("vision_model", "visual_projection")}
}
# The last linear layer of transformers' classification heads; its rows are the classes.
HEAD_WEIGHTS = ("classifier.weight", "classifier.out_proj.weight", "score.weight", "qa_outputs.weight")


def heads_of(adapter: Adapter, folder: Path, task_type: str | None = None, apart: bool = False) -> dict[str, Head]:
    """{role: head} of the parts that a task of ``adapter`` has; a model of one part has the role "model".

    A model of two towers has both as parts where the adapter changes the text's; the image's alone is one model.
    Raises ExportError as ``head_of`` does.
    """
    config = read_config(folder)
    towers = TOWERS.get(str(config.get("model_type")), {})
    head = _head(adapter, folder, config, task_type, apart)
    if towers and head.task_type == "FEATURE_EXTRACTION" and "text" in _towers_of(adapter, towers):
        return dict.fromkeys(towers, head)
    return {MODEL: head}


def head_of(adapter: Adapter, folder: Path, task_type: str | None = None, apart: bool = False) -> Head:
    """The head that ``adapter`` was trained with, over the base whose config.json lies in ``folder``.

    ``task_type`` is the user's word; without it the adapter's own counts, and without that the base's architecture.
    ``apart`` says that the base itself has an output embedding that is not the input's. Raises ExportError for a task
    type that is not one of ``TASK_TYPES``, an adapter of more than the part of a model that is exported, or a base
    without the configuration it needs.
    """
    return _head(adapter, folder, read_config(folder), task_type, apart)


def _head(adapter: Adapter, folder: Path, config: Mapping[str, Any], task_type: str | None, apart: bool) -> Head:
    kind = (
        task_type
        or ("FEATURE_EXTRACTION" if config.get("model_type") in ENCODERS else adapter.task_type)
        or _of_architecture(config)
    )
    if kind not in TASK_TYPES:
        raise ExportError(
            f"{adapter.path}: task_type {kind!r} can't be exported; expected one of {', '.join(TASK_TYPES)}"
        )
    if kind == "FEATURE_EXTRACTION":
        _check_part(adapter, str(config.get("model_type")))
    if TASK_TYPES[kind].brings_head:
        return Head(kind, _rows_of_head(adapter) or _classes(config))
    decoder = config.get("decoder") or {}  # of a model that is made of two, the one that speaks
    size = (
        _first({**decoder, **config}, ("vocab_size",)) if TASK_TYPES[kind].models_language else _first(config, WIDTHS)
    )
    if size is None:
        raise ExportError(
            f"{folder / 'config.json'}: says neither vocabulary nor width, so the outputs of a {kind} model are"
            " unknown; fetch the base again"
        )
    return Head(kind, size, tied=not (TASK_TYPES[kind].models_language and (apart or _unties(adapter, config))))


def embeddings_apart(names: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names has an output embedding of its own.

    Its configuration may say otherwise: T5 1.1's says that they are tied.
    """
    stored = tuple(names)
    return any(name.endswith(OUTPUT_EMBEDDING) for name in stored) and any(
        name.endswith(INPUT_EMBEDDINGS) for name in stored
    )


def is_of_head(parameter: str) -> bool:
    """Whether the parameter is of the head's last layer, which every task may have in a size of its own."""
    return f".{parameter.rpartition('.')[0]}.weight".endswith(tuple(f".{weight}" for weight in HEAD_WEIGHTS))


def _paths(adapter: Adapter) -> Iterator[str]:
    """The modules, or the parameters that are replaced, that the adapter changes."""
    for change in adapter.changes:
        assert not isinstance(change, Blend)  # made by a merge of several adapters
        yield change.parameter if isinstance(change, Replacement) else change.module


def _changes_any(adapter: Adapter, modules: tuple[str, ...]) -> bool:
    return any(module in path.split(".") for path in _paths(adapter) for module in modules)


def _towers_of(adapter: Adapter, towers: Mapping[str, tuple[str, ...]]) -> set[str]:
    """The towers that the adapter changes: its modules' paths begin with them, or its class is one of them.

    Raises ExportError where neither says it: both towers have layers of the same names.
    """
    named = {tower for tower, modules in towers.items() if _changes_any(adapter, modules)}
    of_class = towers_of_class(adapter.model_class)
    if adapter.changes and not named and not of_class:
        raise ExportError(
            f"{adapter.path}: '{next(_paths(adapter))}' may be of the {' or the '.join(towers)} tower, and the file"
            " does not say which; give an adapter that names its class (auto_mapping in adapter_config.json)"
        )
    return named or of_class


def _check_part(adapter: Adapter, model_type: str) -> None:
    exported, other = ONE_OF_TWO.get(model_type, ("", ""))
    for path in _paths(adapter):
        if other in path.split("."):
            raise ExportError(
                f"{adapter.path}: changes '{path}', but of a {model_type} model the {exported} alone is exported; train"
                f" one of the {exported}"
            )


def _of_architecture(config: Mapping[str, Any]) -> str:
    names = " ".join(map(str, config.get("architectures") or ()))
    return next(
        (kind for kind, known in TASK_TYPES.items() if any(suffix in names for suffix in known.classes)),
        "FEATURE_EXTRACTION",
    )


def _rows_of_head(adapter: Adapter) -> int | None:
    """How many classes the adapter's own head tells apart; None where it has none and the base's counts."""
    for suffix in HEAD_WEIGHTS:
        for name, value in adapter.replaced.items():
            if name.endswith(suffix) and value.ndim == 2:
                return int(value.shape[0])
    return None


def _classes(config: Mapping[str, Any]) -> int:
    """transformers' rule: the labels that the configuration names, or two."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels", 2))


def _unties(adapter: Adapter, config: Mapping[str, Any]) -> bool:
    """Whether an output embedding that is the input's own tensor in the base is another one in the adapted model.

    Trained tokens stay tied, as they were trained; anything else changes one of the two.
    """
    changed = [change for change in adapter.changes if not isinstance(change, Rows | Blend)]
    names = [change.parameter if isinstance(change, Replacement) else f"{change.module}.weight" for change in changed]
    return bool(config.get("tie_word_embeddings", True)) and any(
        name.endswith((OUTPUT_EMBEDDING, *INPUT_EMBEDDINGS)) for name in names
    )


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((int(config[name]) for name in names if isinstance(config.get(name), int)), None)
