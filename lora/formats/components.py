"""One file may hold updates of several models of a pipeline; a merge is into one of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lora.errors import AdapterError


def choose(path: Path, present: Collection[str], wanted: str | None) -> str:
    """The component to read: the one that was asked for, or the only one."""
    listed = ", ".join(sorted(present))
    if wanted is None and len(present) != 1:
        raise AdapterError(f"{path}: holds updates of {listed}; say which component is to be merged")
    if wanted is not None and wanted not in present:
        raise AdapterError(f"{path}: holds no updates of component '{wanted}'; it has {listed}")
    return wanted or next(iter(present))
