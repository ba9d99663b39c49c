"""Half precision: the graph computes what the torch model does in the same dtype, keeps in float32 what must be, and
overflows by name only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, shape_inference
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    SHAPES,
    TEXT,
    Architecture,
    Shape,
    call,
    export,
    merged_by_peft,
    model_path,
    open_session,
    save_adapter,
    save_base,
    worst_differences,
)

from engines import load
from exporter.bundle.layout import to_graph
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from lora.errors import AdapterError, BundleError, EngineError, ExportError
from lora.files.tensorfile import Array

# Of the largest output: ten roundings of 2⁻¹¹ (float16) or 2⁻⁸ (bfloat16). The largest seen are 2.6e-3 and 2.1e-2.
BOUNDS = {"float16": 5e-3, "bfloat16": 3e-2}
ONNX_TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
BERT = "BERT SEQ_CLS"
CASES = [("float16", name) for name in (BERT, "GPT2", "Llama", "T5", "ViT")] + [
    ("bfloat16", name) for name in (BERT, "Llama", "ViT")
]
IN_FLOAT16 = [case for case in CASES if case[0] == "float16"]
IN_BFLOAT16 = [case for case in CASES if case[0] == "bfloat16"]
NAMES = " ".join


@dataclass(frozen=True)
class Case:
    """An architecture exported in half precision from a base that is stored in it, so that merging rounds once, as
    torch does.
    """

    precision: str
    architecture: Architecture
    base: Path
    bundle: Bundle
    merged: Any
    task: str = "adapted"

    @property
    def path(self) -> Path:
        return model_path(self.bundle, self.task)

    @property
    def graph(self) -> onnx.GraphProto:
        """With the types of all values."""
        return shape_inference.infer_shapes(onnx.load(self.path, load_external_data=False), strict_mode=True).graph

    @property
    def weights(self) -> list[TensorProto]:
        return [tensor for tensor in self.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]


def make_case(precision: str, architecture: Architecture, folder: Path, **changes: Any) -> Case:
    dtype = getattr(torch, precision)
    base = save_base(architecture, folder / "base", dtype, **changes)
    adapter = save_adapter(architecture, base, folder / "adapter")
    bundle = export(architecture, base, adapter, "adapted", folder / "bundle", precision=precision).bundle
    return Case(precision, architecture, base, bundle, merged_by_peft(architecture, base, adapter, dtype))


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    precision, name = request.param
    return make_case(precision, ARCHITECTURES[name], tmp_path_factory.mktemp("half"))


@pytest.fixture(params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def shape(request: pytest.FixtureRequest) -> Shape:
    return request.param


def differences(
    case: Case, runner: ReferenceEvaluator | onnxruntime.InferenceSession, shape: Shape
) -> dict[str, float]:
    outputs = [value.name for value in case.graph.output]
    made = call(case.architecture, case.merged, [value.name for value in case.graph.input], shape)
    with np.errstate(all="ignore"):  # T5 takes the logarithm of a distance of 0, and drops it
        given = runner.run(outputs, made.feed)
    return worst_differences(dict(zip(outputs, given, strict=True)), made.expected)


# --- Numbers -------------------------------------------------------------------------------------------------------


def test_onnx_computes_what_torch_does_in_the_same_dtype(case: Case, shape: Shape):
    found = differences(case, ReferenceEvaluator(str(case.path)), shape)
    assert all(difference <= BOUNDS[case.precision] for difference in found.values()), found


@pytest.mark.parametrize("case", IN_FLOAT16, indirect=True, ids=NAMES)
def test_onnx_runtime_computes_what_torch_does_in_float16(case: Case, shape: Shape):
    found = differences(case, open_session(case.path), shape)
    assert all(difference <= BOUNDS["float16"] for difference in found.values()), found


def make_flat_and_large(model: transformers.BertModel) -> None:
    """Scores of hundreds, whose exponential no half has, and the same for every key, so that a sum of bfloat16 ones
    ends at 256.
    """
    for layer in model.encoder.layer:
        layer.attention.self.query.weight *= 1000
        layer.attention.self.key.weight.zero_()


@pytest.mark.parametrize("precision", BOUNDS)
def test_large_scores_over_many_keys_neither_overflow_nor_lose_their_sum(precision: str, tmp_path: Path):
    long = dataclasses.replace(
        ARCHITECTURES[BERT], config=transformers.BertConfig(**{**TEXT, "max_position_embeddings": 512})
    )
    case = make_case(precision, long, tmp_path, change=make_flat_and_large)
    found = differences(case, ReferenceEvaluator(str(case.path)), (2, 500, 0))
    assert found["logits"] <= BOUNDS[precision]


# --- Types ---------------------------------------------------------------------------------------------------------


def types(graph: onnx.GraphProto) -> dict[str, int]:
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in graph.initializer
    }


def test_softmax_and_reductions_are_computed_in_float32(case: Case):
    known = types(case.graph)
    summed = {
        node.name: known[node.input[0]]
        for node in case.graph.node
        if node.op_type in ("Softmax", "LogSoftmax", "ReduceMean", "ReduceSum", "CumSum")
    }
    compared = {
        node.name: known[node.input[0]]
        for node in case.graph.node
        if node.op_type.startswith("Reduce") and node.name not in summed
    }
    assert len(summed) >= 2
    assert set(summed.values()) == {TensorProto.FLOAT}
    assert set(compared.values()) <= {TensorProto.FLOAT, TensorProto.INT64}


def test_layer_norms_keep_their_statistics_in_float32(case: Case):
    norms = [node for node in case.graph.node if node.op_type == "LayerNormalization"]
    assert {attribute.i for node in norms for attribute in node.attribute if attribute.name == "stash_type"} <= {
        TensorProto.FLOAT
    }
    assert len(norms) == (0 if case.architecture.name in ("Llama", "T5") else 5)


def kept_wide(case: Case, name: str) -> bool:
    """transformers keeps T5's ``wo`` in float32 where the rest is float16."""
    return case.architecture.name == "T5" and name.endswith(".wo.weight")


def test_weights_are_stored_in_half_and_what_they_are_multiplied_with_is_half(case: Case):
    half, known = ONNX_TYPES[case.precision], types(case.graph)
    names = {tensor.name for tensor in case.weights if not kept_wide(case, tensor.name)}
    assert {tensor.data_type for tensor in case.weights if tensor.name in names} == {half}
    assert {tensor.data_type for tensor in case.weights if tensor.name not in names} <= {TensorProto.FLOAT}
    products = [
        node
        for node in case.graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and names.intersection(node.input)
    ]
    assert len(products) >= 8
    assert {known[name] for node in products for name in (node.input[0], node.input[1], node.output[0])} == {half}


def test_stored_weights_are_the_merged_ones_rounded_once(case: Case):
    parameters = dict(case.merged.named_parameters())
    loaded = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(case.path).graph.initializer}
    for name, weight in task_part(case.bundle, case.task).graph.weights.items():
        wanted = to_graph(parameters[name].detach().float().numpy(), weight.order)
        np.testing.assert_array_equal(loaded[name].astype(np.float32), wanted)


def test_the_border_is_float32_and_the_cache_is_half(case: Case):
    known = types(case.graph)
    cached, others = set(), set()
    for value in (*case.graph.input, *case.graph.output):
        (cached if value.name.startswith(("past_key_values.", "present.")) else others).add(known[value.name])
    assert cached == ({ONNX_TYPES[case.precision]} if case.architecture.task_type == "CAUSAL_LM" else set())
    assert others - {TensorProto.INT64} == {TensorProto.FLOAT}


@pytest.mark.parametrize("case", IN_BFLOAT16, indirect=True, ids=NAMES)
def test_a_bfloat16_task_is_refused_by_onnx_runtime_in_one_line(case: Case):
    with pytest.raises(EngineError) as caught:
        load(case.bundle.path, case.task, threads=1)
    assert "can't load the model" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- What can't be stored ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("float16", ARCHITECTURES[BERT], tmp_path_factory.mktemp("bert"))


def edit(path: Path, **changes: Array) -> None:
    tensors: Mapping[str, Array] = load_file(path)
    assert changes.keys() <= tensors.keys()
    save_file({**tensors, **changes}, path, {"format": "pt"})


def test_a_base_weight_that_overflows_float16_is_refused_by_name_and_nothing_is_written(tmp_path: Path):
    base = save_base(ARCHITECTURES[BERT], tmp_path / "base")
    adapter = save_adapter(ARCHITECTURES[BERT], base, tmp_path / "adapter")
    edit(base / "model.safetensors", **{"encoder.layer.1.output.dense.bias": np.full(32, -1e5, np.float32)})
    with pytest.raises(
        ExportError,
        match=r"weight 'bert\.encoder\.layer\.1\.output\.dense\.bias' overflows float16 \(its largest is 1e\+05\)",
    ):
        export(ARCHITECTURES[BERT], base, adapter, "adapted", tmp_path / "out" / "bundle", precision="float16")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("tensor", "weight", "shape"),
    [
        (
            "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight",
            "bert.encoder.layer.0.attention.self.query.weight",
            (32, 4),
        ),
        ("base_model.model.classifier.weight", "classifier.weight", (3, 32)),
    ],
    ids=["an update", "a trained head"],
)
def test_a_merge_that_overflows_float16_is_refused_by_name_and_leaves_the_bundle(
    bert: Case, tmp_path: Path, snapshot, tensor: str, weight: str, shape: tuple[int, int]
):
    adapter = save_adapter(bert.architecture, bert.base, tmp_path / "adapter", seed=2)
    edit(adapter / "adapter_model.safetensors", **{tensor: np.full(shape, 1e6, np.float32)})
    before = snapshot(bert.bundle.path)
    with pytest.raises(AdapterError, match=f"merging into '{weight}' overflows float16"):
        export(bert.architecture, bert.base, adapter, "large", bert.bundle.path)
    assert snapshot(bert.bundle.path) == before
    assert list(bert.bundle.path.parent.glob(".*staging*")) == []


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_bundle_refuses_another_precision_by_name(bert: Case, tmp_path: Path, snapshot, asked: str):
    adapter = save_adapter(bert.architecture, bert.base, tmp_path / "adapter", seed=2)
    before = snapshot(bert.bundle.path)
    with pytest.raises(
        BundleError, match=f"its graphs compute in float16, but {asked} was asked for; use a bundle of its own"
    ):
        export(bert.architecture, bert.base, adapter, "other", bert.bundle.path, precision=asked)
    assert snapshot(bert.bundle.path) == before


def test_a_task_for_which_no_precision_is_asked_takes_the_bundles(bert: Case, tmp_path: Path):
    adapter = save_adapter(bert.architecture, bert.base, tmp_path / "adapter", seed=2)
    added = export(bert.architecture, bert.base, adapter, "other", bert.bundle.path)
    assert (added.traced, added.bundle.manifest.base.precision) == (False, "float16")
    other = dataclasses.replace(
        bert,
        bundle=added.bundle,
        task="other",
        merged=merged_by_peft(bert.architecture, bert.base, adapter, torch.float16),
    )
    assert {tensor.data_type for tensor in other.weights} == {TensorProto.FLOAT16}
    assert differences(other, open_session(other.path), SHAPES[1])["logits"] <= BOUNDS["float16"]
