"""The vocabulary of options: what several commands take is written here, once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora.errors import LorafuseError

if TYPE_CHECKING:
    from lora.adapter import Rule
    from lora.formats.read import ReadOptions


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


class RuleChoice(StrEnum):
    """How several adapters' updates of one weight become one."""

    linear = "linear"
    ties = "ties"
    dare_linear = "dare-linear"
    dare_ties = "dare-ties"

    @property
    def of_several(self) -> Rule:
        """The rule, as ``lora.adapter`` calls it."""
        rules: dict[RuleChoice, Rule] = {
            RuleChoice.linear: "linear",
            RuleChoice.ties: "ties",
            RuleChoice.dare_linear: "dare_linear",
            RuleChoice.dare_ties: "dare_ties",
        }
        return rules[self]


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
Alpha = Annotated[float | None, typer.Option(help="loralib: the alpha it was trained with; its file does not say.")]
Component = Annotated[str | None, typer.Option(help="kohya, diffusers: the part of the pipeline, such as unet.")]
EnableLora = Annotated[
    str | None, typer.Option(help="loralib's MergedLinear: which of the fused parts have updates, such as 1,0,1.")
]
Dequantize = Annotated[
    bool, typer.Option(help="Let a quantized base be dequantized: dequant(W) + ΔW instead of W + ΔW.")
]
AdaptersOption = Annotated[
    list[str] | None, typer.Option("--adapter", help="ADAPTER=WEIGHT; repeatable, to combine several.")
]
RuleOption = Annotated[RuleChoice, typer.Option(help="How several adapters are combined.")]
Density = Annotated[float, typer.Option(help="TIES, DARE: the share of each update that is kept.")]
Seed = Annotated[int, typer.Option(help="DARE: the seed of what is dropped.")]


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


def weighted(adapter: Path | None, listed: list[str] | None) -> tuple[tuple[Path, float], ...]:
    """The adapters that were given, one or several, with their weights."""
    if (adapter is None) == (not listed):
        raise LorafuseError("give one adapter as an argument, or several as --adapter ADAPTER=WEIGHT")
    if adapter is not None:
        return ((adapter, 1.0),)
    return tuple(_path_and_weight(text) for text in listed or ())


def _path_and_weight(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    try:
        return (Path(path), float(weight)) if equals else (Path(text), 1.0)
    except ValueError as error:
        raise LorafuseError(
            f"--adapter {text}: '{weight}' is not a number; expected ADAPTER=WEIGHT, such as adapters/movies=0.7"
        ) from error


def read_options(alpha: float | None, component: str | None, enable_lora: str | None) -> ReadOptions:
    """How to read what an adapter's file leaves open."""
    from lora.formats.read import ReadOptions

    parts = tuple(part.strip() in ("1", "true", "True") for part in enable_lora.split(",")) if enable_lora else None
    return ReadOptions(alpha=alpha, component=component, enable_lora=parts)
