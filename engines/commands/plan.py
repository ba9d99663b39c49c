"""``lorafuse plan``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from engines.commands.options import AsJson, names_in
from engines.commands.terminal import print_json, print_table
from lora.wording import megabytes


def plan(
    model: Annotated[
        str,
        typer.Option(help="gpt3-175b, the paper's model; or a transformers configuration: config.json, or its folder."),
    ],
    rank: Annotated[int, typer.Option(min=1, help="The rank of A and B.")] = 4,
    targets: Annotated[
        str, typer.Option(help="q, k, v and o of attention, or names that module paths end in; comma-separated.")
    ] = "q,v",
    tasks: Annotated[int, typer.Option(min=1, help="How many adapters share the base.")] = 100,
    width: Annotated[int, typer.Option(min=1, max=8, help="Bytes of a stored number.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Say what adapters of a model cost, before one is trained; no weights are needed.

    Example: lorafuse plan --model gpt3-175b --rank 4 --targets q,v --tasks 100
    """
    from lora.planning.dimensions import PAPERS_CASE, read_dimensions, with_papers_figures
    from lora.planning.economics import plan as planned

    names = names_in(targets, "names nothing; give q, k, v or o, or names that module paths end in, such as q,v")
    found = planned(read_dimensions(model, names), rank, tasks, width)
    if (model, rank, ",".join(names), width) == PAPERS_CASE:
        found = with_papers_figures(found)
    if as_json:
        print_json(asdict(found))
    else:
        rows = [
            (figure.name, _shown(figure.value, figure.unit), figure.formula, figure.paper) for figure in found.figures
        ]
        columns = ("", "", "because", "the paper says" if any(figure.paper for figure in found.figures) else "")
        print_table(f"{model}: LoRA of rank {rank} on {','.join(names)}", columns, rows)
        for assumption in found.assumptions:
            print(f"- {assumption}")


def _shown(value: float, unit: str) -> str:
    """A figure for people."""
    match unit:
        case "bytes":
            return megabytes(int(value)) if value < 10**12 else f"{value / 10**12:.2f} TB"
        case "%":
            return f"{value:.3%}"
        case "×":
            return f"{value:,.0f} ×" if value >= 100 else f"{value:.2f} ×"
    return f"{value:,.0f}"
