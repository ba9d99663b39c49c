"""The stages of verification that an engine runs: the ONNX graph as it stands, and every built engine of the task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import cast

from engines.backends import BackendName, Session, backend
from engines.backends.onnxruntime import OnnxRuntime
from engines.serving.load import load_part, task_model
from exporter.bundle.task_part import TaskPart
from lora.files.tensorfile import Array

Runner = Callable[[Mapping[str, Array]], Array]


def runners(part: TaskPart, threads: int = 1) -> dict[str, Runner]:
    """A runner per stage, each opening its session at the first call: an engine this machine can't run raises there.

    One session is open at a time, so that a large model is in memory once.
    """
    output = part.graph.outputs[0].name
    names = sorted({"onnxruntime", *(engine.backend for engine in part.part.engines)})
    engines = {f"engine {name}": functools.partial(_engine, part, cast("BackendName", name), threads) for name in names}
    plain = functools.partial(_unoptimized, part, threads)
    opened: dict[str, Session] = {}
    stages = {"ONNX graph": plain, **engines}
    return {name: _lazily(opened, name, open_session, output) for name, open_session in stages.items()}


def _engine(part: TaskPart, name: BackendName, threads: int) -> Session:
    return load_part(part, name, backend(name, threads))


def _unoptimized(part: TaskPart, threads: int) -> Session:
    """The graph node by node, as exported: what ONNX Runtime's own optimizations do is then seen apart."""
    return OnnxRuntime(threads, optimize=False).load(task_model(part), None)


def _lazily(opened: dict[str, Session], name: str, open_session: Callable[[], Session], output: str) -> Runner:
    def run(inputs: Mapping[str, Array]) -> Array:
        if name not in opened:
            opened.clear()
            opened[name] = open_session()
        return opened[name].run(inputs)[output]

    return run
