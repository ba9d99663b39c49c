"""``lorafuse verify``."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.commands.options import AsJson, BackendChoice, BundlePath, Digest, TaskName
from engines.commands.terminal import DONE, NO, print_json, print_table, progress
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from exporter.bundle.task_part import TaskPart
    from exporter.proof.verify import Stage, Verification


def verify(
    bundle: BundlePath,
    task: TaskName,
    base: Annotated[
        Path | None,
        typer.Option(
            help=(
                "The base's checkpoint: the reference is then transformers' own model of it, which shares nothing with"
                " the bundle. Default: the bundle's own reading."
            )
        ),
    ] = None,
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
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Hold a task against its formula: float64, merged torch model, ONNX graph, engines.

    Exit status 1 when a stage is out of its bound, or when the task does not differ from its base. With --engine: when
    the engines differ in more than weights.

    Example: lorafuse verify bundle --task movies --texts reviews.txt
    """
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_parts

    parts = task_parts(open_bundle(bundle, digest), task)
    if engine is not None:
        passed = [_compare_engines(part, engine, as_json) for part in parts]
    else:
        passed = [_verified(part, base, texts, as_json) for part in parts]
    raise typer.Exit(DONE if all(passed) else NO)


def _verified(part: TaskPart, base: Path | None, texts: Path | None, as_json: bool) -> bool:
    from engines.building.verify_runners import runners
    from exporter.proof.from_checkpoint import of_checkpoint
    from exporter.proof.verify import verify as verify_part

    batches = _verification_inputs(part, texts)
    with progress(f"verify {part.name}"), nullcontext() if base is None else of_checkpoint(part, base) as reference:
        result = verify_part(part, batches, runners(part), reference)
    if as_json:
        print_json({**asdict(result), "passed": result.passed})
    else:
        _print_verification(result)
    return result.passed


def _print_verification(result: Verification) -> None:
    columns = ("stage", "worst difference", "bound", "worst element", "result")
    title = f"{result.task}: {result.inputs} inputs against the formula in float64"
    print_table(title, columns, [_stage_row(stage) for stage in result.stages])
    print(f"reference: {result.reference}")
    same = "equal" if result.digest == result.unadapted_digest else "NOT EQUAL"
    print(f"graph digest {result.digest[:16]}…, merged and unadapted: {same}")
    moved = f"the task moves the base's outputs by {result.moved:.3g}"
    print(moved if result.differs else f"{moved}: NOT DIFFERENT from the base (least: {result.least_move:.1e})")


def _stage_row(stage: Stage) -> tuple[str, ...]:
    if stage.passed is None:
        return stage.name, "-", "-", stage.note, "not run"
    element = f"{stage.where}: {stage.got:.9g}, want {stage.want:.9g}"
    word = "within" if stage.passed else "OUT OF BOUND"
    return stage.name, f"{stage.difference:.2e}", f"{stage.bound:.2e}", element, word


def _compare_engines(part: TaskPart, engine: BackendChoice, as_json: bool) -> bool:
    from engines.building.layer_diff import compared

    with progress(f"compare {part.name}"):
        found = compared(part, engine.value)
    if as_json:
        print_json({**asdict(found), "equal": found.equal})
    else:
        rows = [(str(one.position), one.field, one.one, one.other) for one in found.differences]
        if rows:
            print_table(
                f"{part.name}: where its engine and the unadapted base's differ",
                ("layer", "field", "task", "base"),
                rows,
            )
        same = "the same" if found.equal else "NOT THE SAME"
        print(f"{found.layers} layers, plans of {found.size} and {found.base_size} bytes: {same} but for weights")
    return found.equal


def _verification_inputs(part: TaskPart, texts: Path | None) -> list[dict[str, Any]]:
    """Batches of real text where the task takes text and the base came with its tokenizer, else random inputs."""
    from engines.feeds.inputs import random_inputs, sizes, takes_tokens
    from engines.feeds.text import TextEncoder
    from exporter.bundle.task_types import task_type

    graph, base = part.graph, part.bundle.manifest.base
    has_tokenizer = any(file.path == "base/tokenizer.json" for file in base.files)
    if texts is None and not (takes_tokens(graph) and has_tokenizer):
        return [
            random_inputs(graph, base.vocabulary, sizes(batch, length), seed=batch)
            for batch, length in ((1, 1), (3, 7), (2, 16))
        ]
    if not takes_tokens(graph):
        raise LorafuseError(f"{texts}: task '{part.name}' takes no text; leave --texts out")
    lines = [line for line in _read_texts(texts) if line.strip()]
    if not lines:
        raise LorafuseError(f"{texts}: holds no text; expected a text a line")
    encoder = TextEncoder(part.bundle)
    # Padding on the left has rows that see nothing, which transformers' softmax in float32 can't compute in a float64
    # oracle.
    batch = 1 if task_type(graph.head.task_type).decodes else 8
    return [encoder.encode(lines[start : start + batch], graph) for start in range(0, len(lines), batch)]


def _read_texts(path: Path | None) -> list[str]:
    if path is None:
        return (resources.files("exporter.proof") / "sentences.txt").read_text(encoding="utf-8").splitlines()
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LorafuseError(f"{path}: can't be read as UTF-8 text ({error}); expected a text a line") from error
