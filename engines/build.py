"""Building engines for the tasks of a bundle, and recording them in its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from engines.backends import AxisRange, Backend, BackendName, BuildOptions, Progress, backend
from engines.runtime import task_model
from exporter.bundle.manifest import Bundle, Engine, Manifest, open_bundle
from exporter.bundle.staging import commit, named_by_content, staging

# What an engine with a fixed range of sizes is built for, where the caller does not say.
DEFAULT_AXES: Mapping[str, AxisRange] = {"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, 128, 512), "decoder_sequence": AxisRange(1, 1, 128)}


@dataclass(frozen=True)
class Built:
    """One engine: its record in the manifest, and the size of its plan in bytes (0 where the model is the engine)."""

    task: str
    engine: Engine
    size: int


def build(path: Path, task: str, name: BackendName, options: BuildOptions, progress: Progress = lambda step: None) -> Built:
    """Build an engine for ``task`` and record it. The bundle stays as it was when anything fails."""
    bundle = open_bundle(path)
    model = task_model(bundle, task)
    builder: Backend = backend(name)
    plan = builder.build(model, replace(options, axes=options.axes or _axes(bundle)), progress)
    with staging(path) as stage:
        file = None
        if plan.content is not None:
            (stage / "engines").mkdir()
            (stage / "engines" / "task.plan").write_bytes(plan.content)
            named = named_by_content(stage / "engines" / "task.plan", f"{task}-{name}")
            file = msgspec.structs.replace(named, path=f"engines/{named.path}")
        engine = Engine(backend=name, version=builder.version(), target=plan.target, model_sha256=bundle.task(task).model.sha256, file=file)
        commit(path, stage, lambda current: _with_engine(current or bundle.manifest, task, engine))
    return Built(task, engine, file.size if file else 0)


def _with_engine(manifest: Manifest, task: str, engine: Engine) -> Manifest:
    record = manifest.tasks[task]
    engines = dict(sorted({**record.engines, engine.backend: engine}.items()))
    return msgspec.structs.replace(manifest, tasks={**manifest.tasks, task: msgspec.structs.replace(record, engines=engines)})


def _axes(bundle: Bundle) -> Mapping[str, AxisRange]:
    """The default ranges, held within the positions that the base has been trained for."""
    longest = bundle.manifest.base.longest or DEFAULT_AXES["sequence"].largest
    tokens = AxisRange(1, min(128, longest), min(512, longest))
    # A decoder's cache: empty while the prompt is read, as long as the rest of the positions afterwards.
    cache = {"past_sequence": replace(tokens, smallest=0), "total_sequence": replace(tokens, largest=2 * tokens.largest)}
    return {**DEFAULT_AXES, "sequence": tokens, **cache}
