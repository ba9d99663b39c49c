"""Whether an engine whose weights were exchanged answers as one that was built from them: without that, a refit is not
trusted.

A refit can be wrong without a word: TensorRT 11.3 documents that a refittable engine may drop a bias, and
NVIDIA/TensorRT #3628 reports that going from one task to another and back left a blend of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from engines.backends import BackendName, BuildOptions, Model, Session, backend
from engines.building.build import current_graph, dense_model, with_profiles
from engines.feeds.inputs import random_inputs, sizes
from engines.serving.load import shared_plan
from engines.serving.task_values import changed_names, task_values
from exporter.bundle.manifest import Bundle, Engine, Manifest, Precision, open_bundle
from exporter.bundle.staging import amend, staging
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import Progress, unheard

# Of the largest output: two engines may choose different tactics, which round differently (float32: TF32 products).
BOUNDS: Mapping[Precision, float] = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 3e-2}
LEAST_MOVE = 10.0  # the task must move the outputs by as many times the difference, or equality says nothing
SHAPES = ((1, 1), (1, 16), (2, 7))


@dataclass(frozen=True)
class Proof:
    """How far the refitted engine's outputs were from the built one's, and how far the task moves the base's; of the
    largest output.
    """

    task: str
    difference: float
    moved: float


def prove(
    path: Path,
    task: str,
    name: BackendName,
    options: BuildOptions,
    profile: Sequence[str] = (),
    progress: Progress = unheard,
) -> Proof:
    """Refit the graph's shared engine to ``task``, to the base and back, compare with an engine built from the task,
    and record it.

    Raises EngineError when they differ, and then records nothing; NoDeviceError where there is no device.
    """
    bundle = open_bundle(path)
    record = bundle.task(task)
    shared = bundle.graph(record).engines.get(name)
    if shared is None:
        raise EngineError(
            f"{path}: the graph of '{task}' has no {name} engine that tasks share; build it with 'lorafuse build --mode"
            " refit'"
        )
    chosen = backend(name)
    plan = shared_plan(bundle, task, shared, chosen, trusted=True)
    with staging(path) as scratch:
        progress(f"building '{task}' to compare with")
        options = with_profiles(bundle, task, replace(options, mode="rebuild"), profile)
        built = chosen.build(dense_model(bundle, task, scratch), options, progress)
        assert built.content is not None
        (scratch / "built.plan").write_bytes(built.content)
        progress(f"comparing '{task}'")
        with chosen.load(Model(b"", path), scratch / "built.plan") as session:
            wanted = _outputs(bundle, task, session)
        values = task_values(bundle, task, shared.refittable)
        with chosen.load(Model(b"", path, values), plan) as session:
            first = _outputs(bundle, task, session)
            base = _switched(bundle, task, session, to_base=True)
            again = _switched(bundle, task, session, to_base=False)
    proof = _judged(task, bundle.manifest.base.precision, wanted, base, (first, again))
    with staging(path) as stage:
        amend(path, stage, lambda current: _proven(current, record.graph, shared, task, bundle.weights_sha256(record)))
    return proof


def _switched(bundle: Bundle, task: str, session: Session, to_base: bool) -> list[Array]:
    """The outputs after what the task changes was exchanged again: for the base's values where it has them, or for the
    task's.
    """
    values = task_values(bundle, task, changed_names(bundle, task), adapted=not to_base)
    session.refit(values)  # type: ignore[attr-defined]  # of the backends only TensorRT's come here
    return _outputs(bundle, task, session)


def _outputs(bundle: Bundle, task: str, session: Session) -> list[Array]:
    graph = bundle.graph(bundle.task(task))
    runs = [
        session.run(random_inputs(graph, bundle.manifest.base.vocabulary, sizes(*shape), seed=0)) for shape in SHAPES
    ]
    return [outputs[graph.outputs[0].name].astype(np.float64) for outputs in runs]


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


def _proven(current: Bundle, digest: str, shared: Engine, task: str, weights_sha256: str) -> Manifest:
    current.task(task)  # it may have gone meanwhile, and its graph or the engine with it
    graph = current_graph(current, digest)
    engine = graph.engines.get(shared.backend)
    if engine is None or engine.file != shared.file:
        raise EngineError(
            f"the {shared.backend} engine that tasks share was built again or removed meanwhile; compare it anew"
        )
    proven = msgspec.structs.replace(engine, proven=dict(sorted({**engine.proven, task: weights_sha256}.items())))
    graph = msgspec.structs.replace(graph, engines={**graph.engines, shared.backend: proven})
    return msgspec.structs.replace(current.manifest, graphs={**current.manifest.graphs, digest: graph})
