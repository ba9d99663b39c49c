"""The base model, through transformers: which dense model a head needs, and the base's real weights for it."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.bundle.records import MODEL, Head, Precision
from exporter.bundle.structure import of_parameters
from exporter.bundle.task_types import task_type
from exporter.heads import is_of_head
from lora.bases.checkpoint import Checkpoint
from lora.bases.structure import BaseStructure
from lora.errors import ExportError
from lora.files.tensorfile import Array
from lora.modules.positions import unused_positions

# Two-tower models of which the image's tower is the one that is exported.
IMAGE_TOWERS: Mapping[str, str] = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
}

# transformers' own formula, a fifth fewer nodes than torch's fused attention decomposes into, and the one that traces
# for every architecture.
ATTENTION = "eager"


def skeleton(folder: Path, head: Head, precision: Precision = "float32", role: str = MODEL) -> Any:
    """The torch model of ``folder``'s config.json with ``head``, in evaluation mode, with whatever was in memory.

    Of a model of several parts it is the whole, whichever ``role`` is asked for: its parameters keep their names.
    """
    from exporter.graph.precision import torch_dtype

    transformers = _transformers()
    from transformers.initialization import no_init_weights

    with _refusing(
        f"{folder}: transformers {transformers.__version__} can't make a {head.task_type} model of this base"
    ):
        config = transformers.AutoConfig.from_pretrained(folder, **_config_changes(head))
        with no_init_weights():
            model = _model_class(head, config, role).from_config(
                config, dtype=torch_dtype(precision), attn_implementation=ATTENTION
            )
        model.tie_weights()
        if not head.tied:
            _untie(model)
        if precision == "float16":
            _keep_wide(model)
        return model.eval()


def base_weights(folder: Path, head: Head, replaced: Iterable[str], role: str = MODEL) -> Mapping[str, Array]:
    """The base's own weights by parameter name, float32, without those that a head of the adapter replaces.

    A tied weight stands under each of its names. Raises ExportError when a weight is neither in the checkpoint nor
    replaced: it would be random.
    """
    import torch

    transformers = _transformers()
    replaced = set(replaced)
    with _refusing(f"{folder}: transformers {transformers.__version__} can't load this base"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model, loading = _model_class(head, config, role).from_pretrained(
            folder,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            **_config_changes(head),
        )
    absent = set(loading["missing_keys"]) | {entry[0] for entry in loading["mismatched_keys"]}
    untrained = sorted(absent - replaced)
    if untrained:
        raise ExportError(
            f"{folder}: '{untrained[0]}' is neither in the base nor in the adapter, so it would be random; give a base"
            " or an adapter that has it"
        )
    other_heads = set(filter(is_of_head, replaced))
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in absent | other_heads}


def loaded(folder: Path, head: Head, role: str = MODEL) -> tuple[Any, frozenset[str]]:
    """The model with ``head`` as transformers loads it, in the stored dtype; and which parameters it made up."""
    transformers = _transformers()
    with _refusing(f"{folder}: transformers {transformers.__version__} can't load this base"):
        config = transformers.AutoConfig.from_pretrained(folder)
        model, loading = _model_class(head, config, role).from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=ATTENTION,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
            **_config_changes(head),
        )
    absent = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    return model.eval(), frozenset(absent)


def tied_groups(folder: Path, head: Head) -> tuple[tuple[str, ...], ...]:
    """Groups of parameters' names that are one tensor in the model with ``head``, by transformers' own tying.

    A model without weights is made for it. Raises ExportError where transformers can't.
    """
    model = _without_weights(folder, head, MODEL)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def base_structure(folder: Path, head: Head, role: str = MODEL) -> BaseStructure:
    """What each parameter of the model with ``head`` is, by transformers' own modules, names and conversions.

    Raises ExportError where transformers can't make it.
    """
    from lora.modules.base_structure import structure_of_model

    return of_parameters(structure_of_model(_without_weights(folder, head, role), Checkpoint(folder)))


def input_limits(folder: Path, config: Any) -> tuple[int, int]:
    """The longest sequence, in tokens, and the number of token ids; zeros for a model without tokens."""
    tokenizer = folder / "tokenizer_config.json"
    with _refusing(f"{folder}: config.json or tokenizer_config.json does not say the model's limits"):
        said = json.loads(tokenizer.read_bytes()).get("model_max_length") if tokenizer.is_file() else None
        limit = int(said) if said else None
        text = getattr(config, "text_config", config)  # of a model of text and images, the part that takes tokens
        longest = int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 512)
        vocabulary = int(getattr(text, "vocab_size", 0))
    longest -= _unused_positions(folder, config) if vocabulary else 0
    return min(longest, limit) if limit else longest, vocabulary


def known_config(folder: Path) -> Any:
    """transformers' configuration of the model in ``folder``. Raises ExportError unless it knows the model."""
    with _refusing(f"{folder / 'config.json'}: not a model that transformers knows"):
        return _transformers().AutoConfig.from_pretrained(folder)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A failure inside becomes an ExportError that says ``what`` could not be done, and the cause, in one line."""
    try:
        yield
    except Exception as error:  # transformers and safetensors raise classes of their own without a common root
        raise ExportError(
            f"{what} ({textwrap.shorten(f'{type(error).__name__}: {error}', 300, placeholder=' …')})"
        ) from error


def _unused_positions(folder: Path, config: Any) -> int:
    """How many rows of the base's position table no token takes, by a model without weights.

    0 where the base alone is not a model.
    """
    import torch

    transformers = _transformers()
    if type(config) not in transformers.MODEL_MAPPING:
        return 0
    with (
        _refusing(f"{folder}: transformers {transformers.__version__} can't make a model of this base"),
        torch.device("meta"),
    ):
        model = transformers.AutoModel.from_config(config)
    return unused_positions(model)


def _without_weights(folder: Path, head: Head, role: str) -> Any:
    import torch

    transformers = _transformers()
    what = f"{folder}: transformers {transformers.__version__} can't make a {head.task_type} model of this base"
    with _refusing(what), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, **_config_changes(head))
        model = _model_class(head, config, role).from_config(config)
        model.tie_weights()
    return model


def _config_changes(head: Head) -> dict[str, Any]:
    return {"num_labels": head.outputs} if task_type(head.task_type).brings_head else {}


def _untie(model: Any) -> None:
    """Give the output embedding a parameter of its own. The configuration stays: T5 scales by what it says."""
    import torch

    output = model.get_output_embeddings()
    output.weight = torch.nn.Parameter(torch.empty_like(output.weight))


def _keep_wide(model: Any) -> None:
    """The layers that transformers keeps in float32 in a float16 model, because they overflow (T5's wo)."""
    import torch

    wide = set(model._keep_in_fp32_modules or ())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wide:
            module.to(torch.float32)


def _model_class(head: Head, config: Any, role: str) -> Any:
    transformers = _transformers()
    if role == MODEL and head.task_type == "FEATURE_EXTRACTION" and config.model_type in IMAGE_TOWERS:
        return _Concrete(getattr(transformers, IMAGE_TOWERS[config.model_type]))
    return getattr(transformers, task_type(head.task_type).auto_class)


class _Concrete:
    """A model class with the two constructors of transformers' automatic ones."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def from_config(self, config: Any, **arguments: Any) -> Any:
        """From the part of the configuration that is the model's own."""
        return self._model._from_config(getattr(config, "vision_config", config), **arguments)

    def from_pretrained(self, folder: Path, **arguments: Any) -> Any:
        """As of the model class."""
        return self._model.from_pretrained(folder, **arguments)


def _transformers() -> Any:
    """transformers, offline (a base is a folder here, never a download) and silent (progress is the caller's)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers
