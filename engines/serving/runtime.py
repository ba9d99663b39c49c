"""One base and many tasks in one process: tasks are loaded when they are first asked for, and given up when memory is
short.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

from engines.backends import BackendName, Model, Session, backend
from engines.serving.checked import CheckedSession, Switched, limits_of
from engines.serving.load import TaskSession, engine_here, part_of, plan_of, task_model
from engines.serving.pool import Pool
from engines.serving.resident import exchanged_names, resident_model
from engines.serving.task_values import task_values
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Graph
from exporter.bundle.task_part import TaskPart, task_part, task_parts
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array

Mode = Literal["dedicated", "resident"]


@dataclass(frozen=True)
class _Key:
    """A task as a manifest has it, and whether its adapter counts.

    ``version`` covers all that the manifest says of the task, its graphs and the base: a task that a change left alone
    has the same key before and after.
    """

    task: str
    adapted: bool
    version: str
    bundle: Bundle = field(compare=False, repr=False)


class RunsTask(Protocol):
    """A task that is loaded and answers."""

    def run(self, inputs: Mapping[str, Array], part: str = MODEL) -> dict[str, Array]:
        """The outputs of a part by name; a model of one part needs no word for it.

        Raises EngineError when an input is missing, unknown, or of a wrong dtype or rank, or there is no such part.
        """
        ...


@dataclass(frozen=True)
class _Resident:
    """A task's tensors, and the sessions that it was loaded for, each by the role of a part."""

    task: str
    parts: Mapping[str, Switched]

    def run(self, inputs: Mapping[str, Array], part: str = MODEL) -> dict[str, Array]:
        return part_of(self.parts, self.task, part).run(inputs)


class _InTurns:
    """A session that one thread runs at a time."""

    def __init__(self, session: Session) -> None:
        self._session, self._lock = session, Lock()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        with self._lock:
            return self._session.run(inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)


class Runtime:
    """The tasks of a bundle on one backend. Use it as a context manager; every method may be called from any thread.

    *Dedicated*: each task has a session of its own, as fast as the unadapted model; a first use takes as long as
    loading a model. *Resident*: tasks of one graph share one session and hand it their tensors with every run; a task
    costs what it changes and a switch nothing, but weights that may change are not prepacked, which costs latency
    (``lorafuse bench --with resident`` measures it).

    Of TensorRT, a task is the plan that ``lorafuse build`` made of it, always dedicated; its runs take turns.
    """

    def __init__(
        self,
        bundle: Bundle,
        mode: Mode = "dedicated",
        threads: int | None = None,
        memory: int | None = None,
        backend_name: BackendName = "onnxruntime",
        pinned: bool = False,
    ) -> None:
        self._pinned = pinned
        self._bundle, self._mode, self._name = bundle, mode, backend_name
        self._backend = backend(backend_name, threads)
        if self._backend.has_plans and mode == "resident":
            raise EngineError("TensorRT's plans are each a task's own; choose mode 'dedicated'")
        self._opening, self._reloading = Lock(), Lock()
        # Resident sessions, by the manifest that they were opened under, by what the file of their graph computes (a
        # task's word for it, the digest, is checked by nobody here), and by what they let be exchanged.
        self._shared: dict[tuple[str, str, frozenset[str]], Session] = {}
        # What its tasks change, by the bundle's and a graph's digest.
        self._names: dict[tuple[str, str], frozenset[str]] = {}
        self._sessions: Pool[_Key, TaskSession] = Pool(
            self._open, self._session_cost, lambda session: session.__exit__(None, None, None), memory
        )
        self._values: Pool[_Key, _Resident] = Pool(self._read, self._values_cost, lambda resident: None, memory)

    @property
    def bundle(self) -> Bundle:
        """The bundle as it was when the runtime was opened, or reloaded last."""
        return self._bundle

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that can be asked for."""
        return tuple(sorted(self.bundle.manifest.tasks))

    def graph(self, task: str, part: str = MODEL) -> Graph:
        """What a part of the task takes and gives: ports with names, dtypes and shapes.

        Raises BundleError when there is no such task or part.
        """
        return task_part(self.bundle, task, part).graph

    def labels(self, task: str) -> tuple[str, ...]:
        """The task's class labels in the order of its outputs; none for a regression."""
        return self.bundle.task(task).labels

    @property
    def loaded(self) -> tuple[str, ...]:
        """The tasks that are loaded now, the longest unused first."""
        return tuple(dict.fromkeys(key.task for key in self._pool.held() if key.adapted))

    @property
    def _pool(self) -> Pool[_Key, TaskSession] | Pool[_Key, _Resident]:
        return self._sessions if self._mode == "dedicated" else self._values

    def preload(self, task: str) -> None:
        """Load the task now, so that its first answer need not wait for it. Raises as ``use`` does."""
        with self.use(task):
            pass

    def evict(self, task: str) -> None:
        """Give the task's memory back: now, or when the runs of it that are in progress have ended.

        Who asks for it later has it loaded again. Raises BundleError when there is no such task.
        """
        self.bundle.task(task)
        self._pool.evict(lambda key: key.task == task)

    def reload(self, digest: str | None = None) -> None:
        """Take the bundle as it is now. Runs in progress end on what they began with, and tasks that are as they were
        stay loaded.

        ``digest`` pins what is taken, and must be given where the runtime was opened with one. Raises BundleError, and
        goes on as before, when the bundle can't be opened or is another.
        """
        with self._reloading:
            if self._pinned and digest is None:
                raise BundleError(
                    f"{self.bundle.path}: the runtime is pinned to {self.bundle.digest}; give the digest of what is to"
                    " be taken"
                )
            self._bundle = open_bundle(self.bundle.path, digest)
            current = {self._key(task, True).version for task in self.tasks}
            with self._opening:
                self._shared = {key: held for key, held in self._shared.items() if key[0] == _base_of(self._bundle)}
                self._names = {}
        self._pool.evict(lambda key: key.version not in current)

    @contextmanager
    def use(self, task: str, adapted: bool = True) -> Iterator[RunsTask]:
        """The task, kept loaded for as long as the block lasts; without ``adapted``, the base under the task's head.

        Raises BundleError when there is no such task or its files are damaged, EngineError when the memory budget can't
        hold the task or the runtime was closed. Where blocks of other threads hold the memory, it waits for them to
        end.
        """
        with self._pool.use(self._key(task, adapted)) as loaded:
            yield loaded

    def run(self, task: str, inputs: Mapping[str, Array], adapted: bool = True, part: str = MODEL) -> dict[str, Array]:
        """The outputs of a part of the task by name. Raises as ``use`` does, and EngineError when the inputs do not
        fit.
        """
        with self.use(task, adapted) as loaded:
            return loaded.run(inputs, part)

    async def arun(
        self, task: str, inputs: Mapping[str, Array], adapted: bool = True, part: str = MODEL
    ) -> dict[str, Array]:
        """``run`` in a thread of asyncio's pool.

        A cancelled call ends in the background, and its outputs are dropped.
        """
        return await asyncio.to_thread(self.run, task, inputs, adapted, part)

    def close(self) -> None:
        """Wait for the runs in progress of other threads, then give all memory back.

        Raises EngineError at once inside a ``use`` or a run of this thread, as in a signal's handler.
        """
        self._pool.close()
        with self._opening:
            self._shared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _key(self, task: str, adapted: bool) -> _Key:
        bundle = self._bundle
        record, base = bundle.task(task), bundle.manifest.base
        graphs = [bundle.manifest.graphs[record.parts[role].graph] for role in sorted(record.parts)]
        version = hashlib.sha256(msgspec.json.encode((record, graphs, base), order="deterministic")).hexdigest()
        return _Key(task, adapted, version, bundle)

    def _open(self, key: _Key) -> TaskSession:
        with self._told_of_changes(key), ExitStack() as opened:
            sessions = {
                part.role: CheckedSession(opened.enter_context(self._open_part(part, key.adapted)), limits_of(part))
                for part in task_parts(key.bundle, key.task)
            }
            opened.pop_all()  # all are open: the task's session owns them from here
        return TaskSession(key.task, sessions)

    def _open_part(self, part: TaskPart, adapted: bool) -> Session:
        if self._backend.has_plans:
            plan = plan_of(part, self._name, self._backend, adapted)
            return _InTurns(self._backend.load(Model(b"", part.bundle.path), plan))
        model = task_model(part)
        if not adapted:
            model = replace(model, values=task_values(part, part.changed_names, adapted=False))
        return self._backend.load(model, None)

    def _session_cost(self, key: _Key) -> int:
        """A session holds all the weights of its graph, as a plan does."""
        parts = task_parts(key.bundle, key.task)
        if self._backend.has_plans:
            return sum(self._plan_size(part, key.adapted) for part in parts)
        own = sum(file.size for part in parts for file in part.part.own_weights)
        return own + sum(file.size for file in key.bundle.manifest.base.weights)

    def _plan_size(self, part: TaskPart, adapted: bool) -> int:
        engine = engine_here((part.part if adapted else part.graph).engines, self._name, self._backend)
        return engine.file.size if engine is not None and engine.file is not None else 0

    def _read(self, key: _Key) -> _Resident:
        with self._told_of_changes(key):
            parts = {part.role: self._read_part(part, key.adapted) for part in task_parts(key.bundle, key.task)}
        return _Resident(key.task, parts)

    def _read_part(self, part: TaskPart, adapted: bool) -> Switched:
        names = self._exchanged(part)
        values = task_values(part, names, adapted)
        if beyond := sorted((part.own.keys() | part.merged_at_load.keys()) - names):
            raise EngineError(
                f"task '{part.name}' could not be read when the runtime opened its graph, and changes '{beyond[0]}';"
                " reload the runtime"
            )
        return Switched(self._resident(part, names), values, limits_of(part))

    def _values_cost(self, key: _Key) -> int:
        """What a task has in memory beside the base: its own tensors, merged or mapped."""
        cost = 0
        for part in task_parts(key.bundle, key.task):
            cost += sum(file.size for file in part.part.own_weights)
            if key.adapted:
                cost += sum(part.base[name].nbytes for name in part.merged_at_load if name in part.base)
        return cost

    def _resident(self, part: TaskPart, names: frozenset[str]) -> Session:
        """The session that the tasks of this part's graph share, whose file says the same computation."""
        same = _base_of(part.bundle), f"{part.part.graph} {part.model_graph.skeleton}", names
        with self._opening:
            if same not in self._shared:
                self._shared[same] = self._backend.load(resident_model(part, names), None)
            return self._shared[same]

    def _exchanged(self, part: TaskPart) -> frozenset[str]:
        place = part.bundle.digest, part.part.graph
        if place not in self._names:
            self._names.setdefault(place, exchanged_names(part.bundle, part.part.graph))
        return self._names[place]

    @contextmanager
    def _told_of_changes(self, key: _Key) -> Iterator[None]:
        """A file that is gone because the bundle was changed is no damage: the error says what to do."""
        try:
            yield
        except BundleError as error:
            if not _has_changed(key.bundle):
                raise
            raise BundleError(
                f"{key.bundle.path}: has changed since the runtime read its manifest, and task '{key.task}' is not"
                f" loaded; call reload() ({error})"
            ) from error


def _base_of(bundle: Bundle) -> str:
    """Identifies the base's files, on which resident sessions stand."""
    return hashlib.sha256(msgspec.json.encode(bundle.manifest.base)).hexdigest()


def _has_changed(bundle: Bundle) -> bool:
    try:
        return open_bundle(bundle.path).digest != bundle.digest
    except BundleError:
        return False


def open_runtime(
    bundle: str | Path,
    mode: Mode = "dedicated",
    threads: int | None = None,
    memory: int | None = None,
    backend_name: BackendName = "onnxruntime",
    digest: str | None = None,
) -> Runtime:
    """A runtime for the tasks of a bundle. ``threads`` bounds ONNX Runtime's, ``memory`` the bytes of weights that
    tasks may hold. ``digest`` pins the bundle: any other, as ``lorafuse bundle ls`` prints it, is refused.

    Raises BundleError when there is no bundle, or another, EngineError when ``mode`` is unknown or the backend's
    library is not installed.

    >>> with open_runtime("bundle", mode="resident", memory=2**30) as runtime:  # doctest: +SKIP
    ...     runtime.run("movies", {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["logits"]
    """
    if mode not in ("dedicated", "resident"):
        raise EngineError(f"mode '{mode}' is not known; expected dedicated or resident")
    return Runtime(open_bundle(Path(bundle), digest), mode, threads, memory, backend_name, pinned=digest is not None)
