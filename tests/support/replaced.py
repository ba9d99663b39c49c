"""A task of the hand-made bundle that becomes another, and what its answers are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from exporter.task import add_task
from lora.files.tensorfile import Array


def adapter(made: Path, task: str) -> Path:
    """The adapter that the task was made of."""
    return made.parent / f"{made.name}-adapter-{task}"


def replace_left(bundle: Path, made: Path) -> None:
    """The task left, from now on what right is."""
    add_task(bundle, adapter(made, "right"), "left")


def close_to(found: Array, wanted: Array) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
