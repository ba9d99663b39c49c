"""From a bundle to engines that run. Loading one imports numpy and its backend's library, nothing else of weight."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.feeds.generate import greedy
    from engines.feeds.inputs import empty_cache
    from engines.feeds.text import TextEncoder, predictions
    from engines.serving.load import TaskSession as Session
    from engines.serving.load import load
    from engines.serving.runtime import Runtime
    from engines.serving.runtime import open_runtime as open  # noqa: A004 - as gzip.open: read with its module's name
    from exporter.bundle.records import Graph

__all__ = ["Graph", "Runtime", "Session", "TextEncoder", "empty_cache", "greedy", "load", "open", "predictions"]

# Where each name lives: it is imported when it is asked for, and the command line starts without numpy.
_HOMES = {
    "Graph": "exporter.bundle.records:Graph",
    "Runtime": "engines.serving.runtime:Runtime",
    "Session": "engines.serving.load:TaskSession",
    "TextEncoder": "engines.feeds.text:TextEncoder",
    "empty_cache": "engines.feeds.inputs:empty_cache",
    "greedy": "engines.feeds.generate:greedy",
    "load": "engines.serving.load:load",
    "open": "engines.serving.runtime:open_runtime",
    "predictions": "engines.feeds.text:predictions",
}


def __getattr__(name: str) -> Any:
    """The public name, from the module where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engines' has no attribute '{name}'")
    module, attribute = _HOMES[name].split(":")
    return getattr(import_module(module), attribute)
