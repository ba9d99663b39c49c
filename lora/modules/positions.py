"""Where a model's positions begin."""

from __future__ import annotations

from typing import Any


def unused_positions(model: Any) -> int:
    """How many rows of a torch model's position table no token takes.

    In RoBERTa's family and MPNet, positions start after the padding id.

    A table with a padding row alone says nothing (LXMERT counts from zero); what counts from there keeps the id beside
    the table.
    """
    counted = (
        module.padding_idx
        for module in model.modules()
        if hasattr(module, "position_embeddings") and hasattr(module, "padding_idx")
    )
    return next((int(padding) + 1 for padding in counted if padding is not None), 0)
