"""``lorafuse merge`` and ``lorafuse inspect``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.options import (
    AdaptersOption,
    Alpha,
    AsJson,
    Component,
    Density,
    Dequantize,
    EnableLora,
    FloatDtype,
    RuleChoice,
    RuleOption,
    Seed,
    read_options,
    weighted,
)
from engines.commands.terminal import DONE, NO, print_json, print_table, progress
from lora.wording import megabytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora.bases.structure import BaseStructure
    from lora.files.tensorfile import Array
    from lora.formats.model_class import ModelClass
    from lora.merging.checkpoint import Written


def merge(
    base: Annotated[Path, typer.Argument(help="Folder of the base checkpoint (safetensors), or a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    adapter: Annotated[
        Path | None, typer.Argument(help="The adapter: a PEFT folder, or a loralib, kohya or diffusers file.")
    ] = None,
    adapters: AdaptersOption = None,
    rule: RuleOption = RuleChoice.linear,
    density: Density = 0.5,
    seed: Seed = 0,
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
    sources = Sources(base, weighted(adapter, adapters), read_options(alpha, component, enable_lora), dequantize)
    with progress("merge") as step:
        blending = Blending(rule.of_several, density, seed)
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

    found = inspect_adapter(adapter, base, read_options(alpha, component, enable_lora), dequantize, _ask_transformers)
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
