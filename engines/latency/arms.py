"""The arms of a task: the same graph on two sets of weights, the same model in other forms, and what a user brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from engines.backends import Model
from engines.latency.arm_engines import Open, Opener
from engines.latency.harness import Arm
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from engines.serving.load import model_of
from engines.serving.resident import exchanged_names, resident_model
from engines.serving.task_values import task_values
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError, ExportError
from lora.files.tensorfile import Array

if TYPE_CHECKING:
    import onnx

Extra = Literal["resident", "adapter-h", "adapter-l"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)
SELDOM = 3  # rounds: the positive control shows power, and no verdict waits for it
RESERVED = frozenset({BASE, AGAIN, MERGED, UNMERGED, *EXTRAS})


@dataclass(frozen=True)
class Arms:
    """The arms in order, the base first; the digests of their graphs; and those that can't be had, with the reason.

    ``backend`` is what runs them and its version; ``on_device`` says whether its sessions tell what a run takes on a
    device, ``on_thread`` whether they run on the calling thread, so that its CPU time is theirs.
    """

    arms: tuple[Arm, ...]
    digests: dict[str, str]
    left_out: dict[str, str]
    backend: str
    on_device: bool
    on_thread: bool = False


def arms_of(
    part: TaskPart, opener: Opener, extras: Sequence[Extra] = (), brought: Mapping[str, Path] | None = None
) -> Arms:
    """Base, base again, merged and unmerged as ``opener`` opens them, then ``extras``, then the files that were
    ``brought``, by name.

    A form that this task does not have (DoRA has no unmerged one) is left out. Raises EngineError naming a brought file
    that can't be loaded, or has other inputs or outputs than the task; or a name that is another arm's. NoDeviceError
    where the backend needs a device.
    """
    from exporter.graph.digest import graph_digest
    from exporter.graph.external_data import parsed
    from exporter.variants.graphs import unadapted_graph

    for name in RESERVED & (brought or {}).keys():
        raise EngineError(f"arm '{name}': the name of an arm that is there anyway; choose another")
    unadapted = unadapted_graph(part)
    base, merged = opener.pair(part, model_of(part, unadapted.SerializeToString()))
    arms = [Arm(BASE, base), Arm(AGAIN, base), Arm(MERGED, merged)]
    digests = dict.fromkeys((BASE, AGAIN), graph_digest(unadapted)) | {MERGED: part.part.graph}
    left_out: dict[str, str] = {}
    for name in (UNMERGED, *extras):
        try:
            model, fed = _form(part, name)
            arms.append(Arm(name, opener.graph(part, name, model, fed), every=SELDOM if name == UNMERGED else 1))
            digests[name] = graph_digest(parsed(model.graph))
        except (ExportError, EngineError) as error:
            left_out[name] = str(error)
    for name, path in (brought or {}).items():
        open_session, digest = _brought(part, name, path, unadapted, opener)
        arms.append(Arm(name, open_session, asked=True))
        digests |= {name: digest} if digest else {}
    return Arms(tuple(arms), digests, left_out, opener.described, opener.on_device, opener.on_thread)


def _form(part: TaskPart, name: str) -> tuple[Model, Mapping[str, Array]]:
    """The model of another form of the task, whose data are the bundle's, and the tensors that every run is fed."""
    if name == "resident":  # the very model, and the very tensors, that a resident runtime runs
        exchanged = exchanged_names(part.bundle, part.part.graph)
        return resident_model(part, exchanged), task_values(part, exchanged)
    return model_of(part, _other_graph(part, name).SerializeToString()), {}


def _other_graph(part: TaskPart, name: str) -> onnx.ModelProto:
    match name:
        case "adapter-h" | "adapter-l":
            from exporter.variants.bottleneck_graphs import bottleneck_graph

            return bottleneck_graph(part, name)
    from exporter.variants.graphs import unmerged_graph

    return unmerged_graph(part)


def _brought(
    part: TaskPart, name: str, path: Path, unadapted: onnx.ModelProto, opener: Opener
) -> tuple[Open, str | None]:
    """A file's engine, after a session of it was opened: what is wrong with it is said before a long run, not in it.

    An ONNX graph has a digest.
    """
    from exporter.graph.digest import graph_digest

    graph = _graph_of(path, unadapted) if path.suffix == ".onnx" else None
    try:
        if graph is None:
            return _opens(opener.engine(path)), None
        model = Model(graph.SerializeToString(), path.parent)
        return _opens(opener.graph(part, name, model, {})), graph_digest(graph)
    except (EngineError, OSError) as error:
        raise EngineError(f"{path}: {error}") from error


def _opens(open_session: Open) -> Open:
    with open_session():
        return open_session


def _graph_of(path: Path, task: onnx.ModelProto) -> onnx.ModelProto:
    """The graph of a file that takes and gives what the task does."""
    from exporter.graph.external_data import load_graph

    try:
        graph = load_graph(path)
    except OSError as error:
        raise EngineError(f"{path}: can't be read ({error.strerror}); give a model in ONNX's format") from error
    for what in ("input", "output"):
        has, wanted = (_ports(model.graph, what) for model in (graph, task))
        if has != wanted:
            raise EngineError(
                f"{path}: has the {what}s {', '.join(has) or 'none'}; expected {', '.join(wanted)}, as the task has"
            )
    return graph


def _ports(graph: onnx.GraphProto, what: Literal["input", "output"]) -> list[str]:
    """Names and types of the inputs or outputs; an initializer may be listed as an input and is none."""
    from onnx import TensorProto

    stored = {tensor.name for tensor in graph.initializer}
    values = [value for value in getattr(graph, what) if value.name not in stored]
    return sorted(
        f"{value.name} ({TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()})" for value in values
    )
