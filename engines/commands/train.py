"""``lorafuse train``."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engines.commands.options import AsJson, names_in
from engines.commands.terminal import print_json, print_table, progress

if TYPE_CHECKING:
    from lora.training.finetune import Trained


class KindChoice(StrEnum):
    """What is learnt."""

    classification = "classification"
    regression = "regression"
    causal_lm = "causal-lm"


def train(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, as transformers saved it.")],
    data: Annotated[
        Path,
        typer.Option(help="Examples: .csv, .tsv, .jsonl, .json or .parquet, or a folder of Hugging Face's datasets."),
    ],
    kind: Annotated[KindChoice, typer.Option(help="What is learnt: a class, a number, or the text that follows.")],
    out: Annotated[Path, typer.Option(help="The adapter's folder; must not exist yet.")],
    validation: Annotated[
        Path | None, typer.Option(help="Examples to judge by. Default: a tenth of the others, held out.")
    ] = None,
    text: Annotated[str, typer.Option(help="The column of the text.")] = "text",
    target: Annotated[
        str, typer.Option(help="The column of the class, the number, or the text that follows.")
    ] = "label",
    rank: Annotated[int, typer.Option(min=1, help="LoRA's rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA's alpha; alpha ÷ rank scales the update.")] = 16,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="LoRA's dropout.")] = 0.05,
    targets: Annotated[
        str | None, typer.Option(help="Names that module paths end in, comma-separated. Default: queries and values.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often every example is seen.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 32,
    rate: Annotated[float, typer.Option(min=0, help="The learning rate at its highest.")] = 1e-3,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longer texts are cut.")] = 128,
    patience: Annotated[
        int,
        typer.Option(min=0, help="Evaluations without a better loss until it stops early, of ten in all; 0: never."),
    ] = 5,
    seed: Annotated[int, typer.Option(help="The seed of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter, and say what it has over the commonest class and a linear probe.

    Checkpoints lie beside OUT while it runs: called again, a run that was killed goes on, to the same weights.

    Example: lorafuse train MiniLM --data reviews.csv --kind classification --target sentiment --out adapters/reviews
    """
    from lora.training.examples import Columns
    from lora.training.finetune import Course, finetune
    from lora.training.learner import Size
    from lora.training.run import Schedule

    otherwise = "names no module; expected names that module paths end in, such as query,value"
    size = Size(rank, alpha, dropout, () if targets is None else names_in(targets, otherwise))
    schedule = Schedule(epochs, batch, rate, seed, patience)
    course = Course(base, data, kind.value, validation, Columns(text, target), size, schedule, max_tokens)
    with progress("train") as step:
        trained = finetune(course, out, step)
    if as_json:
        print_json({**asdict(trained), "folder": str(trained.folder)})
    else:
        _print_trained(trained, max_tokens)


def _print_trained(trained: Trained, max_tokens: int) -> None:
    outcome, examples = trained.outcome, trained.examples
    rows = [(name, f"{score:.4f}") for name, score in trained.scores.items()]
    print_table(
        f"{trained.folder}: {trained.metric} on {examples['validation']} examples that were held out",
        ("", trained.metric),
        rows,
    )
    early = f", stopped early of {outcome.planned}" if outcome.steps < outcome.planned else ""
    print(
        f"{trained.trainable:,} parameters trained on {examples['training']} examples in {outcome.steps} steps{early};"
        f" {trained.seconds:.0f} s"
    )
    if trained.labels:
        print(f"labels, in the order of the outputs: {','.join(trained.labels)}")
    if outcome.resumed:
        print(f"went on from step {outcome.resumed} of a run that had not ended")
    if trained.cut:
        most = "the base takes no more" if trained.longest < max_tokens else "--max-tokens lets them be longer"
        print(f"{trained.cut} texts were cut to {trained.longest} tokens; {most}")
    best = max((score for name, score in trained.scores.items() if name != "adapter"), default=None)
    if best is not None and trained.metric != "loss" and trained.scores["adapter"] <= best:
        print("the adapter does not beat what needs none: it may not be worth its bytes")
