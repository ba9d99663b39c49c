"""What each way to get a task's engine costs on this machine: time, bytes, and the price of exchangeable weights."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from engines.backends import Backend, BuildOptions, Model, Session, backend
from engines.building.build import Asked, dense_model, with_profiles
from engines.feeds.inputs import random_inputs, sizes
from engines.latency.harness import Arm, take_set
from engines.serving.task_values import task_values
from exporter.bundle.staging import staging
from exporter.bundle.task_part import TaskPart
from lora.errors import EngineError
from lora.progress import Progress, unheard

LOAD, ROUNDS = (1, 128), 50  # batch and tokens at which the refittable engine's tax is measured
NOT_BUILT = "not on this machine: its engine could not be built here"


@dataclass(frozen=True)
class Priced:
    """A way: its seconds and the plan's bytes, or None and in ``note`` why this machine can't tell."""

    way: str
    seconds: float | None = None
    size: int | None = None
    note: str | None = None


@dataclass(frozen=True)
class _Engine:
    """An engine that was built to be measured: its price, and the plan and timings where there are any."""

    priced: Priced
    plan: Path | None = None
    timings: bytes | None = None


def price(part: TaskPart, asked: Asked, progress: Progress = unheard) -> list[Priced]:
    """Measure every way once, the bundle untouched. A way that fails here is listed with the reason.

    Raises BundleError where nothing can be written beside the bundle: plans that are measured lie there for a while.
    """
    options = replace(with_profiles(part, asked), mode="rebuild")
    changed, everything = tuple(sorted(part.changed_names)), tuple(sorted(part.graph.weights))
    with staging(part.bundle.path) as folder:
        bench = _Bench(part, backend(asked.backend), folder, progress)
        plain = bench.built("rebuild", options)
        cached = bench.rebuilt("rebuild with timing cache", options, plain.timings)
        refit = bench.built("refittable build", replace(options, mode="refit", refittable=changed))
        refitted = bench.refitted("refit of what the task changes", refit, changed)
        stripped = bench.built("all weights refittable build", replace(options, mode="stripped", refittable=everything))
        filled = bench.refitted("stripped plan, refitted whole", stripped, everything)
        tax = bench.tax("latency of the refittable engine", plain, refit)
    return [plain.priced, cached, refit.priced, refitted, stripped.priced, filled, tax]


@dataclass(frozen=True)
class _Bench:
    """Where engines of one part are built and timed: each way is a method."""

    part: TaskPart
    chosen: Backend
    folder: Path
    progress: Progress

    def built(self, way: str, options: BuildOptions) -> _Engine:
        """Build an engine; its plan and timings are for the ways that follow."""
        self.progress(f"building: {way}")
        place = Path(tempfile.mkdtemp(dir=self.folder))
        model = dense_model(self.part, place)
        started = time.perf_counter()
        try:
            plan = self.chosen.build(model, options, self.progress)
        except EngineError as error:
            return _Engine(_failed(way, error))
        seconds = time.perf_counter() - started
        if plan.content is None:
            return _Engine(Priced(way, seconds, note="runs the ONNX model"))
        (place / "engine.plan").write_bytes(plan.content)
        return _Engine(Priced(way, seconds, len(plan.content)), place / "engine.plan", plan.timing_cache)

    def rebuilt(self, way: str, options: BuildOptions, timings: bytes | None) -> Priced:
        """Build again with the timings of the first build."""
        if timings is None:
            return Priced(way, note="this backend takes no timing cache")
        return self.built(way, replace(options, timing_cache=timings)).priced

    def refitted(self, way: str, engine: _Engine, names: tuple[str, ...]) -> Priced:
        """Load the plan and put the task's values of these weights into it."""
        self.progress(f"refitting: {way}")
        if engine.plan is None:
            return Priced(way, note=NOT_BUILT)
        started = time.perf_counter()
        values = task_values(self.part, names)
        try:
            with self.chosen.load(Model(b"", self.part.bundle.path, values), engine.plan):
                seconds = time.perf_counter() - started
        except EngineError as error:
            return _failed(way, error)
        note = f"{len(names)} weights, with reading them and loading the plan"
        return Priced(way, seconds, engine.plan.stat().st_size, note)

    def tax(self, way: str, plain: _Engine, refit: _Engine) -> Priced:
        """Time the refittable engine beside the plain one, in turns."""
        if plain.plan is None or refit.plan is None:
            return Priced(way, note=NOT_BUILT)
        vocabulary = self.part.bundle.manifest.base.vocabulary
        inputs = random_inputs(self.part.graph, vocabulary, sizes(*LOAD), seed=0)
        arms = [Arm("plain", partial(self._opened, plain.plan)), Arm("refit", partial(self._opened, refit.plan))]
        try:
            taken = take_set(arms, lambda session: session.run(inputs), ROUNDS, np.random.default_rng(0))
        except EngineError as error:
            return _failed(way, error)
        times = np.array(taken.times, float)
        ratio = float(np.median(times[:, 1] / times[:, 0]))
        load = f"batch {LOAD[0]}, {LOAD[1]} tokens, {ROUNDS} rounds in turns"
        return Priced(way, note=f"{ratio:.3f} times that of the rebuilt one, {load}")

    def _opened(self, plan: Path) -> Session:
        return self.chosen.load(Model(b"", self.part.bundle.path), plan)


def _failed(way: str, error: EngineError) -> Priced:
    return Priced(way, note=f"not on this machine: {error}")
