"""The paper's arithmetic: its own figures for GPT-3, and the parameters that PEFT counts on other models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lora.errors import AdapterError
from lora.modules.layers import Injection, inject
from lora.planning.dimensions import GPT3, read_dimensions
from lora.planning.economics import Dimensions, Product, plan

COMMAND = Path(sys.executable).with_name("lorafuse")


def figures(*arguments: str | Path) -> dict[str, dict[str, Any]]:
    found = json.loads(subprocess.check_output([COMMAND, "plan", *arguments, "--json"], text=True))
    return {figure["name"]: figure for figure in found["figures"]}


def test_gpt3s_figures_are_the_papers_from_its_dimensions():
    """Sections 1, 4.2 and 5.5: 175 billion parameters, 350 GB, 35 MB, ÷ 10,000, ÷ 3, 354 GB, 35 TB; the paper rounds
    generously.
    """
    found = figures("--model", GPT3, "--rank", "4", "--targets", "q,v", "--tasks", "100")
    wanted = {
        "parameters of the base": 175e9,
        "checkpoint, full fine-tuning": 350e9,
        "checkpoint, LoRA": 35e6,
        "checkpoint, full ÷ LoRA": 10_000,
        "weights and moments, LoRA": 350e9,
        "weights and moments, full ÷ LoRA": 3,
        "100 tasks, one base and an adapter each": 354e9,
        "100 tasks, a model each": 35e12,
    }
    for name, value in wanted.items():
        assert found[name]["value"] == pytest.approx(value, rel=0.08), name
        assert found[name]["paper"]
    assert found["trainable parameters"]["value"] == 96 * 2 * 4 * (12288 + 12288)
    assert found["trainable parameters"]["formula"].endswith("192 × 4 × (12288 + 12288)")
    assert found["weights and moments, full ÷ LoRA"]["value"] == pytest.approx(3, abs=0.001)


def test_the_papers_figures_stand_beside_its_own_case_only():
    assert not any(figure["paper"] for figure in figures("--model", GPT3, "--rank", "8").values())


def test_spaces_around_targets_and_a_comma_too_many_are_no_names():
    wanted = figures("--model", GPT3)
    assert figures("--model", GPT3, "--targets", " q, v,") == wanted
    assert wanted["checkpoint, LoRA"]["paper"]


def test_targets_without_a_name_are_refused_in_one_line_with_status_3():
    done = subprocess.run([COMMAND, "plan", "--model", GPT3, "--targets", " , "], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        "--targets ' , ': names nothing; give q, k, v or o, or names that module paths end in, such as q,v"
        in done.stderr
    )
    assert done.stderr.strip().count("\n") == 0


def test_the_arithmetic_by_hand():
    found = plan(
        Dimensions("model", 1000, (Product("a", 10, 20), Product("b", 10, 20), Product("c", 5, 5))),
        rank=2,
        tasks=3,
        width=4,
    )
    values = {figure.name: figure.value for figure in found.figures}
    trainable = 2 * (30 + 30 + 10)
    assert values["trainable parameters"] == trainable
    assert values["checkpoint, LoRA"] == 4 * trainable
    assert values["Adam's moments, full fine-tuning"] == 8000
    assert values["weights and moments, LoRA"] == 4 * 1000 + 12 * trainable
    assert values["3 tasks, one base and an adapter each"] == 4000 + 3 * 4 * trainable
    assert next(figure.formula for figure in found.figures if figure.name == "trainable parameters").endswith(
        "2 × 2 × (10 + 20) + 1 × 2 × (5 + 5)"
    )


ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "decoder_start_token_id": 1}
TWO_SIDES = {
    "d_model": 32,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **ENCODER,
    **DECODER,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
MODELS = {
    "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96), "c_attn,c_fc"),
    "llama": (transformers.LlamaConfig(**SMALL, num_key_value_heads=2), "q,k,v,o"),
    "qwen2": (transformers.Qwen2Config(**SMALL, num_key_value_heads=1), "q,v,down_proj"),
    "bert": (transformers.BertConfig(**SMALL), "q,v"),
    "distilbert": (
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=96),
        "q,k,v,o",
    ),
    "deberta": (transformers.DebertaV2Config(**SMALL, relative_attention=True), "q,k,v"),
    "t5": (transformers.T5Config(**T5), "q,v"),
    "neox": (transformers.GPTNeoXConfig(**SMALL), "query_key_value"),
    "vit": (
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32
        ),
        "q_proj,v_proj",
    ),
}


@pytest.mark.parametrize(("config", "targets"), MODELS.values(), ids=MODELS)
def test_trainable_parameters_are_those_that_peft_counts(tmp_path: Path, config: Any, targets: str):
    config.save_pretrained(tmp_path)
    found = read_dimensions(str(tmp_path), targets.split(","))
    with torch.device("meta"):
        causal = type(config) in (
            transformers.GPT2Config,
            transformers.LlamaConfig,
            transformers.Qwen2Config,
            transformers.GPTNeoXConfig,
        )
        model = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)
        assert found.parameters == model.num_parameters()
        modules = sorted({product.name for product in found.products})
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=modules))
    trainable, _ = wrapped.get_nb_trainable_parameters()
    assert sum(3 * (product.inputs + product.outputs) for product in found.products) == trainable


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        (transformers.WhisperConfig(**TWO_SIDES), transformers.WhisperForConditionalGeneration),
        (transformers.MarianConfig(**TWO_SIDES), transformers.MarianMTModel),
        (transformers.PegasusConfig(**TWO_SIDES), transformers.PegasusForConditionalGeneration),
        (transformers.BartConfig(**TWO_SIDES), transformers.BartForConditionalGeneration),
        (transformers.LongT5Config(**T5), transformers.LongT5ForConditionalGeneration),
        (
            transformers.LongT5Config(**T5, encoder_attention_type="transient-global"),
            transformers.LongT5ForConditionalGeneration,
        ),
        (transformers.BartConfig(**TWO_SIDES, tie_word_embeddings=False), transformers.BartForConditionalGeneration),
    ],
    ids=["whisper", "marian", "pegasus", "bart", "longt5", "longt5, transient", "bart, untied"],
)
def test_of_an_encoder_and_a_decoder_both_count(tmp_path: Path, config: Any, whole: Any):
    config.save_pretrained(tmp_path)
    found = read_dimensions(str(tmp_path), ["q", "v"])
    with torch.device("meta"):
        model = whole(config)
    assert found.parameters == model.num_parameters()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q", "v", "q_proj", "v_proj"]))
    assert (
        sum(3 * (product.inputs + product.outputs) for product in found.products)
        == wrapped.get_nb_trainable_parameters()[0]
    )


def test_whisper_smalls_figures_are_those_of_the_whole_model(tmp_path: Path):
    """Not of its decoder alone, which is a causal language model too."""
    sides = {"encoder_layers": 12, "encoder_attention_heads": 12, "decoder_layers": 12, "decoder_attention_heads": 12}
    transformers.WhisperConfig(d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072, **sides).save_pretrained(
        tmp_path
    )
    found = read_dimensions(str(tmp_path), ["q", "v"])
    assert (found.parameters, len(found.products)) == (241_734_912, 72)


def test_the_parts_of_a_fused_projection_are_as_wide_as_their_heads(tmp_path: Path):
    transformers.Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0).save_pretrained(tmp_path)
    found = read_dimensions(str(tmp_path / "config.json"), ["q", "k", "v"])
    assert [product.outputs for product in found.products[::2]] == [32, 16, 16]
    assert {product.inputs for product in found.products} == {32}


HEADS = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 96}
BIGCODE = {"n_embd": 64, "n_head": 8, "n_layer": 1, "vocab_size": 96}
MPT = {"d_model": 64, "n_heads": 8, "n_layers": 1, "vocab_size": 96}
EXPERTS = {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}
GROUPED = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000}
FUSED = {
    "falcon, multi-query": (transformers.FalconConfig(**HEADS, alibi=False), [64, 8, 8]),
    "falcon, multi-head": (
        transformers.FalconConfig(**HEADS, alibi=False, multi_query=False, num_kv_heads=2),
        [64, 64, 64],
    ),
    "falcon, grouped": (
        transformers.FalconConfig(**HEADS, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
        [64, 16, 16],
    ),
    "gptbigcode, multi-query": (transformers.GPTBigCodeConfig(**BIGCODE), [64, 8, 8]),
    "gptbigcode, multi-head": (transformers.GPTBigCodeConfig(**BIGCODE, multi_query=False), [64, 64, 64]),
    "dbrx, grouped": (
        transformers.DbrxConfig(**MPT, pad_token_id=0, attn_config=GROUPED, ffn_config=EXPERTS),
        [64, 16, 16],
    ),
    "phi3, wide heads": (
        transformers.Phi3Config(**HEADS, num_key_value_heads=2, head_dim=16, pad_token_id=0),
        [128, 32, 32],
    ),
    "mpt": (transformers.MptConfig(**MPT), [64, 64, 64]),
    "bloom": (transformers.BloomConfig(hidden_size=64, n_head=8, n_layer=1, vocab_size=96), [64, 64, 64]),
    "deberta": (transformers.DebertaConfig(**HEADS), [64, 64, 64]),
    "modernbert": (transformers.ModernBertConfig(**HEADS, pad_token_id=0), [64, 64, 64]),
}


@pytest.mark.parametrize(("config", "widths"), FUSED.values(), ids=FUSED)
def test_a_fused_projections_parts_are_its_heads_and_add_up_to_it(tmp_path: Path, config: Any, widths: list[int]):
    config.save_pretrained(tmp_path)
    found = read_dimensions(str(tmp_path), ["q", "k", "v"]).products
    assert [product.outputs for product in found] == widths
    path = found[0].name.removesuffix("[q]")
    assert [product.name for product in found] == [f"{path}[{part}]" for part in "qkv"]
    whole = read_dimensions(str(tmp_path), [path]).products
    assert [(product.inputs, product.outputs) for product in whole] == [(found[0].inputs, sum(widths))]


def test_falcon_7bs_queries_are_71_heads_and_its_values_one(tmp_path: Path):
    transformers.FalconConfig(
        hidden_size=4544, num_attention_heads=71, num_hidden_layers=2, alibi=False
    ).save_pretrained(tmp_path)
    found = read_dimensions(str(tmp_path), ["q", "v"]).products
    assert [product.outputs for product in found] == [4544, 4544, 64, 64]


def test_a_fused_layout_that_the_configuration_does_not_explain_is_refused_by_name(tmp_path: Path):
    """A cross attention's keys and values, without queries, are as wide as a self-attention's with half as many of
    them.
    """
    transformers.GPT2Config(n_embd=48, n_head=4, n_layer=1, vocab_size=96, add_cross_attention=True).save_pretrained(
        tmp_path
    )
    said = (
        r"target 'v': by the configuration, the 96 outputs of 'transformer\.h\.0\.crossattention\.c_attn' are not its"
        r" heads' queries, .* --targets c_attn"
    )
    with pytest.raises(AdapterError, match=said):
        read_dimensions(str(tmp_path), ["v"])


@pytest.mark.parametrize(
    ("content", "targets", "said"),
    [
        (
            None,
            ["q"],
            r"config\.json: can't be read \(No such file or directory\); give a config\.json, its folder, or gpt3-175b",
        ),
        ("{", ["q"], r"config\.json: not the configuration of a model that transformers knows"),
        ("[]", ["q"], r"config\.json: not the configuration of a model that transformers knows"),
        ('{"model_type": "nope"}', ["q"], r"config\.json: not the configuration of a model that transformers knows"),
        ('{"model_type": "bert", "hidden_size": 30}', ["q"], "transformers can't build the model"),
        ('{"model_type": ["bert"]}', ["q"], r"config\.json: not the configuration of a model that transformers knows"),
        (
            '{"model_type": "bert", "hidden_size": "768"}',
            ["q"],
            r"config\.json: not the configuration .* 'hidden_size' expected int, got str",
        ),
        (
            '{"model_type": "bert", "num_hidden_layers": 1.5}',
            ["q"],
            r"config\.json: not the configuration .* 'num_hidden_layers' expected int, got float",
        ),
        ('{"model_type": "xlnet", "d_head": 7}', ["q"], r"config\.json: not the configuration .* `d_head` \(7\)"),
        (
            '{"model_type": "bert", "num_attention_heads": 0}',
            ["q"],
            r"transformers can't build the model \(ZeroDivisionError: .*\); correct the sizes",
        ),
        (
            '{"model_type": "deberta", "hidden_size": 0}',
            ["q"],
            r"'encoder\.layer\.0\.attention\.self\.in_proj' is empty, 0 × 0; correct the sizes",
        ),
        ('{"model_type": "llama", "head_dim": 0}', ["q"], r"transformers can't build the model \(ZeroDivisionError: "),
        (
            '{"model_type": "phi3", "vocab_size": 96}',
            ["q"],
            r"transformers can't build the model \(AssertionError: Padding_idx must be within num_embeddings\)",
        ),
        (
            '{"model_type": "glm4", "vocab_size": 96}',
            ["q"],
            r"transformers can't build the model \(AssertionError: Padding_idx",
        ),
        (
            '{"model_type": "modernbert", "vocab_size": 96}',
            ["q"],
            r"transformers can't build the model \(AssertionError: Padding_idx",
        ),
        (
            '{"model_type": "bert"}',
            ["nope"],
            "target 'nope': BertModel has no such module; its layers are called dense, key, ",
        ),
        ('{"model_type": "resnet"}', ["q"], "target 'q': ResNetModel has no projection by a name that is known"),
        (
            '{"model_type": "mamba", "num_hidden_layers": 1}',
            ["q"],
            "target 'q': MambaForCausalLM has no projection by a name that is known",
        ),
        (
            '{"model_type": "falcon_mamba", "num_hidden_layers": 1}',
            ["v"],
            "target 'v': FalconMambaForCausalLM has no projection by a name that is known",
        ),
        ('{"model_type": "bert"}', ["q", "query"], r"targets q, query: '.*query' is named twice; name it once"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, content: str | None, targets: list[str], said: str):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdapterError, match=said) as refused:
        read_dimensions(str(tmp_path), targets)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "target", "said"),
    [
        ('{"model_type": "bert", "num_hidden_layers": 1}', "LayerNorm", r"'embeddings\.LayerNorm' is a LayerNorm; "),
        (
            '{"model_type": "bert", "num_hidden_layers": 1}',
            "attention",
            r"'encoder\.layer\.0\.attention' is a BertAttention; ",
        ),
        (
            '{"model_type": "mixtral", "num_hidden_layers": 1}',
            "experts",
            r"'model\.layers\.0\.mlp\.experts' is a MixtralExperts; ",
        ),
        (
            '{"model_type": "vit", "num_hidden_layers": 1}',
            "projection",
            r"'embeddings\.patch_embeddings\.projection' is a Conv2d; ",
        ),
    ],
)
def test_a_layer_that_training_refuses_is_refused_in_the_same_words(
    tmp_path: Path, content: str, target: str, said: str
):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(AdapterError, match=said) as planned:
        read_dimensions(str(tmp_path), [target])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = (
            transformers.AutoModelForCausalLM if config.model_type == "mixtral" else transformers.AutoModel
        ).from_config(config)
    with pytest.raises(AdapterError) as trained:
        inject(model, Injection((target,), 4, 8))
    assert str(planned.value) == str(trained.value)


def test_layers_that_have_no_lora_do_not_stand_in_the_way_of_those_that_have(tmp_path: Path):
    """SpeechT5 has convolutions whose weight is made of two parameters."""
    (tmp_path / "config.json").write_text('{"model_type": "speecht5", "encoder_layers": 1, "decoder_layers": 1}')
    assert len(read_dimensions(str(tmp_path), ["q", "v"]).products) == 6


def test_the_table_shows_formulas_and_assumptions():
    said = subprocess.check_output([COMMAND, "plan", "--model", GPT3], text=True)
    assert "2 B × 18,874,368" in said
    assert "35 MB, as 350 GB ÷ 10,000" in said
    assert "gradients and activations are left out" in said
