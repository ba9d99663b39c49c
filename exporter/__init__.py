"""From a base and its adapters to a bundle of dense ONNX graphs. The modules import torch only to trace."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.module import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    """Import ``export`` when it is asked for: reading a bundle needs no torch."""
    if name == "export":
        from exporter.module import export

        return export
    raise AttributeError(f"module 'exporter' has no attribute '{name}'")
