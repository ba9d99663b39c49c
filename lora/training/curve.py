"""The losses of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lora.training.run import Point


def draw(points: tuple[Point, ...], path: Path) -> None:
    """Write the curve as PNG: training and validation loss by step."""
    figure: Any = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name in ("training", "validation"):
        drawn = [(point.step, loss) for point in points if (loss := getattr(point, name)) is not None]
        axes.plot([step for step, _ in drawn], [loss for _, loss in drawn], label=name, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
