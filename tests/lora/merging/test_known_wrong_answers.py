"""Wrong answers that other tools give, each beside ours. (PEFT's MultiheadAttention: test_merge_against_peft.py.)"""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora.errors import AdapterError
from lora.formats.peft import read_peft
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import merge

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
}
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()


def save(folder: Path, model: torch.nn.Module, **config) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            copy.deepcopy(model),
            peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config),
        ).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        wrapped.save_pretrained(folder)
    return wrapped


def weights(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def merged(folder: Path, model: torch.nn.Module) -> dict[str, np.ndarray]:
    base = weights(model)
    return {one.parameter: one.stored for one in merge(base, changes_by_parameter(base, read_peft(folder)), folder)}


def product(folder: Path, module: str) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return b @ a


def test_layer_replication_is_refused_where_peft_s_merge_corrupts_the_shared_weights(tmp_path: Path):
    ids = torch.arange(8).reshape(1, 8)
    wrapped = save(tmp_path, llama(), layer_replication=[[0, 2], [0, 2]])
    with torch.no_grad():
        unmerged, peft_merged = wrapped(ids).logits, wrapped.merge_and_unload()(ids).logits
    assert (peft_merged - unmerged).abs().max() > 0.05, "PEFT has mended its merge; see whether it can be an oracle now"
    with pytest.raises(
        AdapterError, match="field 'layer_replication' is set: replicated layers share their base weights"
    ):
        read_peft(tmp_path)


def test_each_module_has_its_own_alpha_where_converters_keep_one_for_all(tmp_path: Path):
    """Olive, TensorRT-LLM's hf_lora_convert.py and llama.cpp's convert_lora_to_gguf.py write one global alpha."""
    model = llama()
    save(tmp_path, model, alpha_pattern={"v_proj": 32})
    result, base = merged(tmp_path, model), weights(model)
    for module, alpha in ((Q, 8), (V, 32)):
        np.testing.assert_allclose(
            result[f"{module}.weight"], base[f"{module}.weight"] + alpha / 4 * product(tmp_path, module), atol=1e-5
        )
    assert np.abs(result[f"{V}.weight"] - (base[f"{V}.weight"] + 8 / 4 * product(tmp_path, V))).max() > 0.1, (
        "the one global alpha would do as well"
    )


def test_each_module_has_its_own_rank_where_converters_keep_one_for_all(tmp_path: Path):
    """Olive and TensorRT-LLM divide every module's alpha by the one global rank."""
    model = llama()
    save(tmp_path, model, rank_pattern={"v_proj": 2})
    np.testing.assert_allclose(
        merged(tmp_path, model)[f"{V}.weight"], weights(model)[f"{V}.weight"] + 8 / 2 * product(tmp_path, V), atol=1e-5
    )


def test_rank_stabilised_scaling_is_honoured_where_llama_cpp_s_converter_drops_it(tmp_path: Path):
    model = llama()
    save(tmp_path, model, use_rslora=True)
    np.testing.assert_allclose(
        merged(tmp_path, model)[f"{Q}.weight"],
        weights(model)[f"{Q}.weight"] + 8 / math.sqrt(4) * product(tmp_path, Q),
        atol=1e-5,
    )


def test_a_merge_that_does_nothing_is_an_error_where_peft_s_safe_merge_is_content_with_finite_values(tmp_path: Path):
    model = llama()
    wrapped = save(tmp_path, model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {name: values * (0 if "lora_B" in name else 1) for name, values in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).merge_and_unload(safe_merge=True)
    assert all(torch.equal(left, right) for left, right in zip(loaded.parameters(), model.parameters(), strict=True)), (
        wrapped
    )
    with pytest.raises(AdapterError, match="the result would be the base model"):
        merged(tmp_path, model)


def test_an_adapter_whose_modules_the_model_lacks_is_an_error_where_servers_answer_with_the_base(tmp_path: Path):
    """triton-inference-server/tensorrtllm_backend #791: the adapter was not applied, and nobody said so."""
    model = llama()
    save(tmp_path, model)
    base = {name.replace("q_proj", "query"): values for name, values in weights(model).items()}
    with pytest.raises(AdapterError, match="has no weight in the base"):
        list(merge(base, changes_by_parameter(base, read_peft(tmp_path)), tmp_path))


def test_alpha_stays_over_rank_even_where_they_are_equal_by_default(tmp_path: Path):
    """huggingface/diffusers PR #14409: alpha itself was taken for alpha / rank."""
    model = llama()
    save(tmp_path, model, lora_alpha=4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 4
    np.testing.assert_allclose(
        merged(tmp_path, model)[f"{Q}.weight"], weights(model)[f"{Q}.weight"] + product(tmp_path, Q), atol=1e-5
    )
