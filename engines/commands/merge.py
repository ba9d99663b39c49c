"""``lorafuse merge`` and ``lorafuse inspect``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.options import AsJson, FloatDtype
from engines.commands.terminal import DONE, NO, print_json, print_table, progress
from lora.errors import LorafuseError
from lora.wording import megabytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora.bases.structure import BaseStructure
    from lora.files.tensorfile import Array
    from lora.formats.model_class import ModelClass
    from lora.formats.read import ReadOptions
    from lora.merging.checkpoint import Written


class RuleChoice(StrEnum):
    """How several adapters' updates of one weight become one."""

    linear = "linear"
    ties = "ties"
    dare_linear = "dare-linear"
    dare_ties = "dare-ties"


Alpha = Annotated[float | None, typer.Option(help="loralib: the alpha it was trained with; its file does not say.")]
Component = Annotated[str | None, typer.Option(help="kohya, diffusers: the part of the pipeline, such as unet.")]
EnableLora = Annotated[
    str | None, typer.Option(help="loralib's MergedLinear: which of the fused parts have updates, such as 1,0,1.")
]
Dequantize = Annotated[
    bool, typer.Option(help="Let a quantized base be dequantized: dequant(W) + ΔW instead of W + ΔW.")
]


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base checkpoint (safetensors), or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    adapter: Annotated[
        Path | None, typer.Argument(help="The adapter: a PEFT folder, or a loralib, kohya or diffusers file.")
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", help="ADAPTER=WEIGHT; repeatable, to combine several.")
    ] = None,
    rule: Annotated[RuleChoice, typer.Option(help="How several adapters are combined.")] = RuleChoice.linear,
    density: Annotated[float, typer.Option(help="TIES, DARE: the share of each update that is kept.")] = 0.5,
    seed: Annotated[int, typer.Option(help="DARE: the seed of what is dropped.")] = 0,
    only_changed: Annotated[bool, typer.Option(help="Write the changed tensors only, not a whole checkpoint.")] = False,
    dtype: Annotated[FloatDtype | None, typer.Option(help="Store in this dtype. Default: the base's.")] = None,
    keep_wide: Annotated[
        bool, typer.Option(help="Keep in float32 the tensors in which rounding would lose too much of the update.")
    ] = False,
    alpha: Alpha = None,
    component: Component = None,
    enable_lora: EnableLora = None,
    dequantize: Dequantize = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter, or several, into a base checkpoint. Needs no torch; memory follows the largest tensor.

    Example: lorafuse merge llama adapters/support --out llama-support
    """
    from lora.files.tensorfile import numpy_dtype
    from lora.merging.checkpoint import Storing
    from lora.merging.several import Blending
    from lora.merging.to_folder import Sources, merge_folder

    storing = Storing(only_changed, numpy_dtype(dtype.value) if dtype else None, keep_wide)
    sources = Sources(base, _weighted(adapter, adapters), _options(alpha, component, enable_lora), dequantize)
    with progress("merge") as step:
        blending = Blending(rule.value.replace("-", "_"), density, seed)  # type: ignore[arg-type]
        written = merge_folder(sources, out, storing, blending, step, _ask_transformers)
    if as_json:
        print_json({**asdict(written), "folder": str(written.folder)})
    else:
        _print_written(written)


def inspect(
    adapter: Annotated[Path, typer.Argument(help="The adapter: a PEFT folder, or a loralib, kohya or diffusers file.")],
    base: Annotated[
        Path | None, typer.Option(help="The base, to see whether the adapter fits it and what it changes.")
    ] = None,
    alpha: Alpha = None,
    component: Component = None,
    enable_lora: EnableLora = None,
    dequantize: Dequantize = False,
    as_json: AsJson = False,
) -> None:
    """Say what an adapter is, whether it fits a base, and what a merge would change or refuse.

    Exit status 1 when a merge would be refused.

    Example: lorafuse inspect adapters/movies --base MiniLM
    """
    from lora.merging.inspection import inspect_adapter

    found = inspect_adapter(adapter, base, _options(alpha, component, enable_lora), dequantize, _ask_transformers)
    if as_json:
        print_json(asdict(found))
    else:
        rows = [
            (
                row.module,
                row.kind,
                str(row.rank or ""),
                f"{row.scaling:g}" if row.rank else "",
                row.shape,
                row.tensor or "?",
            )
            for row in found.rows
        ]
        title = f"{adapter}: {found.format or 'not readable'}, {len(found.rows)} changes, {megabytes(found.size)}"
        print_table(title, ("module", "change", "rank", "scaling", "shape", "changes"), rows)
        if found.skipped:
            print(f"left out, because they are for other models: {', '.join(found.skipped)}")
        print(found.verdict)
    raise typer.Exit(NO if found.refused else DONE)


def _ask_transformers(folder: Path, tensors: Mapping[str, Array], wanted: ModelClass) -> BaseStructure | None:
    """What the base is, where transformers is installed and knows it; imported only when it is needed."""
    try:
        from lora.modules.base_structure import ask_transformers
    except ImportError:
        return None
    return ask_transformers(folder, tensors, wanted)


def _weighted(adapter: Path | None, weighted: list[str] | None) -> tuple[tuple[Path, float], ...]:
    if (adapter is None) == (not weighted):
        raise LorafuseError("give one adapter as an argument, or several as --adapter ADAPTER=WEIGHT")
    if adapter is not None:
        return ((adapter, 1.0),)
    return tuple(_path_and_weight(text) for text in weighted or ())


def _path_and_weight(text: str) -> tuple[Path, float]:
    path, equals, weight = text.rpartition("=")
    try:
        return (Path(path), float(weight)) if equals else (Path(text), 1.0)
    except ValueError as error:
        raise LorafuseError(
            f"--adapter {text}: '{weight}' is not a number; expected ADAPTER=WEIGHT, such as adapters/movies=0.7"
        ) from error


def _options(alpha: float | None, component: str | None, enable_lora: str | None) -> ReadOptions:
    from lora.formats.read import ReadOptions

    parts = tuple(part.strip() in ("1", "true", "True") for part in enable_lora.split(",")) if enable_lora else None
    return ReadOptions(alpha=alpha, component=component, enable_lora=parts)


def _print_written(written: Written) -> None:
    worst = sorted(written.survivals, key=lambda survival: -survival.lost)[:10]
    rows = [
        (s.parameter, s.dtype, f"{s.lost:.2%}", f"{s.unchanged:.2%}", "LOST TO ROUNDING" if s.warns else "")
        for s in worst
    ]
    title = f"{written.folder}: {len(written.changed)} tensors changed; the worst in rounding"
    print_table(title, ("tensor", "stored as", "update lost", "weights unchanged", ""), rows)
    print(f"formula: {written.formula}")
    if written.skipped:
        print(f"not merged, because they are for other models: {', '.join(written.skipped)}")
    if written.untied:
        said = ", and config.json says so" if written.flagged else "; all are stored, so they are not tied on loading"
        print(f"tensors that the base ties (its embeddings) now differ{said}")
    if written.missing:
        listed = ", ".join(written.missing[:3]) + (" …" if len(written.missing) > 3 else "")
        print(f"neither the base nor the adapter has values for {listed}: they are random whenever the model is loaded")
    warned = sum(survival.warns for survival in written.survivals)
    if warned:
        print(
            f"{warned} tensors lose more than a tenth of their update to rounding: store wider with --dtype float32, or"
            " only those with --keep-wide"
        )
