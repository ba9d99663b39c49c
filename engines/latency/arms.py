"""The arms of a task: the same graph on two sets of weights, the same model in other forms, and what a user brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, get_args

from engines.backends import Model, Session, backend
from engines.latency.harness import Arm
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from engines.runtime import task_model
from exporter.bundle.manifest import Bundle
from lora.errors import EngineError, ExportError
from lora.tensorfile import Array

if TYPE_CHECKING:
    import onnx

Extra = Literal["resident", "adapter-h", "adapter-l"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)
RESERVED = frozenset({BASE, AGAIN, MERGED, UNMERGED, *EXTRAS})


@dataclass(frozen=True)
class Arms:
    """The arms in order, the base first; the digests of their graphs; and those that can't be had, with the reason."""

    arms: tuple[Arm, ...]
    digests: dict[str, str]
    left_out: dict[str, str]


def arms_of(bundle: Bundle, task: str, threads: int, extras: Sequence[Extra] = (), brought: Mapping[str, Path] | None = None) -> Arms:
    """Base, base again, merged and unmerged on ONNX Runtime, then ``extras``, then the ONNX files that were ``brought``, by name.

    A form that this task does not have (DoRA has no unmerged one) is left out. Raises EngineError naming a brought file that can't be
    loaded, or has other inputs or outputs than the task; or a name that is another arm's.
    """
    from exporter.arms import unadapted_graph
    from exporter.digest import graph_digest

    for name in RESERVED & (brought or {}).keys():
        raise EngineError(f"arm '{name}': the name of an arm that is there anyway; choose another")
    unadapted = unadapted_graph(bundle, task)
    arms: dict[str, Arm] = {}
    digests: dict[str, str] = {}
    left_out: dict[str, str] = {}

    def add(name: str, graph: onnx.ModelProto, folder: Path, fed: Mapping[str, Array] | None = None) -> None:
        content = graph.SerializeToString()
        arms[name] = Arm(name, lambda: _open(Model(content, folder), threads, fed or {}))
        digests[name] = graph_digest(graph)

    add(BASE, unadapted, bundle.path)
    add(AGAIN, unadapted, bundle.path)
    merged = task_model(bundle, task)
    arms[MERGED] = Arm(MERGED, lambda: backend("onnxruntime", threads).load(merged, None))
    digests[MERGED] = bundle.task(task).graph
    for name in (UNMERGED, *extras):
        try:
            add(name, *_form(bundle, task, name))
        except ExportError as error:
            left_out[name] = str(error)
    for name, path in (brought or {}).items():
        add(name, _brought(path, unadapted, threads), path.parent)
    return Arms(tuple(arms.values()), digests, left_out)


def _form(bundle: Bundle, task: str, name: str) -> tuple[onnx.ModelProto, Path, Mapping[str, Array]]:
    """The graph of another form of the task, the folder of its data, and the tensors that every run is fed."""
    match name:
        case "resident":
            from exporter.arms import switchable_graph

            graph, values = switchable_graph(bundle, task)
            return graph, bundle.path, values
        case "adapter-h" | "adapter-l":
            from exporter.baselines import bottleneck_graph

            return bottleneck_graph(bundle, task, name), bundle.path, {}
    from exporter.arms import unmerged_graph

    return unmerged_graph(bundle, task), bundle.path, {}


def _brought(path: Path, task: onnx.ModelProto, threads: int) -> onnx.ModelProto:
    """The graph of a file, after a session of it was opened: what is wrong with it is said before a long run, not in it."""
    from exporter.external import load_graph

    if path.suffix != ".onnx":
        raise EngineError(f"{path}: not an .onnx file; expected a model for ONNX Runtime, which runs all arms")
    try:
        graph = load_graph(path)
    except OSError as error:
        raise EngineError(f"{path}: can't be read ({error.strerror}); give a model in ONNX's format") from error
    for what in ("input", "output"):
        has, wanted = (_ports(model.graph, what) for model in (graph, task))
        if has != wanted:
            raise EngineError(f"{path}: has the {what}s {', '.join(has) or 'none'}; expected {', '.join(wanted)}, as the task has")
    try:
        with _open(Model(graph.SerializeToString(), path.parent), threads, {}):
            return graph
    except EngineError as error:
        raise EngineError(f"{path}: {error}") from error


def _ports(graph: onnx.GraphProto, what: Literal["input", "output"]) -> list[str]:
    """Names and types of the inputs or outputs; an initializer may be listed as an input and is none."""
    from onnx import TensorProto

    stored = {tensor.name for tensor in graph.initializer}
    values = [value for value in getattr(graph, what) if value.name not in stored]
    return sorted(f"{value.name} ({TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()})" for value in values)


def _open(model: Model, threads: int, fed: Mapping[str, Array]) -> Session:
    session = backend("onnxruntime", threads).load(model, None)
    return _Fed(session, fed) if fed else session


class _Fed:
    """A session that is fed the same tensors at every run, beside the inputs."""

    def __init__(self, session: Session, tensors: Mapping[str, Array]) -> None:
        self._session = session
        self._tensors = tensors

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run({**inputs, **self._tensors})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.__exit__(kind, error, trace)
