"""From a bundle to engines that run. Loading an engine imports numpy and its backend's library, nothing else of weight."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.runtime import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Import ``load`` when it is asked for: the command line starts without numpy."""
    if name == "load":
        from engines.runtime import load

        return load
    raise AttributeError(f"module 'engines' has no attribute '{name}'")
