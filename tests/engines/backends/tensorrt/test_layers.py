"""Engines compared by what TensorRT's inspector says of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.backends.tensorrt.layers import LayerDifference, layer_differences, layers_of
from lora.errors import EngineError


def information(*layers: dict[str, Any] | str) -> str:
    return json.dumps({"Layers": layers, "Bindings": ["input_ids", "logits"]})


GEMM = {
    "Name": "query",
    "LayerType": "gemm",
    "TacticName": "sm80_xmma_128x64",
    "Weights": {"Type": "Half", "Count": 147456},
}
SOFTMAX = {"Name": "softmax", "LayerType": "kgen", "TacticName": "0x17"}


def test_equal_engines_have_no_difference():
    assert layer_differences(information(GEMM, SOFTMAX), information(GEMM, SOFTMAX)) == []


def test_another_tactic_is_found_at_its_layer():
    found = layer_differences(
        information(SOFTMAX, GEMM), information(SOFTMAX, {**GEMM, "TacticName": "sm80_xmma_64x64"})
    )
    assert found == [LayerDifference(1, "TacticName", "sm80_xmma_128x64", "sm80_xmma_64x64")]


def test_a_layer_that_one_engine_lacks_is_found():
    assert layer_differences(information(GEMM, SOFTMAX), information(GEMM)) == [
        LayerDifference(1, "layer", "softmax", "none")
    ]


def test_a_field_that_one_layer_lacks_is_found():
    assert layer_differences(information(GEMM), information({**GEMM, "Stream": 1})) == [
        LayerDifference(0, "Stream", "None", "1")
    ]


def test_engines_built_without_detail_are_compared_by_name():
    assert layers_of(information("query", "softmax")) == [{"Name": "query"}, {"Name": "softmax"}]
    assert layer_differences(information("query"), information("key")) == [LayerDifference(0, "Name", "query", "key")]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"Layers": 3}', "engine"])
def test_what_is_no_list_of_layers_is_refused(text: str):
    with pytest.raises(EngineError, match=r"\Athe engine's inspector gave no list of layers \("):
        layers_of(text)
