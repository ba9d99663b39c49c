"""What training adapts unless it is told otherwise: a model's queries and values, and never the wrong part of a fused
projection.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers

from lora.errors import AdapterError
from lora.modules.layers import Injection, inject
from lora.modules.projections import attention_targets

GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 96}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96, "state_size": 4}


def built(auto: Any, config: Any) -> Any:
    with torch.device("meta"):
        return auto.from_config(config)


def test_gpt2s_queries_and_values_are_the_outer_of_three_equal_blocks():
    model = built(transformers.AutoModelForCausalLM, transformers.GPT2Config(**GPT2))
    assert attention_targets(model) == (("c_attn",), (True, False, True))


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPTBigCodeConfig(**GPT2, multi_query=True),
        transformers.GPTBigCodeConfig(**GPT2, multi_query=False),
        transformers.GPT2Config(**GPT2, add_cross_attention=True),
    ],
    ids=["one head of keys and values", "one head after another", "a cross attention's keys and values"],
)
def test_a_c_attn_of_other_blocks_than_gpt2s_is_adapted_whole(config: Any):
    model = built(transformers.AutoModelForCausalLM, config)
    targets, parts = attention_targets(model)
    assert (targets, parts) == (("c_attn",), (True,))
    layers = {path: layer for path, layer in model.named_modules() if path.endswith("c_attn")}
    assert {
        path: factors.B.shape[0] for path, factors in inject(model, Injection(targets, 2, 4, parts=parts)).items()
    } == {path: layer.bias.shape[0] for path, layer in layers.items()}


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_longt5s_encoder_has_queries_and_values_too(kind: str):
    model = built(transformers.AutoModelForSeq2SeqLM, transformers.LongT5Config(**T5, encoder_attention_type=kind))
    targets, parts = attention_targets(model)
    adapted = inject(model, Injection(targets, 2, 4, parts=parts))
    assert sum(path.startswith("encoder") for path in adapted) == 2
    assert sum(path.startswith("decoder") for path in adapted) == 4


@pytest.mark.parametrize(
    "config",
    [transformers.MambaConfig(**MAMBA), transformers.FalconMambaConfig(**MAMBA)],
    ids=["mamba", "falcon-mamba"],
)
def test_a_model_without_attention_is_refused_although_it_has_an_in_proj(config: Any):
    model = built(transformers.AutoModelForCausalLM, config)
    with pytest.raises(
        AdapterError, match="has no queries and values by a name that is known; name the modules with --targets"
    ):
        attention_targets(model)


def test_mpnets_projections_are_letters():
    model = built(
        transformers.AutoModel,
        transformers.MPNetConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=96),
    )
    assert attention_targets(model) == (("attention.attn.q", "attention.attn.v"), (True,))


def test_queries_without_values_are_not_taken_for_both():
    with pytest.raises(AdapterError, match="Sequential has no queries and values by a name that is known"):
        attention_targets(torch.nn.Sequential(OrderedDict(q_proj=torch.nn.Linear(4, 4), other=torch.nn.Linear(4, 4))))


def test_debertas_in_proj_is_its_attentions():
    model = built(
        transformers.AutoModel,
        transformers.DebertaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=96),
    )
    assert attention_targets(model) == (("attention.self.in_proj",), (True,))
