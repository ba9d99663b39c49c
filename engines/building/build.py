"""Building engines for the tasks of a bundle, and recording them in its manifest.

A task's own engine holds its weights. An engine whose weights can be exchanged (``refit``, ``stripped``) is built once
for each graph, on the base's weights, and is shared by the tasks of that graph. Of a backend, a part of a task may have
an engine for each target.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from engines.backends import Backend, BackendName, BuildOptions, Model, backend
from engines.building.profiles import default_profiles, given_profile
from engines.serving.load import model_of, task_model
from exporter.bundle.edits import with_graph_engine, with_task_engine, with_timing_cache
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Engine, File, Manifest
from exporter.bundle.staging import amend, named_by_content, staging
from exporter.bundle.task_part import TaskPart, task_part
from exporter.variants.dense_copy import densified
from exporter.variants.graphs import unadapted_graph
from lora.progress import Progress, unheard


@dataclass(frozen=True)
class Built:
    """One engine: what it is for (a task, or "unadapted" and its graph), its record in the manifest, its plan's bytes.

    The size is 0 where the model is the engine. ``seconds`` are the builder's; ``memory`` is the largest that the
    process has been, in bytes.
    """

    task: str
    engine: Engine
    size: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Asked:
    """What is asked for: a backend, its options, and a profile as ``given_profile`` takes it (empty: the defaults)."""

    backend: BackendName
    options: BuildOptions = field(default_factory=BuildOptions)
    profile: Sequence[str] = ()


@dataclass(frozen=True)
class _Job:
    """An engine to be built: its model, its record so far, and the edit that puts it into the manifest."""

    stem: str
    shown: str
    model: Callable[[Path], Model]
    engine: Engine
    place: Callable[[Bundle, Engine], Manifest]


def build(path: Path, task: str, asked: Asked, role: str = MODEL, progress: Progress = unheard) -> Built:
    """Build an engine for a part of a task of the bundle in ``path``, and record it.

    The bundle stays as it was when anything fails.
    """
    part, builder = task_part(open_bundle(path), task, role), backend(asked.backend)
    stem = part.name if part.role == MODEL else f"{part.name}-{part.role}"
    job = _Job(
        stem=stem,
        shown=part.name if part.role == MODEL else f"{part.name} ({part.role})",
        model=lambda folder: dense_model(part, folder) if builder.has_plans else task_model(part),
        engine=Engine(asked.backend, "", "", part.part.model.sha256, part.weights_sha256()),
        place=lambda current, engine: with_task_engine(current, part.name, part.role, engine),
    )
    return _build(part.bundle, builder, job, with_profiles(part, asked), progress)


def build_unadapted(path: Path, task: str, asked: Asked, role: str = MODEL, progress: Progress = unheard) -> Built:
    """Build an engine for the unadapted graph under a task's part.

    The tasks of that graph share it where the mode allows. As ``build`` otherwise.
    """
    part = task_part(open_bundle(path), task, role)
    digest = part.part.graph
    options = replace(with_profiles(part, asked), refittable=tuple(sorted(_refittable(part, asked.options.mode))))
    engine = Engine(
        asked.backend,
        "",
        "",
        model_sha256=digest,
        weights_sha256=part.weights_sha256(adapted=False),
        mode=options.mode,
        refittable=options.refittable,
    )
    job = _Job(
        stem=f"unadapted-{digest[:8]}",
        shown=f"unadapted {digest[:8]}",
        model=lambda folder: model_of(part, unadapted_graph(part).SerializeToString()),
        engine=engine,
        place=lambda current, engine: with_graph_engine(current, digest, engine),
    )
    return _build(part.bundle, backend(asked.backend), job, options, progress)


def dense_model(part: TaskPart, folder: Path) -> Model:
    """The part's model with its weights where a builder finds them.

    Those of a task stored as factors are merged into ``folder``.
    """
    if part.task.merges_at_load:
        return Model(densified(part, folder), folder)
    return task_model(part)


def with_profiles(part: TaskPart, asked: Asked) -> BuildOptions:
    """The options with the profile that was given, or the defaults, where they have none of their own."""
    if asked.options.profiles:
        return asked.options
    defaults = default_profiles(part.graph, part.bundle.manifest.base)
    profiles = (given_profile(asked.profile, part.graph, defaults[0]),) if asked.profile else defaults
    return replace(asked.options, profiles=profiles)


def _refittable(part: TaskPart, mode: str) -> frozenset[str]:
    """The weights that an engine of this mode lets be exchanged: what the tasks of the graph change, or all."""
    match mode:
        case "refit":
            return frozenset[str]().union(*(sharing.changed_names for sharing in _sharing(part)))
        case "stripped":
            return frozenset(part.graph.weights)
    return frozenset()


def _sharing(part: TaskPart) -> list[TaskPart]:
    """The parts of tasks that have the same graph."""
    tasks = part.bundle.manifest.tasks.items()
    names = [name for name, task in tasks if part.role in task.parts and task.parts[part.role].graph == part.part.graph]
    return [task_part(part.bundle, name, part.role) for name in names]


def _build(bundle: Bundle, builder: Backend, job: _Job, options: BuildOptions, progress: Progress) -> Built:
    with staging(bundle.path) as stage, staging(bundle.path) as scratch:
        timings = builder.timing_cache_key()
        former = bundle.manifest.timing_caches.get(timings) if timings else None
        options = replace(options, timing_cache=bundle.content(former) if former else None)
        started = time.perf_counter()
        plan = builder.build(job.model(scratch), options, progress)
        seconds = time.perf_counter() - started
        (stage / "engines").mkdir()
        file = _staged(stage, f"{job.stem}-{job.engine.backend}.plan", plan.content)
        cache = _staged(stage, "timings.cache", plan.timing_cache)
        engine = msgspec.structs.replace(job.engine, version=builder.version(), target=plan.target, file=file)
        amend(bundle.path, stage, lambda current: with_timing_cache(job.place(current, engine), timings, cache))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Built(job.shown, engine, file.size if file else 0, seconds, memory)


def _staged(stage: Path, name: str, content: bytes | None) -> File | None:
    if content is None:
        return None
    path = stage / "engines" / name
    path.write_bytes(content)
    named = named_by_content(path, path.stem)
    return msgspec.structs.replace(named, path=f"engines/{named.path}")
