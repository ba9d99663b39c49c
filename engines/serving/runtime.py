"""One base and many tasks in one process: tasks are loaded when they are first asked for, and given up when memory is
short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Protocol, Self

from engines.backends import BackendName, Model, Session, backend
from engines.serving.load import TaskSession, engine_here, part_of, plan_of, task_model
from engines.serving.pool import Pool
from engines.serving.resident import exchanged_names, resident_model
from engines.serving.task_values import task_values
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Graph
from exporter.bundle.task_part import TaskPart, task_part, task_parts
from lora.errors import EngineError
from lora.files.tensorfile import Array

Mode = Literal["dedicated", "resident"]
Key = tuple[str, bool]  # a task, and whether its adapter counts
Values = dict[str, dict[str, Array]]  # a task's tensors, by the roles of its parts


class RunsTask(Protocol):
    """A task that is loaded and answers."""

    def run(self, inputs: Mapping[str, Array], part: str = MODEL) -> dict[str, Array]:
        """The outputs of a part by name; a model of one part needs no word for it.

        Raises EngineError when an input is missing, unknown, or of a wrong dtype or rank, or there is no such part.
        """
        ...


@dataclass(frozen=True)
class _Switched:
    """Sessions that tasks share, and the weights that make them one of these tasks."""

    task: str
    sessions: Mapping[str, Session]
    values: Values

    def run(self, inputs: Mapping[str, Array], part: str = MODEL) -> dict[str, Array]:
        return part_of(self.sessions, self.task, part).run({**inputs, **self.values[part]})


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
    ) -> None:
        self.bundle, self._mode, self._name = bundle, mode, backend_name
        self._backend = backend(backend_name, threads)
        if self._backend.has_plans and mode == "resident":
            raise EngineError("TensorRT's plans are each a task's own; choose mode 'dedicated'")
        self._owned, self._opening = ExitStack(), Lock()
        # By what the file of their graph computes. A task's word for it, the digest, is checked by nobody here.
        self._shared: dict[str, Session] = {}
        # What its tasks change, by the digest of a graph.
        self._names: dict[str, frozenset[str]] = {}
        self._sessions: Pool[Key, TaskSession] = Pool(
            self._open, self._session_cost, lambda session: session.__exit__(None, None, None), memory
        )
        self._values: Pool[Key, Values] = Pool(self._read, self._values_cost, lambda values: values.clear(), memory)

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
        held = self._sessions.held() if self._mode == "dedicated" else self._values.held()
        return tuple(task for task, adapted in held if adapted)

    @contextmanager
    def use(self, task: str, adapted: bool = True) -> Iterator[RunsTask]:
        """The task, kept loaded for as long as the block lasts; without ``adapted``, the base under the task's head.

        Raises BundleError when there is no such task or its files are damaged, EngineError when the memory budget can't
        hold the task or the runtime was closed. Where other blocks hold the memory, it waits for them to end.
        """
        if self._mode == "dedicated":
            with self._sessions.use((task, adapted)) as session:
                yield session
        else:
            with self._values.use((task, adapted)) as values:
                sessions = {part.role: self._resident(part) for part in task_parts(self.bundle, task)}
                yield _Switched(task, sessions, values)

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
        """Wait for the runs in progress, then give all memory back."""
        self._sessions.close()
        self._values.close()
        with self._opening:
            self._shared.clear()
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, key: Key) -> TaskSession:
        task, adapted = key
        with ExitStack() as opened:
            parts = task_parts(self.bundle, task)
            sessions = {part.role: opened.enter_context(self._open_part(part, adapted)) for part in parts}
            opened.pop_all()  # all are open: the task's session owns them from here
        return TaskSession(task, sessions)

    def _open_part(self, part: TaskPart, adapted: bool) -> Session:
        if self._backend.has_plans:
            plan = plan_of(part, self._name, self._backend, adapted)
            return _InTurns(self._backend.load(Model(b"", self.bundle.path), plan))
        model = task_model(part)
        if not adapted:
            model = replace(model, values=task_values(part, part.changed_names, adapted=False))
        return self._backend.load(model, None)

    def _session_cost(self, key: Key) -> int:
        """A session holds all the weights of its graph, as a plan does."""
        task, adapted = key
        parts = task_parts(self.bundle, task)
        if self._backend.has_plans:
            return sum(self._plan_size(part, adapted) for part in parts)
        own = sum(file.size for part in parts for file in part.part.own_weights)
        return own + sum(file.size for file in self.bundle.manifest.base.weights)

    def _plan_size(self, part: TaskPart, adapted: bool) -> int:
        engine = engine_here((part.part if adapted else part.graph).engines, self._name, self._backend)
        return engine.file.size if engine is not None and engine.file is not None else 0

    def _read(self, key: Key) -> Values:
        task, adapted = key
        return {part.role: self._read_part(part, adapted) for part in task_parts(self.bundle, task)}

    def _read_part(self, part: TaskPart, adapted: bool) -> dict[str, Array]:
        names = self._exchanged(part.part.graph)
        values = task_values(part, names, adapted)
        if beyond := sorted((part.own.keys() | part.merged_at_load.keys()) - names):
            raise EngineError(
                f"task '{part.name}' could not be read when the runtime opened its graph, and changes '{beyond[0]}';"
                " open the runtime again"
            )
        return values

    def _values_cost(self, key: Key) -> int:
        """What a task has in memory beside the base: its own tensors, merged or mapped."""
        task, adapted = key
        cost = 0
        for part in task_parts(self.bundle, task):
            cost += sum(file.size for file in part.part.own_weights)
            if adapted:
                cost += sum(part.base[name].nbytes for name in part.merged_at_load if name in part.base)
        return cost

    def _resident(self, part: TaskPart) -> Session:
        """The session that the tasks of this part's graph share, whose file says the same computation."""
        same = f"{part.part.graph} {part.model_graph.skeleton}"
        with self._opening:
            if same not in self._shared:
                model = resident_model(part, self._exchanged(part.part.graph))
                self._shared[same] = self._owned.enter_context(self._backend.load(model, None))
            return self._shared[same]

    def _exchanged(self, digest: str) -> frozenset[str]:
        if digest not in self._names:
            self._names.setdefault(digest, exchanged_names(self.bundle, digest))
        return self._names[digest]


def open_runtime(
    bundle: str | Path,
    mode: Mode = "dedicated",
    threads: int | None = None,
    memory: int | None = None,
    backend_name: BackendName = "onnxruntime",
) -> Runtime:
    """A runtime for the tasks of a bundle. ``threads`` bounds ONNX Runtime's, ``memory`` the bytes of weights that
    tasks may hold.

    Raises BundleError when there is no bundle, EngineError when ``mode`` is unknown or the backend's library is not
    installed.

    >>> with open_runtime("bundle", mode="resident", memory=2**30) as runtime:  # doctest: +SKIP
    ...     runtime.run("movies", {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["logits"]
    """
    if mode not in ("dedicated", "resident"):
        raise EngineError(f"mode '{mode}' is not known; expected dedicated or resident")
    return Runtime(open_bundle(Path(bundle)), mode, threads, memory, backend_name)
