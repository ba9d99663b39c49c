"""The graphs with bottleneck adapters in them: what torch computes on the base, and a little more work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from float32_sums import engines_bound
from tiny_models import ARCHITECTURES, Architecture, call, export, load_base, save_base, worst_differences
from torch import nn

import exporter
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from exporter.graph.digest import graph_digest
from exporter.variants.bottleneck_graphs import bottleneck_graph, with_bottlenecks
from exporter.variants.graphs import unadapted_graph
from lora.errors import ExportError, LorafuseError
from lora.files.tensorfile import Array
from lora.modules.bottlenecks import KINDS, Kind


@dataclass(frozen=True)
class Case:
    """An architecture, a bundle of its base as it is, and the graph with bottlenecks of a kind."""

    architecture: Architecture
    base: Path
    bundle: Bundle
    kind: Kind
    graph: onnx.ModelProto


@pytest.fixture(scope="module", params=["GPT2", "Llama", "BERT FEATURE_EXTRACTION"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Architecture, Path, Bundle]:
    architecture, folder = ARCHITECTURES[request.param], tmp_path_factory.mktemp("baselines")
    base = save_base(architecture, folder / "base")
    return architecture, base, export(architecture, base, None, "plain", folder / "bundle").bundle


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, exported: tuple[Architecture, Path, Bundle]) -> Case:
    return Case(*exported, request.param, bottleneck_graph(task_part(exported[2], "plain"), request.param))


def run(graph: onnx.ModelProto, folder: Path, inputs: dict[str, Any]) -> dict[str, Array]:
    """Opened as anyone opens it: the graph lies in the folder of its external data."""
    path = folder / "with-bottlenecks.onnx"
    path.write_bytes(graph.SerializeToString())
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    path.unlink()
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def test_onnx_equals_torch(case: Case):
    plain, changed = load_base(case.architecture, case.base), load_base(case.architecture, case.base)
    with_bottlenecks(changed, case.kind)
    names = {value.name for value in case.graph.graph.input}
    for shape in ((1, 1, 0), (2, 7, 0)):
        wanted, unchanged = (call(case.architecture, model, names, shape) for model in (changed, plain))
        got = run(case.graph, case.bundle.path, wanted.feed)
        assert max(worst_differences(got, wanted.expected).values()) <= engines_bound(case.graph, shape[1])
        assert max(worst_differences(got, unchanged.expected).values()) > 1e-3  # the bottlenecks are no ornament


def test_it_is_the_unadapted_graph_and_two_products_a_bottleneck(case: Case):
    plain = unadapted_graph(task_part(case.bundle, "plain"))
    counts, before = (Counter(node.op_type for node in graph.graph.node) for graph in (case.graph, plain))
    assert sum(counts[kind] - before[kind] for kind in ("MatMul", "Gemm")) == 2 * (4 if case.kind == "adapter-h" else 2)
    assert graph_digest(case.graph) != graph_digest(plain)
    kept, stored = (
        {tensor.name: tensor.external_data[1].value for tensor in graph.graph.initializer if tensor.external_data}
        for graph in (case.graph, plain)
    )
    assert kept == stored


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_in_half_precision_the_bottlenecks_have_the_graphs_dtype(precision: Any, tmp_path: Path):
    base = save_base(ARCHITECTURES["GPT2"], tmp_path / "base")
    bundle = export(ARCHITECTURES["GPT2"], base, None, "plain", tmp_path / "bundle", precision=precision).bundle
    graph = bottleneck_graph(task_part(bundle, "plain"), "adapter-l")
    onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True)
    dtypes = {tensor.data_type for tensor in graph.graph.initializer if ".bottleneck." in tensor.name}
    assert dtypes == {onnx.TensorProto.FLOAT16 if precision == "float16" else onnx.TensorProto.BFLOAT16}


@pytest.mark.parametrize("exported", ["GPT2"], indirect=True)
def test_the_same_bundle_gives_the_same_bytes(case: Case):
    again = bottleneck_graph(task_part(case.bundle, "plain"), case.kind)
    assert again.SerializeToString(deterministic=True) == case.graph.SerializeToString(deterministic=True)


def test_a_module_of_ones_own_has_no_place_for_them(tmp_path: Path):
    bundle = exporter.export(nn.Linear(4, 2), {"input": torch.ones(2, 4)}, tmp_path / "bundle", task="plain").bundle
    with pytest.raises(
        ExportError,
        match=(
            r"the base was not made by transformers, so there is no model to put adapter-h into; leave adapter-h out\Z"
        ),
    ):
        bottleneck_graph(task_part(bundle, "plain"), "adapter-h")


def test_an_architecture_without_known_projections_is_refused(tmp_path: Path):
    base = save_base(ARCHITECTURES["T5"], tmp_path / "base")
    bundle = export(ARCHITECTURES["T5"], base, None, "plain", tmp_path / "bundle").bundle
    with pytest.raises(LorafuseError, match="has no projection that adapter-h could follow"):
        bottleneck_graph(task_part(bundle, "plain"), "adapter-h")


def test_values_are_those_of_the_seed():
    def values(seed: int) -> dict[str, Array]:
        return with_bottlenecks(
            nn.ModuleDict({"h": nn.ModuleDict({"mlp": nn.ModuleDict({"c_proj": nn.Linear(6, 6)})})}), "adapter-h", seed
        )

    assert all(np.array_equal(values(1)[name], tensor) for name, tensor in values(1).items())
    assert any(not np.array_equal(values(2)[name], tensor) for name, tensor in values(1).items())
