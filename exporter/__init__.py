"""From a base and its adapters to a bundle of dense ONNX graphs. The modules import torch only to trace."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.bundle.manifest import open_bundle
    from exporter.module import export
    from exporter.task import Request, add_task, export_task

__all__ = ["Request", "add_task", "export", "export_task", "open_bundle"]

# Where each name lives: it is imported when it is asked for, for reading a bundle needs no torch.
_HOMES = {
    "Request": "exporter.task",
    "add_task": "exporter.task",
    "export": "exporter.module",
    "export_task": "exporter.task",
    "open_bundle": "exporter.bundle.manifest",
}


def __getattr__(name: str) -> Any:
    """The public name, from the module where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
