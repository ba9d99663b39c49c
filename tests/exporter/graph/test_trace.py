"""From a torch module to a dense graph whose weights keep their names."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from float32_sums import engines_bound
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn

from exporter.bundle.layout import to_graph
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL, Head
from exporter.graph.digest import graph_digest
from exporter.graph.signature import Called, Signature, signature
from exporter.graph.trace import Trace, trace
from exporter.transformers_base import skeleton

TOKENS = torch.ones(2, 6, dtype=torch.long)


class Small(nn.Module):
    """What optimizers like to remove or to merge: zero biases, a LayerNorm of ones, two equal layers, a tied weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 8)
        self.one, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        self.twin.load_state_dict(self.one.state_dict())
        nn.init.zeros_(self.one.bias)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        return self.out(self.norm(self.one(hidden) + self.twin(hidden)))


def traced(seed: int) -> Trace:
    return trace(
        Signature(Called(Small(seed)), {"tokens": TOKENS}, {"tokens": {0: "batch", 1: "sequence"}}, ("logits",))
    )


@pytest.fixture(scope="module")
def small() -> Trace:
    return traced(seed=0)


def external(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL}


def test_every_parameter_keeps_its_name_and_a_tied_one_the_first_of_its_names(small: Trace):
    assert set(small.weights) == set(external(small.graph.graph)) == set(Small(0).state_dict()) - {"out.weight"}


def test_linear_weights_are_recorded_transposed_and_others_as_they_are(small: Trace):
    assert {name for name, order in small.weights.items() if order == (1, 0)} == {"one.weight", "twin.weight"}
    assert set(small.weights.values()) == {(1, 0), None}


def test_a_tied_weight_is_stored_once_and_read_both_ways(small: Trace):
    readers = [node.op_type for node in small.graph.graph.node if "embed.weight" in node.input]
    assert sorted(readers) == ["Gather", "Transpose"]


def test_the_graph_on_the_modules_values_computes_what_the_module_computes(small: Trace):
    module, graph = Small(seed=3).eval(), onnx.ModelProto()
    graph.CopyFrom(small.graph)
    values = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    for tensor in external(graph.graph).values():
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(to_graph(values[tensor.name], small.weights[tensor.name]), tensor.name)
        )
    for length in (1, 4, 9):
        tokens = torch.arange(3 * length).reshape(3, length) % 7
        want = module(tokens).detach().numpy()
        got = ReferenceEvaluator(graph).run(None, {"tokens": tokens.numpy()})[0]
        np.testing.assert_allclose(got, want, rtol=0, atol=engines_bound(small.graph, length) * np.abs(want).max())


def test_the_graph_does_not_depend_on_the_values(small: Trace):
    other = traced(seed=1)
    assert other.graph.SerializeToString(deterministic=True) == small.graph.SerializeToString(deterministic=True)
    assert graph_digest(other.graph) == graph_digest(small.graph)


def test_the_digest_of_a_bundles_graph_does_not_depend_on_the_random_initialisation(
    tiny_base: Path, tiny_bundle: Bundle
):
    torch.manual_seed(99)
    head = Head("SEQ_CLS", 2)
    again = trace(signature(skeleton(tiny_base, head), head))
    assert graph_digest(again.graph) == tiny_bundle.task("first").parts[MODEL].graph


def test_axes_of_inputs_and_outputs_bear_the_names_given(small: Trace):
    dimensions = [
        [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
        for port in (*small.graph.graph.input, *small.graph.graph.output)
    ]
    assert dimensions == [["batch", "sequence"], ["batch", "sequence", 7]]


def test_weights_lie_nowhere_yet_and_other_constants_are_small(small: Trace):
    inline = [tensor for tensor in small.graph.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    assert all(tensor.ByteSize() < 1024 for tensor in inline)
    assert all(not tensor.raw_data for tensor in external(small.graph.graph).values())


def test_nothing_of_this_machine_or_of_the_exporters_notes_is_left(small: Trace):
    text = small.graph.SerializeToString()
    for trace_of_origin in (b"site-packages", b"test_trace", b"stack_trace", b"pkg.torch", str(Path.cwd()).encode()):
        assert trace_of_origin not in text


def test_tracing_is_silent(capfd: pytest.CaptureFixture[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(seed=0)
    assert capfd.readouterr() == ("", "")


def test_a_module_in_training_mode_is_traced_without_dropout():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    graph = trace(Signature(Called(module), {"input": torch.ones(2, 4)}, {"input": {0: "batch"}}, ("y",))).graph
    assert "Dropout" not in [node.op_type for node in graph.graph.node]
