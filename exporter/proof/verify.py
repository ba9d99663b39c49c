"""Verifying a task: merged torch model, ONNX graph and engines, each against the formula in float64.

A merge that did nothing would pass any comparison of the merged model with itself, so the task must also differ from
the unadapted model by far more than the stages may differ from one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_dtypes import finfo  # numpy's own knows no bfloat16

from exporter.bundle.records import MODEL, Precision
from exporter.bundle.task_part import TaskPart
from exporter.graph.digest import graph_digest
from exporter.proof.reference import Inputs, Reference, Runner, merged_values, of_bundle, torch_runner
from exporter.variants.graphs import merged_graph
from lora.adapter import Change
from lora.errors import LorafuseError
from lora.files.tensorfile import Array
from lora.merging.delta import error_bound
from lora.merging.merge import Targets

# Of the largest output. A float32 encoder of 6 layers is off by about 1e-6 of it, one in float16 by 2e-3, in bfloat16
# by 1e-2.
OUTPUT_BOUND: Mapping[Precision, float] = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}
# The task must move the outputs by this many times the bound, or "equal" would say nothing.
LEAST_MOVE: Mapping[Precision, float] = {"float32": 10, "float16": 3, "bfloat16": 3}


@dataclass(frozen=True)
class Stage:
    """One stage against the formula: the worst difference and where it is, the bound it is held to, and the answer.

    ``passed`` is None where the stage could not be run here; ``note`` then says why.
    """

    name: str
    difference: float
    bound: float
    where: str
    got: float
    want: float
    passed: bool | None
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """All stages; ``moved`` is how far the task moves the unadapted outputs; the digests prove equal graphs.

    ``reference`` says what the stages were held against.
    """

    task: str
    inputs: int
    stages: tuple[Stage, ...]
    moved: float
    least_move: float
    digest: str
    unadapted_digest: str
    reference: str = ""

    @property
    def passed(self) -> bool:
        """Every stage that ran is within its bound, the task differs from its base, and the graphs are the same."""
        return (
            all(stage.passed is not False for stage in self.stages)
            and self.differs
            and self.digest == self.unadapted_digest
        )

    @property
    def differs(self) -> bool:
        """Whether the task does anything: a merge that did nothing agrees with itself at every stage."""
        return self.moved >= self.least_move


def verify(
    part: TaskPart, batches: Sequence[Inputs], runners: Mapping[str, Runner], reference: Reference | None = None
) -> Verification:
    """Hold a part of a task against its formula on ``batches`` of inputs.

    ``runners`` are the further stages by name (ONNX, engines); one that raises a LorafuseError is reported as not run.
    Without a ``reference``, it is the bundle's own.
    """
    precision = part.bundle.manifest.base.precision
    reference, stored = reference or of_bundle(part), merged_values(part)
    exact = [reference.adapted(batch) for batch in batches]
    moves = [np.abs(outputs - reference.unadapted(batch)).max() for outputs, batch in zip(exact, batches, strict=True)]
    weights = _weights_stage(part.changes, reference, part.graph.weights, stored)
    reference.release()  # before other models are loaded beside it
    bound = OUTPUT_BOUND[precision] * max(float(np.abs(outputs).max()) for outputs in exact)
    stages = [
        weights,
        _output_stage("merged torch", exact, bound, batches, torch_runner(part, stored)),
        *(_output_stage(name, exact, bound, batches, run) for name, run in runners.items()),
    ]
    return Verification(
        task=part.name if part.role == MODEL else f"{part.name} ({part.role})",
        inputs=sum(len(outputs) for outputs in exact),
        stages=tuple(stages),
        moved=float(max(moves)),
        least_move=LEAST_MOVE[precision] * bound if part.changes else 0.0,
        digest=graph_digest(merged_graph(part)),
        # Taken when the base was traced; the variants are made of the merged graph and would prove nothing.
        unadapted_digest=part.part.graph,
        reference=reference.words,
    )


def _weights_stage(
    changes: Targets, reference: Reference, weights: Iterable[str], stored: Mapping[str, Array]
) -> Stage:
    """Hold every stored weight against the formula, one at a time.

    A merged one may be off by the rounding of its own float32 computation and of its dtype.
    """
    worst = (-1.0, "", 0.0, 0.0, 0.0)
    for name in weights:
        want = reference.exact(name)
        if name not in changes and np.array_equal(stored[name], want):  # most of a model, without arrays for its bounds
            if worst[0] < 0:
                value = float(want.flat[0])
                worst = (0.0, f"{name}{[0] * want.ndim}", value, value, float(np.finfo(np.float64).tiny))
            continue
        bound = _rounding(reference.base(name), changes.get(name, []), want, stored[name].dtype)
        excess = np.abs(stored[name].astype(np.float64) - want) / bound
        place = np.unravel_index(int(excess.argmax()), excess.shape)
        if not (excess[place] <= worst[0] or np.isnan(worst[0])):  # NaN is the worst of all
            worst = (
                float(excess[place]),
                f"{name}{list(map(int, place))}",
                float(stored[name][place]),
                float(want[place]),
                float(bound[place]),
            )
    excess_ratio, where, got, value, limit = worst
    return Stage("stored weights", abs(got - value), limit, where, got, value, excess_ratio <= 1)


def _rounding(base: Array, changes: Sequence[Change], exact: Array, dtype: np.dtype[Any]) -> Array:
    """How far rounding may move each element: float32's in the changes, and half a unit of a narrower dtype.

    Without changes, the value must be exact.
    """
    bound: Array = sum(
        (error_bound(change, base) for change in changes), start=np.full(base.shape, np.finfo(np.float64).tiny)
    )
    if changes and dtype != np.float32:
        limits = finfo(dtype)  # type: ignore[no-untyped-call]
        bound += np.maximum(np.abs(exact), float(limits.tiny)) * float(limits.eps) * 0.5
    return bound


def _output_stage(name: str, exact: Sequence[Array], bound: float, batches: Sequence[Inputs], run: Runner) -> Stage:
    try:
        outputs = [run(batch) for batch in batches]
    except LorafuseError as error:
        return Stage(name, 0.0, bound, "", 0.0, 0.0, None, str(error))
    differences = [np.abs(got - want) for got, want in zip(outputs, exact, strict=True)]
    batch = int(np.argmax([difference.max() for difference in differences]))
    place = np.unravel_index(int(differences[batch].argmax()), differences[batch].shape)
    row = sum(len(outputs) for outputs in exact[:batch]) + int(place[0])
    where = f"input {row}, output {list(map(int, place[1:]))}"
    worst = float(differences[batch][place])
    return Stage(name, worst, bound, where, float(outputs[batch][place]), float(exact[batch][place]), worst <= bound)
