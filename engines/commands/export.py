"""``lorafuse export``, and what it shares with ``lorafuse bundle add``."""

from __future__ import annotations

from enum import StrEnum
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
    Digest,
    EnableLora,
    FloatDtype,
    RuleChoice,
    RuleOption,
    Seed,
    TaskName,
    read_options,
    weighted,
)
from engines.commands.terminal import print_json, print_table, progress
from lora.wording import megabytes

if TYPE_CHECKING:
    from exporter.task import Adapters
    from exporter.writing import Exported


class StoreChoice(StrEnum):
    """How a task's changed tensors are kept."""

    dense = "dense"
    factors = "factors"


Labels = Annotated[str, typer.Option(help="Class labels, comma-separated, in the order of the head's outputs.")]
Store = Annotated[
    StoreChoice,
    typer.Option(
        help="dense: merged tensors, for any runtime. factors: the adapter alone, merged when the task is loaded."
    ),
]


def export(
    base: Annotated[
        Path,
        typer.Argument(
            help="The base model's folder (config.json, model.safetensors, tokenizer.json), or a GGUF file."
        ),
    ],
    adapter: Annotated[
        Path | None,
        typer.Argument(
            help="The adapter: a PEFT folder, or a loralib, kohya or diffusers file. Without one, the base as it is."
        ),
    ] = None,
    *,
    adapters: AdaptersOption = None,
    rule: RuleOption = RuleChoice.linear,
    density: Density = 0.5,
    seed: Seed = 0,
    alpha: Alpha = None,
    component: Component = None,
    enable_lora: EnableLora = None,
    dequantize: Dequantize = False,
    task: TaskName,
    out: Annotated[Path, typer.Option(help="The bundle; created if there is none, else the task is added to it.")],
    labels: Labels = "",
    task_type: Annotated[
        str | None,
        typer.Option(help="SEQ_CLS, TOKEN_CLS, CAUSAL_LM … Default: the adapter's, or the base's architecture."),
    ] = None,
    precision: Annotated[
        FloatDtype | None, typer.Option(help="Of weights and products. Default: the bundle's, or float32 in a new one.")
    ] = None,
    store: Store = StoreChoice.dense,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base and write the task into a bundle.

    The base is traced once per distinct head; a further task adds its changed tensors and its graph.

    Example: lorafuse export MiniLM adapters/movies --task movies --labels negative,positive --out bundle
    """
    from exporter.bundle.manifest import check_pinned
    from exporter.task import Request, export_task

    check_pinned(out, digest)
    given = None
    if adapter is not None or adapters:
        given = given_adapters(weighted(adapter, adapters), alpha, component, enable_lora, rule, density, seed)
    request = Request(
        base,
        given,
        task,
        labels_in(labels),
        task_type,
        precision.value if precision else None,
        store.value,
        dequantize,
    )
    with progress(f"export {task}") as step:
        exported = export_task(request, out, step)
    print_exported(exported, out, as_json)


def given_adapters(
    paths: tuple[tuple[Path, float], ...],
    alpha: float | None,
    component: str | None,
    enable_lora: str | None,
    rule: RuleChoice,
    density: float,
    seed: int,
) -> Adapters:
    """The adapters, how to read them, and how to combine them."""
    from exporter.task import Adapters
    from lora.merging.several import Blending

    options = read_options(alpha, component, enable_lora)
    return Adapters(paths, options, Blending(rule.of_several, density, seed))


def labels_in(labels: str) -> tuple[str, ...]:
    """The labels in a list with commas; spaces around them are none of theirs."""
    return tuple(name for label in labels.split(",") if (name := label.strip()))


def print_exported(exported: Exported, out: Path, as_json: bool) -> None:
    """What was added to the bundle, for people or as JSON."""
    added = {
        "base weights": exported.base_bytes,
        "graph": exported.graph_bytes,
        "changed tensors": exported.changed_bytes,
        "adapter (kept for verification)": exported.adapter_bytes,
    }
    if as_json:
        print_json(
            {
                "task": exported.task,
                "bundle": str(out),
                "traced": exported.traced,
                "changed": exported.changed,
                "formula": exported.formula,
                "skipped": exported.skipped,
                "unread": exported.unread,
                "bytes_added": added,
            }
        )
        return
    traced = "base traced" if exported.traced else "graph reused"
    rows = [(what, megabytes(size)) for what, size in added.items()]
    print_table(
        f"{exported.task} → {out}: {len(exported.changed)} tensors changed, {traced}",
        ("added to the bundle", "size"),
        rows,
    )
    print(f"formula: {exported.formula}")
    if exported.skipped:
        print(f"not merged, because they are for other models: {', '.join(exported.skipped)}")
    if exported.unread:
        print(f"left out, because no output depends on them: {', '.join(exported.unread)}")
