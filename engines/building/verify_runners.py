"""The stages of verification that an engine runs: the ONNX graph as it stands, and every built engine of the task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import cast

from engines.backends import BackendName, Session
from engines.backends.onnxruntime import OnnxRuntime
from engines.serving.load import load, task_model
from exporter.bundle.manifest import Bundle
from lora.files.tensorfile import Array

Runner = Callable[[Mapping[str, Array]], Array]


def runners(bundle: Bundle, task: str, threads: int = 1) -> dict[str, Runner]:
    """A runner per stage, each opening its session at the first call: an engine this machine can't run raises there."""
    output = bundle.graph(bundle.task(task)).outputs[0].name
    names = sorted({"onnxruntime", *bundle.task(task).engines})
    engines = {
        f"engine {name}": functools.partial(load, bundle.path, task, cast("BackendName", name), threads)
        for name in names
    }
    plain = functools.partial(_unoptimized, bundle, task, threads)
    return {name: _lazily(open_session, output) for name, open_session in {"ONNX graph": plain, **engines}.items()}


def _unoptimized(bundle: Bundle, task: str, threads: int) -> Session:
    """The graph node by node, as exported: what ONNX Runtime's own optimizations do is then seen apart."""
    return OnnxRuntime(threads, optimize=False).load(task_model(bundle, task), None)


def _lazily(open_session: Callable[[], Session], output: str) -> Runner:
    session = functools.cache(open_session)
    return lambda inputs: session().run(inputs)[output]
