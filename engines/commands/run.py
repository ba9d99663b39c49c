"""``lorafuse run``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engines.commands.options import AsJson, Backend, BackendChoice, BundlePath, Digest, TaskName
from engines.commands.terminal import print_json
from lora.errors import LorafuseError

if TYPE_CHECKING:
    from exporter.bundle.task_part import TaskPart


def run(
    bundle: BundlePath,
    task: TaskName,
    text: Annotated[list[str], typer.Option(help="Text to run; repeatable.")],
    tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that a language model adds to a text, within what its base takes.")
    ] = 64,
    backend: Backend = BackendChoice.onnxruntime,
    digest: Digest = None,
    as_json: AsJson = False,
) -> None:
    """Run a task's engine on text: a classifier's label, a regression's value, a language model's completion.

    Example: lorafuse run bundle --task movies --text "A moving, funny film."
    """
    from exporter.bundle.manifest import open_bundle
    from exporter.bundle.task_part import task_part
    from lora.wording import printable, printable_lines

    _check_utf8(text)
    part = task_part(open_bundle(bundle, digest), task)
    if part.graph.head.task_type == "SEQ_CLS":
        results = _classified(part, text, backend)
    else:
        results = _completed(part, text, tokens, backend)
    if as_json:
        print_json([{"text": line, **result} for line, result in zip(text, results, strict=True)])
        return
    for line, result in zip(text, results, strict=True):
        if "completion" in result:
            print(f"{line}{printable_lines(result['completion'])}")
        else:
            print(f"{printable(result['label']) + ' ' if result['label'] else ''}{result['score']:.4f}  {line}")


def _classified(part: TaskPart, text: list[str], backend: BackendChoice) -> list[dict[str, Any]]:
    from engines.feeds.text import TextEncoder, predictions
    from engines.serving.load import load

    inputs = TextEncoder(part.bundle).encode(text, part.graph)
    with load(part.bundle.path, part.name, backend.value, digest=part.bundle.digest) as session:
        logits = session.run(inputs)[part.graph.outputs[0].name]
    return [asdict(result) for result in predictions(logits, part.task.labels)]


def _completed(part: TaskPart, text: list[str], tokens: int, backend: BackendChoice) -> list[dict[str, Any]]:
    from engines.feeds.generate import check_generates, greedy, stop_tokens
    from engines.feeds.text import TextEncoder
    from engines.serving.load import load

    check_generates(part)
    encoder, stop = TextEncoder(part.bundle), stop_tokens(part.bundle)
    inputs = encoder.encode_prompts(text, part.graph)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].astype(bool)
    room = part.bundle.manifest.base.longest - ids.shape[1]
    with load(part.bundle.path, part.name, backend.value, digest=part.bundle.digest) as session:
        generated = greedy(session, inputs, min(tokens, room), stop)
    return [
        {"completion": encoder.completion(prompt[counted].tolist(), row), "tokens": row}
        for prompt, counted, row in zip(ids, mask, generated, strict=True)
    ]


def _check_utf8(texts: list[str]) -> None:
    """Arguments may hold bytes that are no UTF-8, which Python keeps as lone surrogates."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise LorafuseError(f"--text {text!r}: can't be read as UTF-8 text ({error.reason})") from error
