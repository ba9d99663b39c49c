"""What the arms are asked to do: a grid of batches and lengths, and a decoder's next token and whole generations."""

from __future__ import annotations

from collections.abc import Sequence

from engines.feeds.generate import greedy
from engines.feeds.inputs import CACHED, random_inputs, sizes, takes_tokens
from engines.latency.harness import Work
from engines.latency.report import Load
from exporter.bundle.records import Graph
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.files.tensorfile import Array


def loads_of(part: TaskPart, batches: Sequence[int], lengths: Sequence[int], tokens: int = 0) -> list[Load]:
    """Every batch with every length. A decoder also makes the one token after so many, and generates ``tokens`` more.

    Raises EngineError when that is more than the base takes, or ``tokens`` are asked of a task that generates none.
    """
    graph, longest = part.graph, part.bundle.manifest.base.longest
    decodes = any(port.name.startswith(CACHED) for port in graph.inputs)
    if tokens and not decodes:
        raise EngineError(
            f"{part.bundle.path}: task '{part.name}' is of type {graph.head.task_type} and generates no tokens; leave"
            " --tokens out"
        )
    loads = []
    for batch in batches:
        for length in lengths if takes_tokens(graph) else lengths[:1]:  # pixels and sound have a length of their own
            loads.append(Load(batch, length))
            if decodes:
                loads.append(Load(batch, 1, past=length))
            if tokens:
                loads.append(Load(batch, length, tokens=tokens))
    for load in loads:
        needed = load.past + load.length + load.tokens
        if takes_tokens(graph) and needed > longest:
            raise EngineError(f"{part.bundle.path}: {load} is more than the {longest} tokens that the base takes")
    return loads


def inputs_of(graph: Graph, vocabulary: int, load: Load) -> dict[str, Array]:
    """What a session is given at first: the same for every arm."""
    return random_inputs(graph, vocabulary, sizes(load.batch, load.length, load.past), seed=0)


def work_of(graph: Graph, vocabulary: int, load: Load) -> Work:
    """The load as something to do with a session: one run, or a prompt and its generation to the last token."""
    inputs = inputs_of(graph, vocabulary, load)
    if load.tokens:
        return lambda session: greedy(session, inputs, load.tokens)
    return lambda session: session.run(inputs)
