"""Building engines for the tasks of a bundle, and recording them in its manifest.

A task's own engine holds its weights. An engine whose weights can be exchanged (``refit``, ``stripped``) is built once
for each graph, on the base's weights, and is shared by the tasks of that graph.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from engines.backends import Backend, BackendName, BuildOptions, Model, backend
from engines.building.profiles import default_profiles, given_profile
from engines.serving.load import task_model
from engines.serving.task_values import changed_names
from exporter.bundle.manifest import Bundle, Engine, File, Graph, Manifest, open_bundle
from exporter.bundle.staging import amend, named_by_content, staging
from exporter.variants.dense_copy import densified
from exporter.variants.graphs import unadapted_graph
from lora.errors import BundleError
from lora.progress import Progress, unheard

Place = Callable[[Bundle, Engine], Manifest]


@dataclass(frozen=True)
class Built:
    """One engine: what it is for (a task, or "unadapted" and its graph), its record in the manifest, the size of its
    plan in bytes.

    The size is 0 where the model is the engine. ``seconds`` are the builder's; ``memory`` is the largest that the
    process has been, in bytes.
    """

    task: str
    engine: Engine
    size: int
    seconds: float
    memory: int


def build(
    path: Path,
    task: str,
    name: BackendName,
    options: BuildOptions,
    profile: Sequence[str] = (),
    progress: Progress = unheard,
) -> Built:
    """Build an engine for ``task`` and record it. The bundle stays as it was when anything fails.

    ``profile`` are ranges as ``given_profile`` takes them; where there are none, and none in ``options``, the defaults
    hold.
    """
    bundle = open_bundle(path)
    record = bundle.task(task)
    engine = Engine(name, "", "", model_sha256=record.model.sha256, weights_sha256=bundle.weights_sha256(record))

    def place(current: Bundle, engine: Engine) -> Manifest:
        record = current.task(task)  # it may have gone meanwhile
        engines = dict(sorted({**record.engines, engine.backend: engine}.items()))
        return msgspec.structs.replace(
            current.manifest, tasks={**current.manifest.tasks, task: msgspec.structs.replace(record, engines=engines)}
        )

    def model(folder: Path) -> Model:
        return dense_model(bundle, task, folder) if name.startswith("tensorrt") else task_model(bundle, task)

    return _build(bundle, task, task, model, engine, place, with_profiles(bundle, task, options, profile), progress)


def build_unadapted(
    path: Path,
    task: str,
    name: BackendName,
    options: BuildOptions,
    profile: Sequence[str] = (),
    progress: Progress = unheard,
) -> Built:
    """Build an engine for the unadapted graph under ``task``, which the tasks of that graph share where
    ``options.mode`` allows.
    """
    bundle = open_bundle(path)
    digest = bundle.task(task).graph
    weights = bundle.graph(bundle.task(task)).weights
    sharing = [other for other, record in bundle.manifest.tasks.items() if record.graph == digest]
    match options.mode:
        case "rebuild":
            refittable = frozenset[str]()
        case "refit":
            refittable = frozenset[str]().union(*(changed_names(bundle, other) for other in sharing))
        case "stripped":
            refittable = frozenset(weights)
    options = replace(options, refittable=tuple(sorted(refittable)))
    engine = Engine(
        name,
        "",
        "",
        model_sha256=digest,
        weights_sha256=bundle.weights_sha256(),
        mode=options.mode,
        refittable=options.refittable,
    )

    def place(current: Bundle, engine: Engine) -> Manifest:
        graph = current_graph(current, digest)
        engines = dict(sorted({**graph.engines, engine.backend: engine}.items()))
        return msgspec.structs.replace(
            current.manifest,
            graphs={**current.manifest.graphs, digest: msgspec.structs.replace(graph, engines=engines)},
        )

    def model(folder: Path) -> Model:
        return Model(unadapted_graph(bundle, task).SerializeToString(), bundle.path)

    stem = f"unadapted-{digest[:8]}"
    return _build(
        bundle,
        stem,
        f"unadapted {digest[:8]}",
        model,
        engine,
        place,
        with_profiles(bundle, task, options, profile),
        progress,
    )


def current_graph(bundle: Bundle, digest: str) -> Graph:
    """The graph of that digest. Raises BundleError where it has gone meanwhile, with the last of its tasks."""
    if digest not in bundle.manifest.graphs:
        raise BundleError(
            f"{bundle.path}: the graph {digest[:12]}… has gone meanwhile, with the last task of it; export one again,"
            " and build anew"
        )
    return bundle.manifest.graphs[digest]


def dense_model(bundle: Bundle, task: str, folder: Path) -> Model:
    """The task's model with its weights where a builder finds them; those of a task stored as factors are merged into
    ``folder``.
    """
    if bundle.task(task).store == "factors" and bundle.task(task).adapter:
        return Model(densified(bundle, task, folder), folder)
    return task_model(bundle, task)


def with_profiles(bundle: Bundle, task: str, options: BuildOptions, profile: Sequence[str]) -> BuildOptions:
    """The options with the profile that was given, or the defaults, where they have none of their own."""
    if options.profiles:
        return options
    graph = bundle.graph(bundle.task(task))
    defaults = default_profiles(graph, bundle.manifest.base)
    return replace(options, profiles=(given_profile(profile, graph, defaults[0]),) if profile else defaults)


def _build(
    bundle: Bundle,
    stem: str,
    shown: str,
    model: Callable[[Path], Model],
    engine: Engine,
    place: Place,
    options: BuildOptions,
    progress: Progress,
) -> Built:
    builder: Backend = backend(engine.backend)  # type: ignore[arg-type]  # the caller's name of a backend
    with staging(bundle.path) as stage, staging(bundle.path) as scratch:
        timings = builder.timing_cache_key()
        former = bundle.manifest.timing_caches.get(timings) if timings else None
        options = replace(options, timing_cache=bundle.checked(former).read_bytes() if former else None)
        started = time.perf_counter()
        plan = builder.build(model(scratch), options, progress)
        seconds = time.perf_counter() - started
        (stage / "engines").mkdir()
        file = _staged(stage, f"{stem}-{engine.backend}.plan", plan.content)
        cache = _staged(stage, "timings.cache", plan.timing_cache)
        engine = msgspec.structs.replace(engine, version=builder.version(), target=plan.target, file=file)
        amend(bundle.path, stage, lambda current: _with_cache(place(current, engine), timings, cache))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Built(shown, engine, file.size if file else 0, seconds, memory)


def _staged(stage: Path, name: str, content: bytes | None) -> File | None:
    if content is None:
        return None
    path = stage / "engines" / name
    path.write_bytes(content)
    named = named_by_content(path, path.stem)
    return msgspec.structs.replace(named, path=f"engines/{named.path}")


def _with_cache(manifest: Manifest, key: str | None, cache: File | None) -> Manifest:
    if key is None or cache is None:
        return manifest
    return msgspec.structs.replace(manifest, timing_caches={**manifest.timing_caches, key: cache})
