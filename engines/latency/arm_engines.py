"""How an arm's graph becomes an engine: a session of ONNX Runtime, or a plan of TensorRT's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Protocol, Self

from engines.backends import Backend, BackendName, BuildOptions, Model, Session, backend
from engines.backends.tensorrt.target import AMPERE_PLUS, PORTABLE
from engines.building.build import Asked, with_profiles
from engines.serving.load import build_command, engine_here, plan_of, task_model
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

Open = Callable[[], Session]


class Opener(Protocol):
    """Opens a task's engines, and those of other graphs, on one backend.

    ``on_device`` says whether its sessions tell what a run takes on a device; ``on_thread`` whether they run on the
    calling thread alone.
    """

    on_device: bool

    @property
    def on_thread(self) -> bool:
        """Whether the calling thread's CPU time is the engine's."""
        ...

    @property
    def described(self) -> str:
        """The backend and its version."""
        ...

    def pair(self, part: TaskPart, unadapted: Model) -> tuple[Open, Open]:
        """The unadapted engine and the task's.

        Raises EngineError where one can't be had, NoDeviceError without a device.
        """
        ...

    def graph(self, part: TaskPart, name: str, model: Model, fed: Mapping[str, Array]) -> Open:
        """An engine of another graph with the task's inputs, given ``fed`` at every run.

        Raises EngineError where there can be none.
        """
        ...

    def engine(self, path: Path) -> Open:
        """An engine that was built elsewhere. Raises EngineError where the backend has none."""
        ...


@contextmanager
def opener(name: BackendName, threads: int, progress: Progress = unheard) -> Iterator[Opener]:
    """The backend's. What it builds is gone at the end."""
    if not backend(name, threads).has_plans:
        yield OnnxRuntimeOpener(threads, name)
        return
    with TemporaryDirectory(prefix="lorafuse-bench-") as folder:
        yield PlanOpener(name, Path(folder), progress)


@dataclass(frozen=True)
class OpenModel:
    """Opens sessions of one model, which are fed the same tensors at every run beside their inputs."""

    backend: Backend
    model: Model
    fed: Mapping[str, Array] = field(default_factory=dict)

    def __call__(self) -> Session:
        """A fresh session."""
        session = self.backend.load(self.model, None)
        return _Fed(session, self.fed) if self.fed else session


class OnnxRuntimeOpener:
    """Sessions of ONNX Runtime, on the CPU or by the provider that ``name`` says."""

    on_device = False

    def __init__(self, threads: int, name: BackendName = "onnxruntime") -> None:
        self._backend, self._name, self._threads = backend(name, threads), name, threads

    @property
    def on_thread(self) -> bool:
        """On the CPU with one thread ONNX Runtime has no pool, and runs every node where it is called."""
        return self._name == "onnxruntime" and self._threads == 1

    @property
    def described(self) -> str:
        """The backend and its version."""
        return f"{self._name} {self._backend.version()}"

    def pair(self, part: TaskPart, unadapted: Model) -> tuple[Open, Open]:
        """The unadapted graph, and the task's model."""
        merged = task_model(part)
        return OpenModel(self._backend, unadapted), OpenModel(self._backend, merged)

    def graph(self, part: TaskPart, name: str, model: Model, fed: Mapping[str, Array]) -> Open:
        """The graph, fed what it is to be fed."""
        return OpenModel(self._backend, model, fed)

    def engine(self, path: Path) -> Open:
        """ONNX Runtime has none."""
        raise EngineError("not an .onnx file; expected a model for ONNX Runtime, which runs all arms")


class PlanOpener:
    """The bundle's plans; those of other graphs are built into ``folder`` for the same target, with the default
    profiles.
    """

    on_device = True
    on_thread = False

    def __init__(self, name: BackendName, folder: Path, progress: Progress) -> None:
        self._backend, self._name, self._folder, self._progress = backend(name), name, folder, progress

    @property
    def described(self) -> str:
        """The backend and its version."""
        return f"{self._name} {self._backend.version()}"

    def pair(self, part: TaskPart, unadapted: Model) -> tuple[Open, Open]:
        """The plans that the bundle records, which must be there."""
        base, own = (plan_of(part, self._name, self._backend, adapted) for adapted in (False, True))
        engine = engine_here(part.graph.engines, self._name, self._backend)
        assert engine is not None
        if engine.mode != "rebuild":
            raise EngineError(
                f"{part.bundle.path}: the base's {self._name} engine is of mode {engine.mode}, and the tasks' are not; "
                f"build it as they were, with '{build_command(part, self._name)} --unadapted'"
            )
        return self.engine(base), self.engine(own)

    def graph(self, part: TaskPart, name: str, model: Model, fed: Mapping[str, Array]) -> Open:
        """A plan, built now."""
        if fed:
            raise EngineError(
                "a plan's weights are exchanged by refitting; 'lorafuse build --price' measures what that costs"
            )
        engine = engine_here(part.part.engines, self._name, self._backend)
        assert engine is not None
        self._progress(f"building the plan of '{name}'")
        options = with_profiles(part, Asked(self._name, self._for_target(engine.target)))
        plan = self._backend.build(model, options, self._progress)
        assert plan.content is not None
        path = self._folder / f"{len(list(self._folder.iterdir()))}.plan"
        path.write_bytes(plan.content)
        return self.engine(path)

    def engine(self, path: Path) -> Open:
        """A plan from anywhere; the device is asked for when it is opened."""
        return lambda: self._backend.load(Model(b"", path.parent), path)

    def _for_target(self, target: str) -> BuildOptions:
        """Full TensorRT builds for the GPU at hand, or for its kin; RTX for what it is told."""
        if self._name == "tensorrt":
            return BuildOptions(compatible=target == AMPERE_PLUS)
        return BuildOptions(() if target == PORTABLE else tuple(target.split(", ")))


class _Fed:
    """A session that is fed the same tensors at every run, beside the inputs."""

    def __init__(self, session: Session, tensors: Mapping[str, Array]) -> None:
        self._session = session
        self._tensors = tensors

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._session.run({**inputs, **self._tensors})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)
