"""In which model an adapter was trained, as far as its file says."""

from __future__ import annotations

from dataclasses import dataclass

from lora.adapter import Adapter


@dataclass(frozen=True)
class ModelClass:
    """The class of transformers, or only the task that chooses it from a base's configuration; both may be unsaid."""

    name: str | None = None
    task_type: str | None = None


def model_class(adapter: Adapter) -> ModelClass:
    """What the adapter's file says of its model."""
    return ModelClass(adapter.model_class, adapter.task_type)
