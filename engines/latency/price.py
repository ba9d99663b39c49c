"""What each way to get a task's engine costs on this machine: time, bytes, and what exchangeable weights cost at run
time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engines.backends import Backend, BuildOptions, Model, Plan, Session, backend
from engines.building.build import Asked, dense_model, with_profiles
from engines.feeds.inputs import random_inputs, sizes
from engines.latency.harness import Arm, take_set
from engines.serving.task_values import task_values
from exporter.bundle.staging import staging
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.progress import Progress, unheard

LOAD, ROUNDS = (1, 128), 50  # batch and tokens at which the refittable engine's tax is measured


@dataclass(frozen=True)
class Priced:
    """A way: its seconds and the plan's bytes, or None and in ``note`` why this machine can't tell."""

    way: str
    seconds: float | None = None
    size: int | None = None
    note: str | None = None


def price(part: TaskPart, asked: Asked, progress: Progress = unheard) -> list[Priced]:
    """Measure every way once, the bundle untouched. A way that fails here is listed with the reason.

    Raises BundleError where nothing can be written beside the bundle: plans that are measured lie there for a while.
    """
    options = replace(with_profiles(part, asked), mode="rebuild")
    with staging(part.bundle.path) as folder:
        work = _Work(part, backend(asked.backend), options, folder, progress)
        return [_tried(way, measured) for way, measured in work.ways().items()]


@dataclass
class _Work:
    """The ways, which build on each other's plans."""

    part: TaskPart
    chosen: Backend
    options: BuildOptions
    folder: Path
    progress: Progress

    def ways(self) -> dict[str, Callable[[], Priced]]:
        """Each way by its name, in the order in which they are to be measured."""
        return {
            "rebuild": lambda: self._built("rebuild", self.options),
            "rebuild with timing cache": self._cached,
            "refittable build": lambda: self._built(
                "refit", replace(self.options, mode="refit", refittable=self._changed())
            ),
            "refit of what the task changes": lambda: self._refitted("refit", self._changed()),
            "all weights refittable build": lambda: self._built(
                "stripped", replace(self.options, mode="stripped", refittable=self._all())
            ),
            "stripped plan, refitted whole": lambda: self._refitted("stripped", self._all()),
            "latency of the refittable engine": self._tax,
        }

    def _built(self, plan: str, options: BuildOptions) -> Priced:
        self.progress(f"building: {plan}")
        model = dense_model(self.part, self._fresh(f"model-{plan}"))
        started = time.perf_counter()
        built = self.chosen.build(model, options, self.progress)
        return self._kept(plan, built, time.perf_counter() - started)

    def _cached(self) -> Priced:
        timings = self.folder / "timings"
        if not timings.exists():
            return Priced("", note="this backend takes no timing cache")
        return self._built("cached", replace(self.options, timing_cache=timings.read_bytes()))

    def _kept(self, plan: str, built: Plan, seconds: float) -> Priced:
        if built.content is None:
            return Priced("", seconds, note="runs the ONNX model")
        (self.folder / f"{plan}.plan").write_bytes(built.content)
        if built.timing_cache is not None:
            (self.folder / "timings").write_bytes(built.timing_cache)
        return Priced("", seconds, len(built.content))

    def _refitted(self, plan: str, names: tuple[str, ...]) -> Priced:
        self.progress(f"refitting: {plan}")
        path = self._plan(plan)
        started = time.perf_counter()
        values = task_values(self.part, names)
        with self.chosen.load(Model(b"", self.part.bundle.path, values), path):
            return Priced(
                "",
                time.perf_counter() - started,
                path.stat().st_size,
                f"{len(names)} weights, with reading them and loading the plan",
            )

    def _tax(self) -> Priced:
        plans = {"rebuild": self._plan("rebuild"), "refit": self._plan("refit")}
        inputs = random_inputs(self.part.graph, self.part.bundle.manifest.base.vocabulary, sizes(*LOAD), seed=0)
        arms = [Arm(name, lambda path=path: self._opened(path)) for name, path in plans.items()]  # type: ignore[misc]  # mypy sees no default in a lambda
        times = np.array(
            take_set(arms, lambda session: session.run(inputs), ROUNDS, np.random.default_rng(0)).times, float
        )
        ratio = float(np.median(times[:, 1] / times[:, 0]))
        return Priced(
            "",
            note=(
                f"{ratio:.3f} times that of the rebuilt one, batch {LOAD[0]}, {LOAD[1]} tokens, {ROUNDS} rounds in"
                " turns"
            ),
        )

    def _opened(self, plan: Path) -> Session:
        return self.chosen.load(Model(b"", self.part.bundle.path), plan)

    def _plan(self, plan: str) -> Path:
        path = self.folder / f"{plan}.plan"
        if not path.exists():
            raise EngineError("its engine could not be built here")
        return path

    def _fresh(self, name: str) -> Path:
        (self.folder / name).mkdir()
        return self.folder / name

    def _changed(self) -> tuple[str, ...]:
        return tuple(sorted(self.part.changed_names))

    def _all(self) -> tuple[str, ...]:
        return tuple(sorted(self.part.graph.weights))


def _tried(way: str, measured: Callable[[], Priced]) -> Priced:
    try:
        return replace(measured(), way=way)
    except EngineError as error:
        return Priced(way, note=f"not on this machine: {error}")
