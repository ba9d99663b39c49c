"""One base and many tasks in one process: tasks are loaded when they are first asked for, and given up when memory is
short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Literal, Self

from engines.backends import BackendName, Model, Runs, Session, backend
from engines.serving.load import plan_of, task_model
from engines.serving.overridable import overridable
from engines.serving.pool import Pool
from engines.serving.task_values import changed_names, task_values
from exporter.bundle.changes import base_stored
from exporter.bundle.manifest import Bundle, open_bundle
from lora.errors import EngineError, LorafuseError
from lora.files.tensorfile import Array

Mode = Literal["dedicated", "resident"]
Key = tuple[str, bool]  # a task, and whether its adapter counts


@dataclass(frozen=True)
class _Switched:
    """A session that tasks share, and the weights that make it one of them."""

    session: Session
    values: Mapping[str, Array]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self.session.run({**inputs, **self.values})


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
        self._has_plans = backend_name.startswith("tensorrt")
        if self._has_plans and mode == "resident":
            raise EngineError("TensorRT's plans are each a task's own; choose mode 'dedicated'")
        self._backend = backend(backend_name, threads)
        self._owned, self._opening = ExitStack(), Lock()
        self._shared: dict[str, Session] = {}  # by the digest of their graph, as are the names of what its tasks change
        self._names: dict[str, frozenset[str]] = {}
        self._sessions: Pool[Key, Session] = Pool(
            self._open, self._session_cost, lambda session: session.__exit__(None, None, None), memory
        )
        self._values: Pool[Key, dict[str, Array]] = Pool(
            self._read, self._values_cost, lambda values: values.clear(), memory
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that can be asked for."""
        return tuple(sorted(self.bundle.manifest.tasks))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The tasks that are loaded now, the longest unused first."""
        held = self._sessions.held() if self._mode == "dedicated" else self._values.held()
        return tuple(task for task, adapted in held if adapted)

    @contextmanager
    def use(self, task: str, adapted: bool = True) -> Iterator[Runs]:
        """The task, kept loaded for as long as the block lasts; without ``adapted``, the base under the task's head.

        Raises BundleError when there is no such task or its files are damaged, EngineError when the memory budget can't
        hold the task or the runtime was closed. Where other blocks hold the memory, it waits for them to end.
        """
        if self._mode == "dedicated":
            with self._sessions.use((task, adapted)) as session:
                yield session
        else:
            with self._values.use((task, adapted)) as values:
                yield _Switched(self._resident(task), values)

    def run(self, task: str, inputs: Mapping[str, Array], adapted: bool = True) -> dict[str, Array]:
        """The task's outputs by name. Raises as ``use`` does, and EngineError when the inputs do not fit."""
        with self.use(task, adapted) as loaded:
            return loaded.run(inputs)

    async def arun(self, task: str, inputs: Mapping[str, Array], adapted: bool = True) -> dict[str, Array]:
        """``run`` in a thread of asyncio's pool.

        A cancelled call ends in the background, and its outputs are dropped.
        """
        return await asyncio.to_thread(self.run, task, inputs, adapted)

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

    def _open(self, key: Key) -> Session:
        task, adapted = key
        if self._has_plans:
            plan = plan_of(self.bundle, task, self._name, self._backend, adapted)
            return _InTurns(self._backend.load(Model(b"", self.bundle.path), plan))
        model = task_model(self.bundle, task)
        if not adapted:
            values = task_values(self.bundle, task, changed_names(self.bundle, task), adapted=False)
            model = Model(model.graph, model.folder, values)
        return self._backend.load(model, None)

    def _session_cost(self, key: Key) -> int:
        """A session holds all the weights of its graph, as a plan does."""
        task, adapted = key
        record = self.bundle.task(task)
        if self._has_plans:
            engine = (record if adapted else self.bundle.graph(record)).engines.get(self._name)
            return engine.file.size if engine is not None and engine.file is not None else 0
        return sum(file.size for file in (*self.bundle.manifest.base.weights, *record.own_weights))

    def _read(self, key: Key) -> dict[str, Array]:
        task, adapted = key
        names = self._exchanged(self.bundle.task(task).graph)
        values = task_values(self.bundle, task, names, adapted)
        if beyond := sorted(changed_names(self.bundle, task) - names):
            raise EngineError(
                f"task '{task}' could not be read when the runtime opened its graph, and changes '{beyond[0]}'; open"
                " the runtime again"
            )
        return values

    def _values_cost(self, key: Key) -> int:
        """What a task has in memory beside the base: its own tensors, merged or mapped."""
        task, adapted = key
        record = self.bundle.task(task)
        stored = sum(file.size for file in record.own_weights)
        if not adapted or record.store == "dense":
            return stored
        base = base_stored(self.bundle, task)
        return stored + sum(base[name].nbytes for name in changed_names(self.bundle, task) if name in base)

    def _resident(self, task: str) -> Session:
        """The session that the tasks of this task's graph share."""
        record = self.bundle.task(task)
        with self._opening:
            if record.graph not in self._shared:
                values = task_values(self.bundle, task, self._exchanged(record.graph), adapted=False)
                graph = overridable(self.bundle.checked(record.model).read_bytes(), values)
                self._shared[record.graph] = self._owned.enter_context(
                    self._backend.load(Model(graph, self.bundle.path), None)
                )
            return self._shared[record.graph]

    def _exchanged(self, digest: str) -> frozenset[str]:
        """What any task of the graph changes: with every run the session is given all of it."""
        if digest not in self._names:
            sharing = [name for name, record in self.bundle.manifest.tasks.items() if record.graph == digest]
            self._names.setdefault(digest, frozenset[str]().union(*(self._changed_if_sound(name) for name in sharing)))
        return self._names[digest]

    def _changed_if_sound(self, task: str) -> frozenset[str]:
        """A damaged task harms no other; who asks for it is told."""
        try:
            return changed_names(self.bundle, task)
        except LorafuseError:
            return frozenset()


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
