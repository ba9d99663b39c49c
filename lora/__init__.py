"""What a LoRA adapter is, and what it does to a weight. Needs numpy, not torch.

``read_adapter`` reads one, of whichever format; ``merge_folder`` merges one or several into a checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.adapter import Adapter
    from lora.errors import LorafuseError
    from lora.formats.read import ReadOptions, read_adapter
    from lora.merging.to_folder import merge_folder

__all__ = ["Adapter", "LorafuseError", "ReadOptions", "merge_folder", "read_adapter"]

# Where each name lives: it is imported when it is asked for.
_HOMES = {
    "Adapter": "lora.adapter",
    "LorafuseError": "lora.errors",
    "ReadOptions": "lora.formats.read",
    "merge_folder": "lora.merging.to_folder",
    "read_adapter": "lora.formats.read",
}


def __getattr__(name: str) -> Any:
    """The public name, from the module where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lora' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
