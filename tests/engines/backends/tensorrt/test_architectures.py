"""Real TensorRT-RTX plans of every architecture that is exported, in every precision, for every target: built without a
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_models import ARCHITECTURES, Architecture, export, save_adapter, save_base

from engines.backends import BuildOptions, Model, Plan, backend
from engines.building.profiles import default_profiles
from engines.serving.load import task_model
from exporter.bundle.changes import in_graph_order
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from exporter.variants.graphs import unadapted_graph
from lora.files.tensorfile import Array
from lora.progress import unheard

pytest.importorskip("tensorrt_rtx")

TARGETS = {"8.6": ("8.6",), "8.9": ("8.9",), "12.0": ("12.0",), "portable": ()}
# Every architecture in half precision, as a GPU is served; one of a kind in the others.
OF_A_KIND = ("BERT SEQ_CLS", "DebertaV2 SEQ_CLS", "GPT2", "Llama", "T5", "ViT", "Whisper encoder")
CASES = [("float16", name) for name in ARCHITECTURES] + [
    (precision, name) for precision in ("bfloat16", "float32") for name in OF_A_KIND
]


@dataclass(frozen=True)
class Case:
    """A task of an architecture in a precision."""

    bundle: Bundle
    merged: Model
    base: Model

    def built(self, model: Model, target: str = "portable") -> Plan:
        graph = task_part(self.bundle, "adapted").graph
        options = BuildOptions(TARGETS[target], default_profiles(graph, self.bundle.manifest.base))
        return backend("tensorrt-rtx").build(model, options, unheard)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    precision, name = request.param
    architecture: Architecture = ARCHITECTURES[name]
    folder = tmp_path_factory.mktemp("case")
    base = save_base(architecture, folder / "base", getattr(torch, precision))
    adapter = save_adapter(architecture, base, folder / "adapter")
    bundle = export(architecture, base, adapter, "adapted", folder / "bundle", precision=precision).bundle
    return Case(
        bundle,
        task_model(task_part(bundle, "adapted")),
        Model(unadapted_graph(task_part(bundle, "adapted")).SerializeToString(), bundle.path),
    )


def test_builds_for_every_target_and_holds_the_merged_weights_alone(case: Case):
    """The sizes are equal, and beside the weights the plans of the task and of the base hardly differ: RTX numbers its
    inner values anew in each build.
    """
    plans = {target: case.built(case.merged, target) for target in TARGETS}
    assert {target: plan.target for target, plan in plans.items()} == {target: target for target in TARGETS}
    plan, base = plans["portable"].content, case.built(case.base).content
    assert len(plan) == len(base)
    part = task_part(case.bundle, "adapted")
    merged, unadapted = part.own, part.base
    changed = [name for name in merged if name in unadapted and merged[name].ndim == 2]
    assert changed
    for name in changed:
        ours, bases = (in_graph_order(part, {name: values[name]})[name] for values in (merged, unadapted))
        assert (found(ours, plan), found(bases, plan)) == (1, 0), name
        assert (found(ours, base), found(bases, base)) == (0, 1), name
    differing = (np.frombuffer(plan, np.uint8) != np.frombuffer(base, np.uint8)).sum()
    assert differing <= sum(merged[name].nbytes for name in changed) + 0.005 * len(plan)


def found(matrix: Array, plan: bytes) -> float:
    """The share of a few of the matrix's rows whose first values the plan holds, in whichever axis order it holds more
    of them.

    The first values alone, because RTX may cut a matrix (GPT-2's queries, keys and values) and put the parts beside
    others.
    """
    return max(
        np.mean([np.ascontiguousarray(row[:16]).tobytes() in plan for row in order[:: len(order) // 4]])
        for order in (matrix, matrix.T)
    )
