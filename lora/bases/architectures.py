"""The structure of common bases, written down, so that merging into them needs no torch and no transformers.

What is written here is held against transformers' own models in tests/lora/bases/test_architectures.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora.bases.structure import BaseStructure, Kind, Parameter, Piece, with_aliases
from lora.files.tensorfile import Array, shape_of
from lora.formats.model_class import ModelClass

# The ending of the class that a task needs, where the adapter names the task and not the class.
TASK_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}
Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Architecture:
    """What the models of one ``model_type`` have in common.

    Their classes begin with ``stem``. ``prefix`` is what a model with a head puts before the body's names, and
    ``causal`` the ending of its language model's class. ``embeddings`` and ``conv1d`` are the last parts of such
    modules' names; every other matrix is a linear layer's. ``renamed`` are patterns from a name on the disk to the
    module's. ``tied`` are the groups that a class ties, by the class's ending; ``ties`` is what the configuration
    means when it doesn't say. ``inner`` are classes of a part of the model, and what stands before its names on the
    disk. ``classes`` are the endings of tasks' classes that are not called as those of other models.
    """

    stem: str
    prefix: str
    embeddings: tuple[str, ...]
    causal: str = "ForCausalLM"
    conv1d: tuple[str, ...] = ()
    renamed: Renames = ()
    tied: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    ties: bool = True
    flag_unties: bool = True
    inner: Mapping[str, str] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)


def _decoder(stem: str, ties: bool = False, **changes: Any) -> Architecture:
    """A decoder of Llama's kind."""
    tied = {"ForCausalLM": (("model.embed_tokens.weight", "lm_head.weight"),)}
    return Architecture(stem, "model.", ("embed_tokens",), tied=tied, ties=ties, **changes)


_BERT_HEAD = (
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
)
_ROBERTA_HEAD = (
    ("lm_head.bias", "lm_head.decoder.bias"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
)
_T5 = ("shared.weight", "decoder.embed_tokens.weight", "encoder.embed_tokens.weight")
_WORDS = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_GAMMA_BETA = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_VIT = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen2": _decoder("Qwen2"),
    "qwen3": _decoder("Qwen3"),
    "gemma": _decoder("Gemma", ties=True),
    "gemma2": _decoder("Gemma2", ties=True),
    "gemma3_text": _decoder(
        "Gemma3", ties=True, classes={"SEQ_CLS": "TextForSequenceClassification", "FEATURE_EXTRACTION": "TextModel"}
    ),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3"),
    "gpt2": Architecture(
        "GPT2",
        "transformer.",
        ("wte", "wpe"),
        causal="LMHeadModel",
        conv1d=("c_attn", "q_attn", "c_proj", "c_fc"),
        tied={"LMHeadModel": (("transformer.wte.weight", "lm_head.weight"),)},
    ),
    "bert": Architecture(
        "Bert",
        "bert.",
        _WORDS,
        causal="LMHeadModel",
        renamed=_GAMMA_BETA,
        tied={"ForMaskedLM": _BERT_HEAD, "ForPreTraining": _BERT_HEAD, "LMHeadModel": _BERT_HEAD},
    ),
    "roberta": Architecture(
        "Roberta",
        "roberta.",
        _WORDS,
        renamed=_GAMMA_BETA,
        tied={"ForMaskedLM": _ROBERTA_HEAD, "ForCausalLM": _ROBERTA_HEAD},
    ),
    "t5": Architecture(
        "T5",
        "transformer.",
        ("shared", "embed_tokens", "relative_attention_bias"),
        tied={
            "ForConditionalGeneration": ((*_T5, "lm_head.weight"),),
            "EncoderModel": ((_T5[0], _T5[2]),),
            "Model": (_T5,),
            "ForSequenceClassification": (tuple(f"transformer.{name}" for name in _T5),),
        },
        flag_unties=False,
    ),
    "vit": Architecture("ViT", "vit.", (), renamed=_VIT),
    "clip": Architecture(
        "CLIP",
        "",
        ("token_embedding", "position_embedding"),
        inner={
            "CLIPVisionModel": "vision_model.",
            "CLIPTextModel": "text_model.",
        },
    ),
    "whisper": Architecture(
        "Whisper",
        "model.",
        ("embed_tokens", "embed_positions"),
        tied={"ForConditionalGeneration": (("model.decoder.embed_tokens.weight", "proj_out.weight"),)},
    ),
}
# Their classes for question answering call the body "transformer", or by another name still.
CALLED_OTHERWISE = frozenset(one.stem for one in ARCHITECTURES.values() if one.prefix == "model.")


def written_down(config: Mapping[str, Any], tensors: Mapping[str, Array], wanted: ModelClass) -> BaseStructure | None:
    """The structure of a base with this configuration and these stored tensors; None where nothing is written down."""
    if "_class_name" in config:
        return _of_diffusers(str(config["_class_name"]), tensors)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None or config.get("auto_map"):  # auto_map: a class of the base's own
        return None
    model = _model(architecture, config, wanted)
    if model is None:
        return None
    inner = architecture.inner.get(model, "")
    body = _body(architecture, model)
    parameters: dict[str, Parameter] = {}
    for stored in tensors:
        name = _in_the_module(architecture, stored, body, inner)
        if name is not None:
            shape = shape_of(tensors, stored)
            parameters[name] = Parameter(_kind(architecture, name, shape), shape, (Piece(stored),))
    tied = _tied(architecture, config, model)
    parameters |= {name: parameter for group in tied for name, parameter in _partners(architecture, group, parameters)}
    return with_aliases(
        BaseStructure(
            model=model,
            parameters=parameters,
            tied=tied,
            flag_unties=architecture.flag_unties,
            prefix=architecture.prefix,
        )
    )


def _of_diffusers(model: str, tensors: Mapping[str, Array]) -> BaseStructure:
    """A part of a diffusers pipeline: named on the disk as in the module, nothing tied, no matrix stored (in, out) but
    an embedding's.
    """
    parameters = {}
    for name in tensors:
        shape, last = shape_of(tensors, name), name.split(".")[-2:][0]
        kind: Kind = "convolution" if len(shape) > 2 else "unknown" if last.endswith("embedding") else "linear"
        parameters[name] = Parameter(kind, shape, (Piece(name),))
    return with_aliases(BaseStructure(model, parameters))


def _tied(architecture: Architecture, config: Mapping[str, Any], model: str) -> tuple[tuple[str, ...], ...]:
    if architecture.flag_unties and not config.get("tie_word_embeddings", architecture.ties):
        return ()
    return architecture.tied.get(model.removeprefix(architecture.stem), ())


def _partners(
    architecture: Architecture, group: tuple[str, ...], stored: Mapping[str, Parameter]
) -> Iterator[tuple[str, Parameter]]:
    """The tied parameters that are not stored, each of the shape of the one that is."""
    shapes = [stored[name].shape for name in group if name in stored]
    for name in group:
        if shapes and name not in stored:
            yield name, Parameter(_kind(architecture, name, shapes[0]), shapes[0])


def class_for(architecture: Architecture, task_type: str) -> str | None:
    """The class of a task's model."""
    usual = architecture.causal if task_type == "CAUSAL_LM" else TASK_CLASSES.get(task_type)
    ending = architecture.classes.get(task_type, usual)
    return architecture.stem + ending if ending else None


def _model(architecture: Architecture, config: Mapping[str, Any], wanted: ModelClass) -> str | None:
    """The class that the adapter was trained in, by the same rules as transformers' own; None for one not known."""
    saved_by = next(iter(config.get("architectures") or ()), None)
    model = wanted.name or (class_for(architecture, wanted.task_type) if wanted.task_type else None) or saved_by
    if model is None:
        return architecture.stem + "Model"
    if architecture.stem in CALLED_OTHERWISE and str(model).endswith("ForQuestionAnswering"):
        return None
    return model if isinstance(model, str) and model.startswith(architecture.stem) else None


def _body(architecture: Architecture, model: str) -> str:
    """What this class puts before the names of the body: nothing where it is the body."""
    is_body = model.removeprefix(architecture.stem) in ("Model", "EncoderModel", "TextModel")
    if architecture.stem == "T5":  # only its classifiers put the whole model under a name
        return architecture.prefix if model.endswith("Classification") else ""
    return "" if is_body else architecture.prefix


def _in_the_module(architecture: Architecture, stored: str, body: str, inner: str) -> str | None:
    """The module's name of a stored tensor, whose body may be stored without its prefix; None for another part's."""
    if inner:
        return stored.removeprefix(inner) if stored.startswith(inner) else None
    prefix = architecture.prefix
    name = stored.removeprefix(prefix) if prefix else stored
    for pattern, replacement in architecture.renamed:
        name = re.sub(pattern, replacement, name)
    return body + name if _of_the_body(architecture, stored, name) else name


def _of_the_body(architecture: Architecture, stored: str, name: str) -> bool:
    """Whether a tensor is the body's, and not a head's: it bears the prefix, or is called as parts of bodies are."""
    prefix = architecture.prefix
    return bool(prefix) and (stored.startswith(prefix) or name.partition(".")[0] in BODY)


# What the parts of bodies are called at the top.
_BODY = (
    "embeddings encoder decoder layers layer pooler embed_tokens norm final_layernorm h wte wpe ln_f layernorm shared"
)
BODY = frozenset(_BODY.split())


def _kind(architecture: Architecture, name: str, shape: tuple[int, ...]) -> Kind:
    module, _, parameter = name.rpartition(".")
    last = module.rpartition(".")[2]
    if last in architecture.embeddings and parameter == "weight":
        return "embedding"
    if last in architecture.conv1d:
        return "conv1d"
    if "norm" in last.lower() or last.startswith("ln_"):
        return "norm"
    if parameter not in ("weight", "bias"):
        return "other"
    return "convolution" if len(shape) > 2 else "linear"
