"""Does an engine whose weights were exchanged answer as one that was built from them? A refit is trusted only then.

A refit can be wrong without a word: TensorRT 11.3 documents that a refittable engine may drop a bias, and
NVIDIA/TensorRT #3628 reports that going from one task to another and back left a blend of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import msgspec
import numpy as np

from engines.backends import Backend, Model, Refittable, Session, backend
from engines.building.build import Asked, dense_model, with_profiles
from engines.feeds.inputs import random_inputs, sizes
from engines.serving.load import engine_here, shared_plan
from engines.serving.task_values import task_values
from exporter.bundle.edits import with_graph_engine
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL, Engine, Manifest, Precision
from exporter.bundle.staging import amend, staging
from exporter.bundle.task_part import TaskPart, task_part
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

# Of the largest output: two engines may choose different tactics, which round differently (float32: TF32 products).
BOUNDS: Mapping[Precision, float] = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 3e-2}
LEAST_MOVE = 10.0  # the task must move the outputs by as many times the difference, or equality says nothing
SHAPES = ((1, 1), (1, 16), (2, 7))


@dataclass(frozen=True)
class Proof:
    """How far the refitted engine's outputs were from the built one's, and from the base's.

    Both are shares of the largest output.
    """

    task: str
    difference: float
    moved: float


def prove(path: Path, task: str, asked: Asked, role: str = MODEL, progress: Progress = unheard) -> Proof:
    """Refit the graph's shared engine to a part of a task, to the base and back; compare with an engine built from it.

    What was proven is recorded. Raises EngineError when they differ, and then records nothing; NoDeviceError where
    there is no device.
    """
    part, chosen = task_part(open_bundle(path), task, role), backend(asked.backend)
    shared = engine_here(part.graph.engines, asked.backend, chosen)
    if shared is None:
        raise EngineError(
            f"{path}: the graph of '{task}' has no {asked.backend} engine that tasks share; build it with 'lorafuse"
            " build --mode refit'"
        )
    plan = shared_plan(part, shared, chosen, trusted=True)
    with staging(path) as scratch:
        progress(f"building '{task}' to compare with")
        built = _built(part, chosen, asked, scratch, progress)
        progress(f"comparing '{task}'")
        with chosen.load(Model(b"", path), built) as session:
            wanted = _outputs(part, session)
        with chosen.load(Model(b"", path, task_values(part, shared.refittable)), plan) as session:
            first = _outputs(part, session)
            base = _switched(part, session, to_base=True)
            again = _switched(part, session, to_base=False)
    proof = _judged(task, part.bundle.manifest.base.precision, wanted, base, (first, again))
    with staging(path) as stage:
        amend(path, stage, lambda current: _proven(current, part, shared))
    return proof


def _built(part: TaskPart, chosen: Backend, asked: Asked, scratch: Path, progress: Progress) -> Path:
    """The plan of an engine that is built from the task's weights."""
    options = replace(with_profiles(part, asked), mode="rebuild")
    plan = chosen.build(dense_model(part, scratch), options, progress)
    assert plan.content is not None
    (scratch / "built.plan").write_bytes(plan.content)
    return scratch / "built.plan"


def _switched(part: TaskPart, session: Session, to_base: bool) -> list[Array]:
    """The outputs after another exchange of what the task changes.

    ``to_base`` puts the base's values in, where it has them; else the task's go in again.
    """
    values = task_values(part, part.changed_names, adapted=not to_base)
    cast("Refittable", session).refit(values)  # of the backends only TensorRT's come here
    return _outputs(part, session)


def _outputs(part: TaskPart, session: Session) -> list[Array]:
    vocabulary = part.bundle.manifest.base.vocabulary
    runs = [session.run(random_inputs(part.graph, vocabulary, sizes(*shape), seed=0)) for shape in SHAPES]
    return [outputs[part.graph.outputs[0].name].astype(np.float64) for outputs in runs]


def _judged(
    task: str, precision: Precision, wanted: list[Array], base: list[Array], refitted: tuple[list[Array], ...]
) -> Proof:
    largest = max(np.abs(values).max() for values in wanted)
    difference = max(_distance(wanted, values) for values in refitted) / largest
    moved = _distance(wanted, base) / largest
    if not difference <= BOUNDS[precision]:
        raise EngineError(
            f"task '{task}': the refitted engine is {difference:.1e} of the largest output from the built one (bound"
            f" {BOUNDS[precision]:.0e})"
        )
    if not moved >= LEAST_MOVE * difference:
        raise EngineError(
            f"task '{task}': the refit can't be told from doing nothing; it moves the outputs by {moved:.1e}, and the"
            f" engines differ by {difference:.1e}"
        )
    return Proof(task, difference, moved)


def _distance(one: list[Array], other: list[Array]) -> float:
    return max(float(np.abs(left - right).max()) for left, right in zip(one, other, strict=True))


def _proven(current: Bundle, part: TaskPart, shared: Engine) -> Manifest:
    current.task(part.name)  # it may have gone meanwhile, and its graph or the engine with it
    graph = current.manifest.graphs.get(part.part.graph)
    engine = next((one for one in graph.engines if one.file == shared.file), None) if graph is not None else None
    if engine is None:
        raise EngineError(
            f"the {shared.backend} engine that tasks share was built again or removed meanwhile; compare it anew"
        )
    proven = dict(sorted({**engine.proven, part.name: part.weights_sha256()}.items()))
    return with_graph_engine(current, part.part.graph, msgspec.structs.replace(engine, proven=proven))
