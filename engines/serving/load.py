"""From a task in a bundle to a session that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Self, TypeVar

from engines.backends import Backend, BackendName, Model, Session, Weights, backend
from engines.serving.checked import CheckedSession, limits_of
from engines.serving.task_values import task_values
from exporter.bundle.changes import in_graph_order, merged_at_load
from exporter.bundle.graph_file import GraphFile, read_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Engine
from exporter.bundle.task_part import TaskPart, task_parts
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array

Part = TypeVar("Part")


class TaskSession:
    """A loaded task: a session for each of its parts. Use it as a context manager."""

    def __init__(self, task: str, sessions: Mapping[str, Session]) -> None:
        self._task, self._sessions = task, sessions

    def run(self, inputs: Mapping[str, Array], part: str = MODEL) -> dict[str, Array]:
        """The outputs of a part by name; a model of one part needs no word for it.

        Raises EngineError when an input is missing, unknown, or of a wrong dtype or rank, or there is no such part.
        """
        return self.part(part).run(inputs)

    def part(self, role: str = MODEL) -> Session:
        """The session of a part. Raises EngineError listing the parts that there are."""
        return part_of(self._sessions, self._task, role)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for session in self._sessions.values():
            session.__exit__(kind, error, trace)


def part_of(parts: Mapping[str, Part], task: str, role: str) -> Part:
    """What there is for a task's part. Raises EngineError listing the parts that there are."""
    if role not in parts:
        raise EngineError(f"task '{task}' has no part '{role}'; give one of its parts: {', '.join(sorted(parts))}")
    return parts[role]


def load(
    bundle: str | Path,
    task: str,
    backend_name: BackendName = "onnxruntime",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> TaskSession:
    """Load a task's engines; use the session as a context manager.

    The files are compared with the manifest's SHA-256 first. ``threads`` bounds CPU threads; None takes every core.
    ``provider_options`` go to ONNX Runtime's execution provider. ``digest`` pins the bundle, as in ``engines.open``.
    Of TensorRT, the task's own engine for this device is loaded where it has one, else its graph's is refitted. Raises
    BundleError when the bundle is damaged or has no such task, EngineError when the engine can't be loaded or is not of
    this export, version or device.

    >>> with load("bundle", "movies") as session:  # doctest: +SKIP
    ...     session.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["logits"]
    """
    opened, chosen = open_bundle(Path(bundle), digest), backend(backend_name, threads, provider_options)
    try:
        return _load(opened, task, backend_name, chosen)
    except BundleError:
        again = open_bundle(Path(bundle), digest)  # beside a writer, what the former manifest named may have gone
        if again.digest == opened.digest:
            raise
        return _load(again, task, backend_name, chosen)


def _load(bundle: Bundle, task: str, backend_name: BackendName, chosen: Backend) -> TaskSession:
    parts = task_parts(bundle, task)
    with ExitStack() as opened:
        sessions = {
            part.role: CheckedSession(opened.enter_context(load_part(part, backend_name, chosen)), limits_of(part))
            for part in parts
        }
        opened.pop_all()  # all are open: the task's session owns them from here
    return TaskSession(task, sessions)


def load_part(part: TaskPart, name: str, chosen: Backend) -> Session:
    """Load the engine of a part of a task. Raises as ``load`` does."""
    if not chosen.has_plans:
        return chosen.load(task_model(part), None)
    folder = part.bundle.path
    own = engine_here(part.part.engines, name, chosen)
    if own is not None:
        return chosen.load(Model(b"", folder), own_plan(part, own, chosen))
    shared = engine_here(part.graph.engines, name, chosen)
    if shared is None or shared.mode == "rebuild":
        raise EngineError(f"{folder}: task '{part.name}' has no {name} engine; run '{build_command(part, name)}'")
    values = task_values(part, shared.refittable)
    return chosen.load(Model(b"", folder, values), shared_plan(part, shared, chosen))


def task_model(part: TaskPart) -> Model:
    """The part's ONNX model on its weights, all of them checked; what is stored as factors is merged now."""
    weights = weights_of(part, part.model_graph)
    return Model(part.model, part.bundle.path, in_graph_order(part, merged_at_load(part)), weights)


def model_of(part: TaskPart, graph: bytes) -> Model:
    """The model of another form of the part's graph, on the part's checked weights."""
    return Model(graph, part.bundle.path, weights=weights_of(part, read_graph(part.model_path, graph)))


def weights_of(part: TaskPart, graph: GraphFile) -> Weights:
    """The part's checked weights that a form of its graph names, in memory."""
    return Weights(part.weights_of(graph), part.weights_files)


def engine_here(engines: tuple[Engine, ...], name: str, chosen: Backend) -> Engine | None:
    """Of the backend's engines, the one whose target this device can run; where none can, the first, to be refused.

    None where the backend has none. Raises NoDeviceError where there are several and no device.
    """
    built = [engine for engine in engines if engine.backend == name]
    if len(built) < 2:
        return built[0] if built else None
    return next((engine for engine in built if chosen.runs(engine.target) is None), built[0])


def own_plan(part: TaskPart, engine: Engine, chosen: Backend) -> Path:
    """The plan of the task's own engine.

    Raises EngineError when it is of an earlier export, another version, or for another device.
    """
    if (engine.model_sha256, engine.weights_sha256) != (part.part.model.sha256, part.weights_sha256()):
        raise _refused(part, engine, "it was built from an earlier export of the task")
    return _plan(part, engine, chosen)


def shared_plan(part: TaskPart, engine: Engine, chosen: Backend, trusted: bool = False) -> Path:
    """The plan that is refitted with the task's weights: as ``own_plan``, and only where that was proven to give the
    task's outputs.

    ``trusted`` is for the proof itself. A refit engine that was not compared may be wrong without a word: TensorRT 11.3
    documents that it may drop a bias, NVIDIA/TensorRT #3628 reports a blend of two tasks.
    """
    if beyond := sorted(part.changed_names - set(engine.refittable)):
        raise _refused(part, engine, f"the task changes '{beyond[0]}', which can't be exchanged in it")
    plan = _plan(part, engine, chosen)
    if not trusted and engine.proven.get(part.name) != part.weights_sha256():
        raise _refused(
            part,
            engine,
            "its outputs with this task's weights were not yet compared with those of an engine built from them",
        )
    return plan


def unadapted_plan(part: TaskPart, engine: Engine, chosen: Backend) -> Path:
    """The plan of the unadapted graph under the task, as it was built."""
    if engine.weights_sha256 != part.weights_sha256(adapted=False):
        raise _refused(part, engine, "it was built from another base", adapted=False)
    return _plan(part, engine, chosen, adapted=False)


def plan_of(part: TaskPart, name: BackendName, chosen: Backend, adapted: bool = True) -> Path:
    """The plan that was built for the task, or without ``adapted`` for the base under it.

    Raises EngineError naming the command where there is none.
    """
    engine = engine_here((part.part if adapted else part.graph).engines, name, chosen)
    if engine is None:
        command = build_command(part, name) + ("" if adapted else " --unadapted")
        raise EngineError(f"{part.bundle.path}: {_shown(part, adapted)} has no {name} engine; run '{command}'")
    if engine.mode == "stripped":
        # A rebuilt engine is what to build instead: the command names no mode.
        raise _refused(part, engine, "its weights are put in at load, which this runtime does not do", adapted, mode="")
    return own_plan(part, engine, chosen) if adapted else unadapted_plan(part, engine, chosen)


def build_command(part: TaskPart, backend_name: str) -> str:
    """What builds the task's engine, for an error's last words."""
    return f"lorafuse build {quote(str(part.bundle.path))} --task {part.name} --backend {backend_name}"


def _plan(part: TaskPart, engine: Engine, chosen: Backend, adapted: bool = True) -> Path:
    if engine.file is None:
        raise _refused(part, engine, "the manifest names no plan", adapted)
    plan = part.bundle.checked(engine.file)
    if engine.version != chosen.version():
        reason = f"it was built by version {engine.version}, and this is {chosen.version()}"
        raise _refused(part, engine, reason, adapted)
    if refusal := chosen.runs(engine.target):
        raise _refused(part, engine, refusal + _other_targets(part, engine, adapted), adapted)
    return plan


def _other_targets(part: TaskPart, engine: Engine, adapted: bool) -> str:
    """Further targets that engines of the backend were built for, none of which runs here either."""
    engines = (part.part if adapted else part.graph).engines
    others = [one.target for one in engines if one.backend == engine.backend and one.target != engine.target]
    return f" (others were built for {'; '.join(others)})" if others else ""


def _refused(part: TaskPart, engine: Engine, reason: str, adapted: bool = True, mode: str | None = None) -> EngineError:
    wanted = engine.mode if mode is None else mode
    options = (f" --mode {wanted}" if wanted not in ("", "rebuild") else "") + ("" if adapted else " --unadapted")
    command = build_command(part, engine.backend) + options
    of = f"'{part.name}'" if adapted else f"the base under '{part.name}'"
    return EngineError(
        f"{part.bundle.path}: the {engine.backend} engine of {of} can't be used: {reason}; run '{command}'"
    )


def _shown(part: TaskPart, adapted: bool) -> str:
    return f"task '{part.name}'" if adapted else f"the base under task '{part.name}'"
