"""The vocabulary of options: what several commands take is written here, once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lora.errors import LorafuseError


class FloatDtype(StrEnum):
    """The dtypes that weights can be stored in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class BackendChoice(StrEnum):
    """The backends as the command line takes them."""

    onnxruntime = "onnxruntime"
    onnxruntime_cuda = "onnxruntime-cuda"
    onnxruntime_tensorrt = "onnxruntime-tensorrt"
    onnxruntime_rtx = "onnxruntime-rtx"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BundlePath = Annotated[Path, typer.Argument(help="The bundle's folder.")]
Digest = Annotated[
    str | None,
    typer.Option(metavar="sha256:…", help="The bundle's digest, as 'bundle ls' prints it; any other is refused."),
]
TaskName = Annotated[str, typer.Option(help="Name of the task in the bundle.")]
MODEL = "model"  # as exporter.bundle.records has it, which takes msgspec to import
PartName = Annotated[
    str, typer.Option(help="Part of the task's model, such as text or vision; a model of one part needs no word.")
]
Backend = Annotated[BackendChoice, typer.Option(help="What runs the engine.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads. One is steadiest on a machine that does other work.")]


TAKEN_FOR_PER_CENT = 0.5  # by who wrote it: no margin of a latency is so large


def per_cent(text: str) -> float:
    """ "1%" or 0.01. Raises BadParameter when it is neither, or not between nothing and ten times as much, or a large
    number without its sign: who writes 1 means one per cent, and not a whole.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0.0001 <= value <= 10:
        raise typer.BadParameter(f"'{text}' is no share between 0.01% and 1000%, such as 1% or 0.01")
    if value >= TAKEN_FOR_PER_CENT and not text.endswith("%"):
        raise typer.BadParameter(f"'{text}' would be {value:.0%}; write it with its sign, such as 1%")
    return value


Margin = Annotated[Any, typer.Option(parser=per_cent, metavar="SHARE", help="What counts as equal, such as 1%.")]


def names_in(targets: str, otherwise: str) -> tuple[str, ...]:
    """The names in a list with commas; spaces around them and a comma too many are no names.

    Raises LorafuseError saying ``otherwise`` where none is left.
    """
    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    if not names:
        raise LorafuseError(f"--targets '{targets}': {otherwise}")
    return names
