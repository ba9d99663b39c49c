"""From a task in a bundle to a session that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote

import msgspec

from engines.backends import Backend, BackendName, Model, Session, backend
from engines.serving.task_values import changed_names, task_values
from exporter.bundle.changes import base_stored, in_graph_order, merged_at_load
from exporter.bundle.manifest import Bundle, Engine, open_bundle
from lora.errors import EngineError


def load(
    bundle: str | Path,
    task: str,
    backend_name: BackendName = "onnxruntime",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> Session:
    """Load a task's engine; use the session as a context manager.

    The files are compared with the manifest's SHA-256 first. ``threads`` bounds CPU threads; None takes every core.
    ``provider_options`` go to ONNX Runtime's execution provider.
    Of TensorRT, the task's own engine is loaded where it has one, else its graph's is refitted. Raises BundleError when
    the bundle is damaged or has no such task, EngineError when the engine can't be loaded or is not of this export,
    version or device.

    >>> with load("bundle", "movies") as session:  # doctest: +SKIP
    ...     session.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["logits"]
    """
    opened = open_bundle(Path(bundle))
    chosen = backend(backend_name, threads, provider_options)
    if backend_name.startswith("onnxruntime"):
        return chosen.load(task_model(opened, task), None)
    own = opened.task(task).engines.get(backend_name)
    if own is not None:
        return chosen.load(Model(b"", opened.path), own_plan(opened, task, own, chosen))
    shared = opened.graph(opened.task(task)).engines.get(backend_name)
    if shared is None or shared.mode == "rebuild":
        raise EngineError(
            f"{opened.path}: task '{task}' has no {backend_name} engine; run"
            f" '{build_command(opened, task, backend_name)}'"
        )
    return chosen.load(
        Model(b"", opened.path, task_values(opened, task, shared.refittable)), shared_plan(opened, task, shared, chosen)
    )


def task_model(bundle: Bundle, task: str) -> Model:
    """The task's ONNX model, after all the files that it reads were checked; a task stored as factors is merged now."""
    record, base = bundle.task(task), base_stored(bundle, task)
    for file in record.own_weights:
        bundle.checked(file)
    values = in_graph_order(bundle, task, merged_at_load(bundle, task, base))
    return Model(bundle.checked(record.model).read_bytes(), bundle.path, values)


def own_plan(bundle: Bundle, task: str, engine: Engine, chosen: Backend) -> Path:
    """The plan of the task's own engine.

    Raises EngineError when it is of an earlier export, another version, or for another device.
    """
    record = bundle.task(task)
    if (engine.model_sha256, engine.weights_sha256) != (record.model.sha256, bundle.weights_sha256(record)):
        raise _refused(bundle, task, engine, "it was built from an earlier export of the task")
    return _plan(bundle, task, engine, chosen)


def shared_plan(bundle: Bundle, task: str, engine: Engine, chosen: Backend, trusted: bool = False) -> Path:
    """The plan that is refitted with the task's weights: as ``own_plan``, and only where that was proven to give the
    task's outputs.

    ``trusted`` is for the proof itself. A refit engine that was not compared may be wrong without a word: TensorRT 11.3
    documents that it may drop a bias, NVIDIA/TensorRT #3628 reports a blend of two tasks.
    """
    if beyond := sorted(changed_names(bundle, task) - set(engine.refittable)):
        raise _refused(bundle, task, engine, f"the task changes '{beyond[0]}', which can't be exchanged in it")
    plan = _plan(bundle, task, engine, chosen)
    if not trusted and engine.proven.get(task) != bundle.weights_sha256(bundle.task(task)):
        raise _refused(
            bundle,
            task,
            engine,
            "its outputs with this task's weights were not yet compared with those of an engine built from them",
        )
    return plan


def unadapted_plan(bundle: Bundle, task: str, engine: Engine, chosen: Backend) -> Path:
    """The plan of the unadapted graph under the task, as it was built."""
    if engine.weights_sha256 != bundle.weights_sha256():
        raise _refused(bundle, task, engine, "it was built from another base", adapted=False)
    return _plan(bundle, task, engine, chosen, adapted=False)


def plan_of(bundle: Bundle, task: str, name: BackendName, chosen: Backend, adapted: bool = True) -> Path:
    """The plan that was built for the task, or without ``adapted`` for the base under it.

    Raises EngineError naming the command where there is none.
    """
    record = bundle.task(task)
    engine = (record if adapted else bundle.graph(record)).engines.get(name)
    if engine is None:
        command = build_command(bundle, task, name) + ("" if adapted else " --unadapted")
        raise EngineError(
            f"{bundle.path}: {'' if adapted else 'the base under '}task '{task}' has no {name} engine; run '{command}'"
        )
    if engine.mode == "stripped":
        reason = "its weights are put in at load, which this runtime does not do"
        raise _refused(
            bundle, task, msgspec.structs.replace(engine, mode="rebuild"), reason, adapted
        )  # which is what to build instead
    return own_plan(bundle, task, engine, chosen) if adapted else unadapted_plan(bundle, task, engine, chosen)


def _plan(bundle: Bundle, task: str, engine: Engine, chosen: Backend, adapted: bool = True) -> Path:
    if engine.file is None:
        raise _refused(bundle, task, engine, "the manifest names no plan", adapted)
    plan = bundle.checked(engine.file)
    if engine.version != chosen.version():
        raise _refused(
            bundle, task, engine, f"it was built by version {engine.version}, and this is {chosen.version()}", adapted
        )
    if reason := chosen.runs(engine.target):
        raise _refused(bundle, task, engine, reason, adapted)
    return plan


def _refused(bundle: Bundle, task: str, engine: Engine, reason: str, adapted: bool = True) -> EngineError:
    mode = f" --mode {engine.mode}" if engine.mode != "rebuild" else ""
    command = build_command(bundle, task, engine.backend) + mode + ("" if adapted else " --unadapted")
    return EngineError(
        f"{bundle.path}: the {engine.backend} engine of {'' if adapted else 'the base under '}'{task}' can't be used:"
        f" {reason}; run '{command}'"
    )


def build_command(bundle: Bundle, task: str, backend_name: str) -> str:
    """What builds the task's engine, for an error's last words."""
    return f"lorafuse build {quote(str(bundle.path))} --task {task} --backend {backend_name}"
