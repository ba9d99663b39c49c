"""``lorafuse verify``."""

from __future__ import annotations

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.commands.options import AsJson, BackendChoice, BundlePath, TaskName
from engines.commands.terminal import DONE, NO, print_json, print_table, progress
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from exporter.bundle.manifest import Bundle


def verify(
    bundle: BundlePath,
    task: TaskName,
    texts: Annotated[
        Path | None,
        typer.Option(help="File of real inputs, a text a line. Default: sentences that come with the package."),
    ] = None,
    engine: Annotated[
        BackendChoice | None,
        typer.Option(
            help=(
                "Instead, hold the task's TensorRT engine against the unadapted base's, layer by layer and tactic by"
                " tactic."
            )
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a task against its formula: float64, merged torch model, ONNX graph, engines.

    Exit status 1 when a stage is out of its bound, or when the task does not differ from its base. With --engine: when
    the engines differ in more than weights.

    Example: lorafuse verify bundle --task movies --texts reviews.txt
    """
    if engine is not None:
        _compare_engines(bundle, task, engine, as_json)
        return
    from engines.building.verify_runners import runners
    from exporter.bundle.manifest import open_bundle
    from exporter.proof.verify import verify as verify_task

    opened = open_bundle(bundle)
    batches = _verification_inputs(opened, task, texts)
    with progress(f"verify {task}"):
        result = verify_task(opened, task, batches, runners(opened, task))
    if as_json:
        print_json({**asdict(result), "passed": result.passed})
    else:
        marks = {True: "within", False: "OUT OF BOUND", None: "not run"}
        rows = [
            (
                (stage.name, "-", "-", stage.note, marks[None])
                if stage.passed is None
                else (
                    stage.name,
                    f"{stage.difference:.2e}",
                    f"{stage.bound:.2e}",
                    f"{stage.where}: {stage.got:.9g}, want {stage.want:.9g}",
                    marks[stage.passed],
                )
            )
            for stage in result.stages
        ]
        print_table(
            f"{task}: {result.inputs} inputs against the formula in float64",
            ("stage", "worst difference", "bound", "worst element", "result"),
            rows,
        )
        same = "equal" if result.digest == result.unadapted_digest else "NOT EQUAL"
        print(f"graph digest {result.digest[:16]}…, merged and unadapted: {same}")
        print(
            f"the task moves the base's outputs by {result.moved:.3g}"
            + ("" if result.differs else f": NOT DIFFERENT from the base (least: {result.least_move:.1e})")
        )
    raise typer.Exit(DONE if result.passed else NO)


def _compare_engines(bundle: Path, task: str, engine: BackendChoice, as_json: bool) -> None:
    from engines.building.layer_diff import compared
    from exporter.bundle.manifest import open_bundle

    with progress(f"compare {task}"):
        found = compared(open_bundle(bundle), task, engine.value)
    if as_json:
        print_json({**asdict(found), "equal": found.equal})
    else:
        rows = [(str(one.position), one.field, one.one, one.other) for one in found.differences]
        if rows:
            print_table(
                f"{task}: where its engine and the unadapted base's differ", ("layer", "field", "task", "base"), rows
            )
        same = "the same" if found.equal else "NOT THE SAME"
        print(f"{found.layers} layers, plans of {found.size} and {found.base_size} bytes: {same} but for weights")
    raise typer.Exit(DONE if found.equal else NO)


def _verification_inputs(opened: Bundle, task: str, texts: Path | None) -> list[dict[str, Any]]:
    """Batches of real text where the task takes text and the base came with its tokenizer, else random inputs."""
    from engines.feeds.inputs import random_inputs, sizes, takes_tokens
    from engines.feeds.text import PADDED_LEFT, TextEncoder

    graph, base = opened.graph(opened.task(task)), opened.manifest.base
    has_tokenizer = any(file.path == "base/tokenizer.json" for file in base.files)
    if texts is None and not (takes_tokens(graph) and has_tokenizer):
        return [
            random_inputs(graph, base.vocabulary, sizes(batch, length), seed=batch)
            for batch, length in ((1, 1), (3, 7), (2, 16))
        ]
    if not takes_tokens(graph):
        raise LorafuseError(f"{texts}: task '{task}' takes no text; leave --texts out")
    lines = [line for line in _read_texts(texts) if line.strip()]
    if not lines:
        raise LorafuseError(f"{texts}: holds no text; expected a text a line")
    encoder = TextEncoder(opened)
    # Padding on the left has rows that see nothing, which transformers' softmax in float32 can't compute in a float64
    # oracle.
    batch = 1 if graph.head.task_type in PADDED_LEFT else 8
    return [encoder.encode(lines[start : start + batch], graph) for start in range(0, len(lines), batch)]


def _read_texts(path: Path | None) -> list[str]:
    if path is None:
        return (resources.files("exporter.proof") / "sentences.txt").read_text(encoding="utf-8").splitlines()
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LorafuseError(f"{path}: can't be read as UTF-8 text ({error}); expected a text a line") from error
