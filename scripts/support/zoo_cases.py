"""The cases of the zoo: each model by the kinds of adapters that fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import transformers

from scripts.support.zoo import Case, Inputs
from scripts.support.zoo_composites import COMPOSITES
from scripts.support.zoo_models import MODELS, Model, image, text

ALL_MODELS = MODELS | COMPOSITES
# The class that saves a base of each kind and in which its adapters are trained; and the task, where PEFT names one.
SAVED: Mapping[str, tuple[str, str | None]] = {
    "decoder": ("ForCausalLM", "CAUSAL_LM"),
    "moe": ("ForCausalLM", "CAUSAL_LM"),
    "encoder": ("ForMaskedLM", None),
    "seq2seq": ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    "speech": ("ForConditionalGeneration", None),
    "image": ("ForImageClassification", None),
    "clip": ("Model", None),
    "audio": ("ForCTC", None),
    "image and text": ("ForConditionalGeneration", "CAUSAL_LM"),
    "pair": ("Model", None),
}
# The heads that classifiers bring, by what PEFT does not know itself.
IMAGE_HEADS = {"Dinov2": "classifier", "ViT": "classifier", "DeiT": "classifier", "Beit": "classifier"}
# Layers between the body and the classifier, which are new with it.
OWN_HEADS = {"DebertaV2": ("pooler", "classifier"), "ModernBert": ("head", "classifier")}
# PEFT's other methods: its configuration's class, and settings beside the targets.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "LoHaConfig": {"r": 4, "alpha": 8},
    "LoKrConfig": {"r": 2, "alpha": 8},
    "VeraConfig": {"r": 4},
    "IA3Config": {},
}
# A model with square matrices, one with biases, one with Conv1D; and, for two methods, one with convolutions.
METHOD_MODELS = ("Llama", "Bert", "GPT2", "T5")
OF_CONVOLUTIONS = ("LoHaConfig", "LoKrConfig")


def all_cases() -> list[Case]:
    """Every case, in a fixed order; names are unique."""
    of_lora = [case for name, model in ALL_MODELS.items() for case in _of_model(name, model)]
    return of_lora + [case for name in METHOD_MODELS for case in _of_methods(name)] + list(_others())


def _of_model(name: str, model: Model) -> Iterator[Case]:
    ending, task = ("LMHeadModel", "CAUSAL_LM") if name == "GPT2" else SAVED[model.kind]
    saved = model.stem + ending
    attention = list(model.attention)

    def case(
        kind: str, trained: str = saved, call: Inputs = model.call, labels: bool = False, base: str = saved, **more: Any
    ) -> Case:
        given = {"r": 4, "lora_alpha": 8, "target_modules": attention, "task_type": task, **more}
        return Case(f"{name}: {kind}", model.config, base, trained, call, given, labels=labels)

    yield case("attention")
    yield case("DoRA", use_dora=True)
    yield case("saved biases", bias="all")
    if model.kind not in ("image", "clip", "audio"):
        yield case("every linear layer", target_modules="all-linear")
    if model.head:
        yield case("output embedding", target_modules=[model.head])
    if model.embedding:
        yield case("input embedding", target_modules=[model.embedding])
    if model.kind in ("decoder", "moe"):
        yield case("trained tokens", trainable_token_indices=[3, 5, 8])
        yield case("saved embedding", modules_to_save=[model.embedding])
    if model.kind == "moe":
        parts = [f"mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
        yield case("experts", target_parameters=parts)
        yield case("saved router", modules_to_save=["router" if name == "GptOss" else "gate"])
    classifier = f"{'Gemma3Text' if name == 'Gemma3 text' else model.stem}ForSequenceClassification"
    if model.kind in ("decoder", "encoder") and hasattr(transformers, classifier):
        body = f"{model.stem}Model" if model.kind == "encoder" else saved  # a language model's base has no pooler
        given: dict[str, Any] = {"task_type": "SEQ_CLS", "labels": True, "base": body}
        if name in OWN_HEADS:
            given["modules_to_save"] = list(OWN_HEADS[name])
        yield case("classifier", classifier, **given)
        if name != "DistilBert" and name not in OWN_HEADS:  # PEFT can't train one layer both whole and by LoRA
            yield case("classifier, every layer", classifier, **given | {"target_modules": "all-linear"})
    if model.stem in IMAGE_HEADS:
        yield case("head", labels=False, modules_to_save=[IMAGE_HEADS[model.stem]])
    if model.kind == "clip":
        yield case("image's part", f"{model.stem}VisionModel", image)
        yield case("text's part", f"{model.stem}TextModel", text)


def _of_methods(name: str) -> Iterator[Case]:
    model = MODELS[name]
    ending, task = ("LMHeadModel", "CAUSAL_LM") if name == "GPT2" else SAVED[model.kind]
    for method, settings in METHODS.items():
        if name == "GPT2" and method in OF_CONVOLUTIONS:
            continue  # PEFT has none of these for Conv1D
        given = {"target_modules": list(model.attention), "task_type": task, **settings}
        if method == "IA3Config":
            given["feedforward_modules"] = []
        yield _method_case(f"{name}: {method}", model, model.stem + ending, method, given)


def _others() -> Iterator[Case]:
    llama, bert = MODELS["Llama"], MODELS["Bert"]
    down = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    yield _method_case("Llama: IA3, feed-forward", llama, "LlamaForCausalLM", "IA3Config", down)
    both = {"r": 1, "alpha": 8, "decompose_both": True, "target_modules": ["q_proj"]}
    yield _method_case("Llama: LoKr of two products", llama, "LlamaForCausalLM", "LoKrConfig", both)
    full = {"r": 64, "alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    yield _method_case("Llama: LoKr, whole", llama, "LlamaForCausalLM", "LoKrConfig", full)
    norms = {"target_modules": ["input_layernorm", "norm"]}
    yield _method_case("Llama: norms", llama, "LlamaForCausalLM", "LNTuningConfig", norms)
    yield _method_case("Bert: norms", bert, "BertForMaskedLM", "LNTuningConfig", {"target_modules": ["LayerNorm"]})
    tokens = {"token_indices": [3, 5], "target_modules": ["embed_tokens"]}
    yield _method_case("Llama: tokens", llama, "LlamaForCausalLM", "TrainableTokensConfig", tokens)
    for method in OF_CONVOLUTIONS:
        given = {"r": 4, "alpha": 8, "target_modules": ["dwconv", "pwconv1", "patch_embeddings"]}
        yield _method_case(f"ConvNext: {method}", MODELS["ConvNext"], "ConvNextForImageClassification", method, given)


def _method_case(name: str, model: Model, saved: str, method: str, settings: Mapping[str, Any]) -> Case:
    return Case(name, model.config, saved, saved, model.call, settings, method)
