"""From a bundle to engines that run.

Loading an engine imports numpy and its backend's library, nothing else of weight.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.serving.load import load
    from engines.serving.runtime import open_runtime as open  # noqa: A004 - as gzip.open: read with the name of its module

__all__ = ["load", "open"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, then: the command line starts without numpy."""
    match name:
        case "load":
            from engines.serving.load import load

            return load
        case "open":
            from engines.serving.runtime import open_runtime

            return open_runtime
    raise AttributeError(f"module 'engines' has no attribute '{name}'")
