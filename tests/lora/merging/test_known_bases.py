"""Bases that names alone misread: each merged, loaded by plain transformers, and held against PEFT's unmerged forward.

Every case gave another model, or was refused with untrue words, while a base was guessed from its files' names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from quantized_bases import four_bit, gguf_file
from safetensors.numpy import load_file, save_file

from lora.bases.opening import open_base
from lora.errors import AdapterError
from lora.formats.peft_types import READERS
from lora.formats.read import ReadOptions, read_adapter
from lora.merging.checkpoint import Storing, Written
from lora.merging.several import Blending
from lora.merging.to_folder import Sources, merge_folder
from lora.modules.base_structure import ask_transformers
from scripts.support.zoo import BOUND, Case, check, compare, disturb, load, output, quietly, save_adapter, save_base
from scripts.support.zoo_cases import ALL_MODELS, all_cases
from scripts.support.zoo_models import MODELS, text

ROWS = {
    "a square weight beside a Conv1D": ["GPT2: classifier, every layer", "BERT to GPT-2: every linear layer"],
    "the first prefix that fits": ["CLIP: image's part", "CLIP: text's part", "Siglip: image's part"],
    "a saved tensor that the base lacks": [
        "ViT: saved biases",
        "Llava: saved biases",
        "Bert: saved biases",
        "Mixtral: saved router",
        "ViT: head",
    ],
    "untying": [
        "T5: input embedding",
        "T5: output embedding",
        "T5 gated: output embedding",
        "Bart: output embedding",
        "Bert: output embedding",
        "Roberta: output embedding",
        "Whisper: output embedding",
        "BERT to BERT: output embedding",
    ],
    "renamed modules": ["DeiT: attention", "Dinov2: attention", "Qwen2VL: attention", "Gemma3: attention"],
    "experts": ["Mixtral: experts", "Qwen3Moe: experts", "GptOss: experts"],
    "a classifier on a causal base": ["Llama: classifier"],
}
CASES = {case.name: case for case in all_cases()}
LORA = {"r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("name", [name for names in ROWS.values() for name in names])
def test_a_base_that_names_misread_is_merged_exactly(name: str, tmp_path: Path):
    outcome = check(CASES[name], tmp_path)
    assert outcome.difference <= BOUND
    assert outcome.moved > 100 * BOUND, "the adapter does nothing"


@pytest.mark.parametrize("name", ["GPT2: classifier, every layer", "T5: output embedding", "Bert: saved biases"])
def test_a_base_that_is_written_down_needs_no_transformers(name: str, tmp_path: Path):
    assert check(CASES[name], tmp_path, only_written_down=True).difference <= BOUND


def merge(base: Path, adapter: Path, out: Path, storing: Storing = Storing(), ask: Any = ask_transformers) -> Written:
    dequantize = bool((json.loads((base / "config.json").read_text())).get("quantization_config"))
    return merge_folder(Sources(base, ((adapter, 1.0),), ReadOptions(), dequantize), out, storing, Blending(), ask=ask)


def made(name: str, folder: Path, **settings: Any) -> tuple[Case, Any]:
    """A base and an adapter of one of the zoo's models, and the unmerged model."""
    model = MODELS[name]
    saved = f"{model.stem}ForCausalLM"
    given = {**LORA, "target_modules": list(model.attention), "task_type": "CAUSAL_LM", **settings}
    case = Case(name, model.config, saved, saved, model.call, given)
    save_base(case, folder / "base")
    return case, save_adapter(case, folder / "base", folder / "adapter")[0]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_keys(folder: Path, *pairs: tuple[str, str]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in pairs:
        tensors = {key.replace(old, new): values for key, values in tensors.items()}
    save_file(tensors, path)


def test_an_unclear_part_of_a_model_is_refused_and_both_are_named(tmp_path: Path):
    case = CASES["CLIP: image's part"]
    save_base(case, tmp_path / "base")
    save_adapter(case, tmp_path / "base", tmp_path / "adapter")
    change_config(tmp_path / "adapter", auto_mapping=None)
    with pytest.raises(AdapterError, match=r"may be 'text_model\..*' or 'vision_model\..*' of the base"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_square_weight_of_an_unknown_model_is_refused_with_what_to_install(tmp_path: Path):
    made("GPTNeoX", tmp_path)
    with pytest.raises(AdapterError, match=r"square \(32, 32\).*pip install 'lorafuse\[export\]'"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", ask=None)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_the_embedding_of_an_unknown_model_is_refused_because_it_may_be_tied(tmp_path: Path):
    made("Bloom", tmp_path, target_modules=["word_embeddings"])
    with pytest.raises(AdapterError, match=r"which tensors this model \(bloom\) ties to it"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", ask=None)


def test_a_saved_tensor_without_a_place_is_refused(tmp_path: Path):
    made("Llama", tmp_path, modules_to_save=["mlp"])
    rename_keys(tmp_path / "adapter", ("mlp.gate_proj", "mlp.missing_proj"))
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no '.*mlp.missing_proj.weight'.*would drop it"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_of_a_part_that_was_saved_from_it_finds_its_place(tmp_path: Path):
    model = ALL_MODELS["Llava"]
    case = Case("Llava", model.config, "LlavaForConditionalGeneration", "LlavaForConditionalGeneration", model.call, {})
    save_base(case, tmp_path / "base")
    whole = load(case, tmp_path / "base")
    inputs = model.call(whole)
    plain = output(whole, inputs)
    config = peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"])
    tower = quietly(lambda: peft.get_peft_model(whole.model.vision_tower, config)).eval()
    disturb((parameter for parameter in tower.parameters() if parameter.requires_grad), 0.3)
    quietly(lambda: tower.save_pretrained(str(tmp_path / "adapter")))
    expected = output(whole, inputs)  # PEFT has put its layers into the tower
    assert (expected - plain).abs().max() > 1e-3
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(output(load(case, tmp_path / "out"), inputs), expected, rtol=0, atol=1e-5)


def test_names_of_transformers_4_are_understood(tmp_path: Path):
    case = CASES["ViT: attention"]
    save_base(case, tmp_path / "base")
    wrapped, plain = save_adapter(case, tmp_path / "base", tmp_path / "adapter")
    rename_keys(
        tmp_path / "adapter",
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.v_proj", "attention.attention.value"),
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert compare(case, plain, wrapped, tmp_path / "out").difference <= BOUND


def test_experts_that_were_adapted_one_by_one_are_merged_one_by_one(tmp_path: Path):
    made("Mixtral", tmp_path)
    path = "model.layers.0.block_sparse_moe.experts.1.w3"
    random = np.random.default_rng(0)
    a, b = (random.normal(size=size).astype(np.float32) for size in ((4, 32), (32, 4)))
    keys = {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
    save_file(keys, tmp_path / "adapter/adapter_model.safetensors")
    written = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert written.changed == (f"{path}.weight",)
    before, after = (load_file(tmp_path / name / "model.safetensors")[f"{path}.weight"] for name in ("base", "out"))
    np.testing.assert_allclose(after, before + 2 * b @ a, atol=1e-5)


def test_a_classifier_on_a_causal_base_says_its_class_and_its_labels(tmp_path: Path):
    check(CASES["Llama: classifier"], tmp_path)
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.num_labels == 3


def test_a_resized_vocabulary_is_merged_and_counted(tmp_path: Path):
    model = MODELS["Llama"]
    case = Case("Llama", model.config, "LlamaForCausalLM", "LlamaForCausalLM", model.call, {})
    save_base(case, tmp_path / "base")
    larger = load(case, tmp_path / "base")
    larger.resize_token_embeddings(104)
    config = peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = quietly(lambda: peft.get_peft_model(larger, config)).eval()
    disturb((parameter for parameter in wrapped.parameters() if parameter.requires_grad), 0.1)
    quietly(lambda: wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 104
    inputs = {"input_ids": torch.tensor([[3, 100, 103, 5]])}
    merged = output(load(case, tmp_path / "out"), inputs)
    torch.testing.assert_close(merged, output(wrapped, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "gguf"])
def test_an_update_of_a_tied_output_embedding_is_kept_on_a_quantized_base(kind: str, tmp_path: Path):
    made("Llama tied", tmp_path, target_modules=["lm_head"])
    base = quantized(tmp_path, kind)
    sources = Sources(base, ((tmp_path / "adapter", 1.0),), ReadOptions(), True)
    written = merge_folder(sources, tmp_path / "out", Storing(), Blending(), ask=ask_transformers)
    assert "lm_head.weight" in written.changed
    opened = open_base(base, dequantize=True).tensors
    merged = {
        name: values for path in (tmp_path / "out").glob("*.safetensors") for name, values in load_file(path).items()
    }
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (factors[f"base_model.model.lm_head.lora_{part}.weight"] for part in "AB")
    embedding = opened["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_allclose(merged["lm_head.weight"].astype(np.float32), embedding + 2 * b @ a, atol=2e-2)
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"].astype(np.float32), embedding)


def quantized(folder: Path, kind: str) -> Path:
    if kind == "nf4":
        return four_bit(folder / "base", folder / "quantized")
    return gguf_file(folder / "base", folder / "base.gguf")


def test_tensors_that_are_kept_wide_are_not_rounded_when_they_are_loaded(tmp_path: Path):
    case, _ = made("Llama", tmp_path)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").to(torch.bfloat16)
    shutil.rmtree(tmp_path / "base")
    narrow.save_pretrained(tmp_path / "base")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    small = {name: values * np.float32(0.01) for name, values in factors.items()}
    save_file(small, tmp_path / "adapter/adapter_model.safetensors")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", Storing(keep_wide=True))
    stored = {
        name: values for path in (tmp_path / "out").glob("*.safetensors") for name, values in load_file(path).items()
    }
    wide = [name for name, values in stored.items() if values.dtype == np.float32]
    assert wide
    loaded = load(case, tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], torch.from_numpy(stored[name])) for name in wide)


def test_a_sentence_transformer_is_still_one(tmp_path: Path, real_base: Path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    encoder = quietly(lambda: Transformer(str(real_base)))
    pooled = SentenceTransformer(modules=[encoder, Pooling(384, "mean")], device="cpu")
    pooled.save(str(tmp_path / "base"))
    config = peft.LoraConfig(**LORA, target_modules=["query", "value"])
    wrapped = quietly(lambda: peft.get_peft_model(transformers.BertModel.from_pretrained(tmp_path / "base"), config))
    disturb((parameter for parameter in wrapped.parameters() if parameter.requires_grad), 0.05)
    quietly(lambda: wrapped.save_pretrained(str(tmp_path / "adapter")))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    inputs = merged.tokenizer(["a sentence"], return_tensors="pt")
    expected = output(wrapped.eval(), inputs).mean(1)[0]
    ours = torch.from_numpy(merged.encode(["a sentence"], normalize_embeddings=False))[0]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_a_key_with_the_adapter_s_name_in_it_is_understood(tmp_path: Path):
    case, wrapped = made("Llama", tmp_path)
    rename_keys(
        tmp_path / "adapter", ("lora_A.weight", "lora_A.default.weight"), ("lora_B.weight", "lora_B.default.weight")
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    plain = output(load(case, tmp_path / "base"), text(None))
    assert compare(case, plain, wrapped, tmp_path / "out").difference <= BOUND


def test_several_adapters_in_one_file_are_refused(tmp_path: Path):
    made("Llama", tmp_path)
    rename_keys(tmp_path / "adapter", ("lora_A.weight", "lora_A.one.weight"), ("lora_B.weight", "lora_B.two.weight"))
    with pytest.raises(AdapterError, match="holds the adapters one, two at once"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "fields",
    [{"unsloth_fixed": True, "unsloth_version": "2026.1"}, {"lora_dtype": "float32", "lorap_emb_lr": 1e-6}],
)
def test_fields_that_trainers_add_are_no_reason_to_refuse(fields: dict, tmp_path: Path):
    made("Llama", tmp_path)
    change_config(tmp_path / "adapter", **fields)
    assert read_adapter(tmp_path / "adapter").changes


@pytest.mark.parametrize("kind", sorted({kind.value for kind in peft.PeftType} - set(READERS) - {"LORA"}))
def test_a_method_that_can_t_be_merged_is_refused_by_name_and_with_a_reason(kind: str, tmp_path: Path):
    made("Llama", tmp_path)
    change_config(tmp_path / "adapter", peft_type=kind)
    with pytest.raises(AdapterError, match=f"field 'peft_type' is '{kind}', which can't be merged: .*"):
        read_adapter(tmp_path / "adapter")


def test_an_update_of_a_layer_that_has_no_values_is_refused(tmp_path: Path):
    made("Llama", tmp_path)
    rename_keys(tmp_path / "adapter", ("model.layers.0.self_attn.q_proj", "score"))
    change_config(tmp_path / "adapter", task_type="SEQ_CLS")
    save_base(Case("x", MODELS["Mistral"].config, "MistralModel", "", text, {}), tmp_path / "other")
    for base, message in (("base", "has no weight in the base"), ("other", "has no weight in the base")):
        with pytest.raises(AdapterError, match=message):
            merge(tmp_path / base, tmp_path / "adapter", tmp_path / "out", ask=None)
    with pytest.raises(AdapterError, match="module 'score' has no weight in the base"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_what_neither_the_base_nor_the_adapter_has_is_said(tmp_path: Path):
    case = CASES["XLMRoberta: classifier"]
    save_base(case, tmp_path / "base")
    save_adapter(case, tmp_path / "base", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    kept = {key: values for key, values in tensors.items() if "classifier.dense" not in key}
    save_file(kept, tmp_path / "adapter/adapter_model.safetensors")
    written = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert written.missing == ("classifier.dense.bias", "classifier.dense.weight")
