"""The base model, through transformers: which dense model a head needs, and the base's real weights for it."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.bundle.manifest import Head
from lora.adapter import Adapter
from lora.errors import ExportError
from lora.tensorfile import Array

TASK_TYPES = ("SEQ_CLS",)
# The last linear layer of transformers' classification heads; its rows are the classes.
HEAD_WEIGHTS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")


def head_of(adapter: Adapter) -> Head:
    """The head that ``adapter`` was trained with. Raises ExportError for a task this exporter can't trace yet."""
    if adapter.task_type not in TASK_TYPES:
        raise ExportError(f"{adapter.path}: task_type {adapter.task_type!r} can't be exported yet; expected one of {', '.join(TASK_TYPES)}")
    for suffix in HEAD_WEIGHTS:
        for name, value in adapter.replaced.items():
            if name.endswith(suffix) and value.ndim == 2:
                return Head(task_type=adapter.task_type, outputs=int(value.shape[0]))
    raise ExportError(f"{adapter.path}: holds no trained head (expected one of {', '.join(HEAD_WEIGHTS)}); train it with modules_to_save")


def skeleton(folder: Path, head: Head) -> Any:
    """The torch model of ``folder``'s config.json with ``head``: randomly initialised, float32, in evaluation mode."""
    import torch

    transformers, auto_class = _transformers(), _auto_class(head)
    with _refusing(f"{folder}: transformers {transformers.__version__} can't make a {head.task_type} model of this base"):
        config = transformers.AutoConfig.from_pretrained(folder, **_config_changes(head))
        return auto_class.from_config(config, dtype=torch.float32).eval()


def base_weights(folder: Path, head: Head, replaced: Iterable[str]) -> Mapping[str, Array]:
    """The base's own weights by parameter name, float32, without those that a head of the adapter replaces.

    Raises ExportError when a weight is neither in the checkpoint nor replaced: it would be random.
    """
    import torch

    transformers, auto_class = _transformers(), _auto_class(head)
    replaced = set(replaced)
    with _refusing(f"{folder}: transformers {transformers.__version__} can't load this base"):
        model, loading = auto_class.from_pretrained(
            folder, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, use_safetensors=True, **_config_changes(head)
        )
    absent = set(loading["missing_keys"]) | {entry[0] for entry in loading["mismatched_keys"]}
    untrained = sorted(absent - replaced)
    if untrained:
        raise ExportError(f"{folder}: '{untrained[0]}' is neither in the base nor in the adapter, so it would be random; give a base or an adapter that has it")
    other_heads = set(filter(_of_head, replaced))
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in absent | other_heads}


def model_inputs(folder: Path) -> tuple[str, ...]:
    """The graph's inputs: token types only where the model tells several apart (BERT's sentence pairs)."""
    config = _transformers().AutoConfig.from_pretrained(folder)
    pairs = getattr(config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", "token_type_ids") if pairs else ("input_ids", "attention_mask")


def input_limits(folder: Path) -> tuple[int, int]:
    """The longest sequence, in tokens, and the number of token ids that the model takes.

    RoBERTa's positions start after the padding id, so its tokenizer's limit is below ``max_position_embeddings``.
    """
    tokenizer = folder / "tokenizer_config.json"
    with _refusing(f"{folder}: config.json or tokenizer_config.json does not say the model's limits"):
        config = json.loads((folder / "config.json").read_bytes())
        limit = json.loads(tokenizer.read_bytes()).get("model_max_length") if tokenizer.is_file() else None
        longest = int(config.get("max_position_embeddings", 512))
        return min(longest, int(limit)) if limit else longest, int(config["vocab_size"])


def check_config(folder: Path) -> None:
    """Raises ExportError unless transformers knows the model in ``folder``."""
    with _refusing(f"{folder / 'config.json'}: not a model that transformers knows"):
        _transformers().AutoConfig.from_pretrained(folder)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A failure inside becomes an ExportError that says ``what`` could not be done, and the cause, in one line."""
    try:
        yield
    except Exception as error:  # transformers and safetensors raise classes of their own that share no root but Exception
        raise ExportError(f"{what} ({textwrap.shorten(f'{type(error).__name__}: {error}', 300, placeholder=' …')})") from error


def _of_head(parameter: str) -> bool:
    """Whether the parameter is of the head's last layer, which every task may have in a size of its own."""
    return f".{parameter.rpartition('.')[0]}.weight".endswith(tuple(f".{weight}" for weight in HEAD_WEIGHTS))


def _config_changes(head: Head) -> dict[str, Any]:
    return {"num_labels": head.outputs}


def _auto_class(head: Head) -> Any:
    match head.task_type:
        case "SEQ_CLS":
            return _transformers().AutoModelForSequenceClassification
    raise ExportError(f"task type {head.task_type!r} can't be exported yet; expected one of {', '.join(TASK_TYPES)}")


def _transformers() -> Any:
    """transformers, offline (a base is a folder here, never a download) and silent (progress is the caller's)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers
