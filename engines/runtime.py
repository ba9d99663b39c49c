"""From a task in a bundle to a session that runs it."""

from __future__ import annotations

from pathlib import Path

from engines.backends import BackendName, Model, Session, backend
from exporter.bundle.changes import base_stored, in_graph_order, merged_at_load
from exporter.bundle.manifest import Bundle, open_bundle
from lora.errors import EngineError


def load(bundle: str | Path, task: str, backend_name: BackendName = "onnxruntime", threads: int | None = None) -> Session:
    """Load a task's engine; use the session as a context manager.

    The files are compared with the manifest's SHA-256 first. ``threads`` bounds CPU threads; None takes every core.
    Raises BundleError when the bundle is damaged or has no such task, EngineError when the engine can't be loaded.

    >>> with load("bundle", "movies") as session:  # doctest: +SKIP
    ...     session.run({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})["logits"]
    """
    opened = open_bundle(Path(bundle))
    model = task_model(opened, task)
    return backend(backend_name, threads).load(model, _plan(opened, task, backend_name))


def task_model(bundle: Bundle, task: str) -> Model:
    """The task's ONNX model, after all the files that it reads were checked; a task stored as factors is merged now."""
    record, base = bundle.task(task), base_stored(bundle, task)
    for file in record.own_weights:
        bundle.checked(file)
    values = in_graph_order(bundle, task, merged_at_load(bundle, task, base))
    return Model(bundle.checked(record.model).read_bytes(), bundle.path, values)


def _plan(bundle: Bundle, task: str, backend_name: BackendName) -> Path | None:
    """The built engine's file; ONNX Runtime runs the model itself and needs none."""
    record = bundle.task(task)
    engine = record.engines.get(backend_name)
    if engine is None:
        if backend_name == "onnxruntime":
            return None
        raise EngineError(
            f"{bundle.path}: task '{task}' has no {backend_name} engine; run 'lorafuse build {bundle.path} --task {task} --backend {backend_name}'"
        )
    if engine.model_sha256 != record.model.sha256:
        raise EngineError(f"{bundle.path}: the {backend_name} engine of '{task}' was built from an earlier export of the task; build it again")
    return bundle.checked(engine.file) if engine.file is not None else None
