"""The ``lorafuse`` command: the packages' commands joined, and those that need all of them."""

from __future__ import annotations

import gc
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.build_cli import Backend, BackendChoice
from engines.build_cli import app as build_app
from engines.latency.cli import app as bench_app
from exporter.cli import BundlePath, TaskName
from exporter.cli import app as exporter_app
from lora.cli import AsJson
from lora.cli import app as lora_app
from lora.errors import LorafuseError
from lora.terminal import BAD_INPUT, DONE, NO, print_error, print_json, print_table, progress

if TYPE_CHECKING:
    from exporter.bundle.manifest import Bundle

HELP = """Ship LoRA-tuned models.

Example: lorafuse export MiniLM adapters/movies --task movies --out bundle"""
app = typer.Typer(name="lorafuse", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=HELP)
app.add_typer(lora_app)
app.add_typer(exporter_app)
app.add_typer(build_app)
app.add_typer(bench_app, name="bench")


@app.command()
def verify(
    bundle: BundlePath,
    task: TaskName,
    texts: Annotated[Path | None, typer.Option(help="File of real inputs, a text a line. Default: sentences that come with the package.")] = None,
    engine: Annotated[
        BackendChoice | None, typer.Option(help="Instead, hold the task's TensorRT engine against the unadapted base's, layer by layer and tactic by tactic.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold a task against its formula: float64, merged torch model, ONNX graph, engines.

    Exit status 1 when a stage is out of its bound, or when the task does not differ from its base. With --engine: when the engines differ in
    more than weights.

    Example: lorafuse verify bundle --task movies --texts reviews.txt
    """
    if engine is not None:
        _compare_engines(bundle, task, engine, as_json)
        return
    from engines.stages import runners
    from exporter.bundle.manifest import open_bundle
    from exporter.verify import verify as verify_task

    opened = open_bundle(bundle)
    batches = _verification_inputs(opened, task, texts)
    with progress(f"verify {task}"):
        result = verify_task(opened, task, batches, runners(opened, task))
    if as_json:
        print_json({**asdict(result), "passed": result.passed})
    else:
        marks = {True: "within", False: "OUT OF BOUND", None: "not run"}
        rows = [
            (stage.name, "-", "-", stage.note, marks[None])
            if stage.passed is None
            else (stage.name, f"{stage.difference:.2e}", f"{stage.bound:.2e}", f"{stage.where}: {stage.got:.9g}, want {stage.want:.9g}", marks[stage.passed])
            for stage in result.stages
        ]
        print_table(f"{task}: {result.inputs} inputs against the formula in float64", ("stage", "worst difference", "bound", "worst element", "result"), rows)
        same = "equal" if result.digest == result.unadapted_digest else "NOT EQUAL"
        print(f"graph digest {result.digest[:16]}…, merged and unadapted: {same}")
        print(
            f"the task moves the base's outputs by {result.moved:.3g}"
            + ("" if result.differs else f": NOT DIFFERENT from the base (least: {result.least_move:.1e})")
        )
    raise typer.Exit(DONE if result.passed else NO)


def _compare_engines(bundle: Path, task: str, engine: BackendChoice, as_json: bool) -> None:
    from engines.compared import compared
    from exporter.bundle.manifest import open_bundle

    with progress(f"compare {task}"):
        found = compared(open_bundle(bundle), task, engine.value)
    if as_json:
        print_json({**asdict(found), "equal": found.equal})
    else:
        rows = [(str(one.position), one.field, one.one, one.other) for one in found.differences]
        if rows:
            print_table(f"{task}: where its engine and the unadapted base's differ", ("layer", "field", "task", "base"), rows)
        same = "the same" if found.equal else "NOT THE SAME"
        print(f"{found.layers} layers, plans of {found.size} and {found.base_size} bytes: {same} but for weights")
    raise typer.Exit(DONE if found.equal else NO)


@app.command()
def run(
    bundle: BundlePath,
    task: TaskName,
    text: Annotated[list[str], typer.Option(help="Text to run; repeatable.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens that a language model adds to a text, within what its base takes.")] = 64,
    backend: Backend = BackendChoice.onnxruntime,
    as_json: AsJson = False,
) -> None:
    """Run a task's engine on text: a classifier's label, a regression's value, a language model's completion.

    Example: lorafuse run bundle --task movies --text "A moving, funny film."
    """
    from exporter.bundle.manifest import open_bundle, printable

    _check_utf8(text)
    opened = open_bundle(bundle)
    if opened.graph(opened.task(task)).head.task_type == "SEQ_CLS":
        results = _classified(opened, task, text, backend)
    else:
        results = _completed(opened, task, text, tokens, backend)
    if as_json:
        print_json([{"text": line, **result} for line, result in zip(text, results, strict=True)])
        return
    for line, result in zip(text, results, strict=True):
        if "completion" in result:
            print(f"{line}{result['completion']}")
        else:
            print(f"{printable(result['label']) + ' ' if result['label'] else ''}{result['score']:.4f}  {line}")


def _classified(opened: Bundle, task: str, text: list[str], backend: BackendChoice) -> list[dict[str, Any]]:
    from engines.runtime import load
    from engines.text import TextEncoder, predictions

    graph = opened.graph(opened.task(task))
    inputs = TextEncoder(opened).encode(text, graph)
    with load(opened.path, task, backend.value) as session:
        return [asdict(result) for result in predictions(session.run(inputs)[graph.outputs[0].name], opened.task(task).labels)]


def _completed(opened: Bundle, task: str, text: list[str], tokens: int, backend: BackendChoice) -> list[dict[str, Any]]:
    from engines.generate import check_generates, greedy, stop_tokens
    from engines.runtime import load
    from engines.text import TextEncoder

    graph = opened.graph(opened.task(task))
    check_generates(opened, task, graph)
    encoder, stop = TextEncoder(opened), stop_tokens(opened)
    inputs = encoder.encode_prompts(text, graph)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].astype(bool)
    room = opened.manifest.base.longest - ids.shape[1]
    with load(opened.path, task, backend.value) as session:
        generated = greedy(session, inputs, min(tokens, room), stop)
    return [{"completion": encoder.completion(prompt[counted].tolist(), row), "tokens": row} for prompt, counted, row in zip(ids, mask, generated, strict=True)]


def main() -> None:
    """Entry point: an expected failure is one line and exit status 3; a bug keeps its traceback."""
    usage_error: Any = typer.BadParameter.__base__  # typer keeps the class itself private
    try:
        status = app(standalone_mode=False)
    except usage_error as error:
        print_error(f"{error.format_message() or 'no command given'} (see lorafuse --help)")
        status = BAD_INPUT
    except LorafuseError as error:
        print_error(str(error))
        status = BAD_INPUT
    except typer.Abort:
        status = 130
    gc.freeze()  # a traced model leaves millions of objects; the interpreter's last collection would visit them all, for seconds
    raise SystemExit(status or DONE)


def _verification_inputs(opened: Bundle, task: str, texts: Path | None) -> list[dict[str, Any]]:
    """Batches of real text where the task takes text and the base came with its tokenizer, else random inputs."""
    from engines.inputs import random_inputs, sizes, takes_tokens
    from engines.text import PADDED_LEFT, TextEncoder

    graph, base = opened.graph(opened.task(task)), opened.manifest.base
    has_tokenizer = any(file.path == "base/tokenizer.json" for file in base.files)
    if texts is None and not (takes_tokens(graph) and has_tokenizer):
        return [random_inputs(graph, base.vocabulary, sizes(batch, length), seed=batch) for batch, length in ((1, 1), (3, 7), (2, 16))]
    if not takes_tokens(graph):
        raise LorafuseError(f"{texts}: task '{task}' takes no text; leave --texts out")
    lines = [line for line in _read_texts(texts) if line.strip()]
    if not lines:
        raise LorafuseError(f"{texts}: holds no text; expected a text a line")
    encoder = TextEncoder(opened)
    # Padding on the left has rows that see nothing, which transformers' softmax in float32 can't compute in a float64 oracle.
    batch = 1 if graph.head.task_type in PADDED_LEFT else 8
    return [encoder.encode(lines[start : start + batch], graph) for start in range(0, len(lines), batch)]


def _read_texts(path: Path | None) -> list[str]:
    if path is None:
        return (resources.files("exporter") / "sentences.txt").read_text(encoding="utf-8").splitlines()
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LorafuseError(f"{path}: can't be read as UTF-8 text ({error}); expected a text a line") from error


def _check_utf8(texts: list[str]) -> None:
    """Arguments may hold bytes that are no UTF-8, which Python keeps as lone surrogates."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LorafuseError(f"--text {text!r}: can't be read as UTF-8 text ({error.reason})") from error
