"""Tiny models of every architecture that is exported: a random base, PEFT adapters of it, and both called as a user
calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import peft
import torch
import transformers

from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL
from exporter.task import Exported, Request, export_task
from lora.files.tensorfile import Array

VOCABULARY, LABELS = 96, 3
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **WIDTH}
IMAGE = {"image_size": 32, "patch_size": 8, **WIDTH}
DECODER = {
    **TEXT,
    "hidden_size": 64,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

# (batch, length, past): the smallest; a batch; longer than what is traced, and than DeBERTa's and T5's exact distances;
# a batch with a longer past than itself.
SHAPES = [(1, 1, 0), (2, 7, 0), (1, 24, 4), (3, 5, 9)]
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Architecture:
    """A base of class ``saved`` and an adapter that was trained in the class ``trained``, on ``targets`` and the new
    modules ``head``.

    ``task_type`` is what the adapter says; ``asked`` what the user says.
    """

    name: str
    config: transformers.PreTrainedConfig
    saved: str
    trained: str
    targets: list[str] | str
    task_type: str | None = None
    asked: str | None = None
    head: tuple[str, ...] = ()
    labels: int | None = None
    outputs: tuple[str, ...] = ("logits",)
    inner: str = ""  # the path of the exported model in the trained one
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def _bert(kind: str, trained: str, **changes: Any) -> Architecture:
    return Architecture(
        f"BERT {kind}", transformers.BertConfig(**TEXT), "BertModel", trained, ["query", "value"], kind, **changes
    )


def _decoder(name: str, config: transformers.PreTrainedConfig) -> Architecture:
    return Architecture(name, config, f"{name}ForCausalLM", f"{name}ForCausalLM", ["q_proj", "v_proj"], "CAUSAL_LM")


def _classifier(
    name: str,
    config: transformers.PreTrainedConfig,
    targets: list[str],
    head: tuple[str, ...],
    saved: str | None = None,
) -> Architecture:
    trained = f"{name}ForSequenceClassification"
    return Architecture(
        f"{name} SEQ_CLS", config, saved or f"{name}Model", trained, targets, "SEQ_CLS", head=head, labels=LABELS
    )


ARCHITECTURES = {
    made.name: made
    for made in [
        _bert("SEQ_CLS", "BertForSequenceClassification", head=("classifier",), labels=LABELS),
        Architecture(
            "BERT regression",
            transformers.BertConfig(**TEXT),
            "BertModel",
            "BertForSequenceClassification",
            ["query", "value"],
            "SEQ_CLS",
            head=("classifier",),
            labels=1,
        ),
        _bert("TOKEN_CLS", "BertForTokenClassification", head=("classifier",), labels=LABELS),
        _bert("QUESTION_ANS", "BertForQuestionAnswering", head=("qa_outputs",), outputs=("start_logits", "end_logits")),
        _bert("FEATURE_EXTRACTION", "BertModel", outputs=("last_hidden_state",)),
        _classifier(
            "Roberta", transformers.RobertaConfig(**TEXT, type_vocab_size=1), ["query", "value"], ("classifier",)
        ),
        _classifier(
            "DistilBert",
            transformers.DistilBertConfig(**DISTILBERT),
            ["q_lin", "v_lin"],
            ("pre_classifier", "classifier"),
        ),
        _classifier(
            "DebertaV2",
            transformers.DebertaV2Config(**TEXT, **DEBERTA, type_vocab_size=0, position_biased_input=False),
            ["query_proj", "value_proj"],
            ("pooler", "classifier"),
        ),
        Architecture(
            "GPT2",
            transformers.GPT2Config(**GPT2),
            "GPT2LMHeadModel",
            "GPT2LMHeadModel",
            ["c_attn", "attn.c_proj"],
            "CAUSAL_LM",
            settings={"fan_in_fan_out": True},
        ),
        _decoder("Llama", transformers.LlamaConfig(**DECODER)),
        _classifier(
            "Llama", transformers.LlamaConfig(**DECODER), ["q_proj", "v_proj"], ("score",), saved="LlamaForCausalLM"
        ),
        _decoder("Qwen2", transformers.Qwen2Config(**DECODER)),
        _decoder("Qwen3", transformers.Qwen3Config(**DECODER, head_dim=16)),
        Architecture(
            "T5",
            transformers.T5Config(**T5),
            "T5ForConditionalGeneration",
            "T5ForConditionalGeneration",
            ["q", "v"],
            "SEQ_2_SEQ_LM",
        ),
        Architecture(
            "ViT",
            transformers.ViTConfig(**IMAGE),
            "ViTModel",
            "ViTForImageClassification",
            ["q_proj", "v_proj"],
            asked="IMAGE_CLS",
            head=("classifier",),
            labels=LABELS,
        ),
        Architecture(
            "CLIP vision",
            transformers.CLIPConfig(
                vision_config=dict(IMAGE, projection_dim=16),
                text_config=dict(TEXT, projection_dim=16),
                projection_dim=16,
            ),
            "CLIPModel",
            "CLIPModel",
            r"vision_model\..*\.[qv]_proj",
            outputs=("image_embeds", "last_hidden_state"),
        ),
        Architecture(
            "Whisper encoder",
            transformers.WhisperConfig(**WHISPER),
            "WhisperForConditionalGeneration",
            "WhisperForConditionalGeneration",
            r"model\.encoder\..*\.[qv]_proj",
            outputs=("last_hidden_state",),
            inner="model.",
        ),
    ]
}


def save_base(
    architecture: Architecture,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    change: Callable[[Any], object] = lambda model: None,
) -> Path:
    """Write the base in ``dtype``, after ``change``, with no bias of zeros and no norm of ones: a bias in the wrong
    place shows.
    """
    torch.manual_seed(0)
    model = getattr(transformers, architecture.saved)(architecture.config)
    _disturb(model.parameters())
    with torch.no_grad():
        change(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_base(architecture: Architecture, base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The dense model in which an adapter is trained; its head is random."""
    labels = {} if architecture.labels is None else {"num_labels": architecture.labels}
    return getattr(transformers, architecture.trained).from_pretrained(base, dtype=dtype, **labels).eval()


def save_adapter(architecture: Architecture, base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """Write an adapter as PEFT does, none of its tensors zero."""
    torch.manual_seed(seed)
    given = {
        "target_modules": architecture.targets,
        "modules_to_save": list(architecture.head) or None,
        **architecture.settings,
        **settings,
    }
    model = peft.get_peft_model(
        load_base(architecture, base), peft.LoraConfig(task_type=architecture.task_type, r=4, lora_alpha=8, **given)
    )
    _disturb(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(architecture: Architecture, base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with the adapter merged in float32, then in ``dtype``."""
    return peft.PeftModel.from_pretrained(load_base(architecture, base), adapter).merge_and_unload().to(dtype).eval()


def unmerged(architecture: Architecture, base: Path, adapter: Path) -> Any:
    """transformers' model with PEFT's layers in it, as it was trained."""
    return peft.PeftModel.from_pretrained(load_base(architecture, base), adapter).eval().base_model.model


def export(
    architecture: Architecture, base: Path, adapter: Path | None, task: str, out: Path, **changes: Any
) -> Exported:
    return export_task(Request(base, adapter, task, task_type=architecture.asked, **changes), out)


def model_path(bundle: Bundle, task: str) -> Path:
    return bundle.path / bundle.task(task).parts[MODEL].model.path


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """ONNX Runtime as anyone opens it, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Call:
    """The same call twice: what a graph is fed, and what the torch model answers under the graph's names of outputs."""

    feed: dict[str, Array]
    expected: dict[str, Array]


def call(architecture: Architecture, model: Any, names: Iterable[str], shape: Shape, seed: int = 0) -> Call:
    """Call ``model`` at ``shape`` with random inputs of the given names; the last row of an encoder's batch ends in
    padding.
    """
    inputs = _inputs(model, set(names), shape, seed)
    with torch.no_grad():
        if architecture.task_type == "CAUSAL_LM":
            return _call_decoder(model, inputs, shape)
        answer = answers(architecture, model, inputs)
    return Call(
        {name: as_array(values) for name, values in inputs.items()},
        {name: as_array(values) for name, values in answer.items()},
    )


def answers(architecture: Architecture, model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of the exported part of ``model``, as its user has them."""
    given = {name: values.to(model.dtype) if values.is_floating_point() else values for name, values in inputs.items()}
    if architecture.saved == "CLIPModel":
        image = model.get_image_features(**given)
        return {"image_embeds": image.pooler_output, "last_hidden_state": image.last_hidden_state}
    answer = model.get_encoder()(**given) if architecture.inner else model(**given)
    return {name: answer[name] for name in architecture.outputs}


def worst_differences(got: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """By output, the largest difference as a share of the largest value."""
    assert got.keys() == expected.keys()
    wide = {
        name: (np.asarray(got[name], np.float64), np.asarray(values, np.float64)) for name, values in expected.items()
    }
    assert {name: given.shape for name, (given, _) in wide.items()} == {
        name: wanted.shape for name, (_, wanted) in wide.items()
    }
    return {name: float(np.abs(given - wanted).max() / np.abs(wanted).max()) for name, (given, wanted) in wide.items()}


def as_array(values: torch.Tensor) -> Array:
    """In numpy; bfloat16 as ml_dtypes has it."""
    values = values.detach().contiguous()
    return (
        values.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if values.dtype == torch.bfloat16 else values.numpy()
    )


def _disturb(parameters: Iterable[torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn_like(parameter)


def _inputs(model: Any, names: set[str], shape: Shape, seed: int) -> dict[str, torch.Tensor]:
    batch, length, past = shape
    random = torch.Generator().manual_seed(seed + 1000 * length)
    config = model.config
    if "pixel_values" in names:
        size = getattr(config, "vision_config", config).image_size
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=random)}
    if "input_features" in names:
        return {
            "input_features": torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=random)
        }
    ids = torch.randint(3, VOCABULARY, (batch, past + length), generator=random)
    mask = torch.ones_like(ids)
    if not any(name.startswith("past_key_values") for name in names):
        ids, mask = ids[:, :length], mask[:, :length]
        mask[-1, length - length // 4 :] = 0
        ids[mask == 0] = config.pad_token_id or 0
    made = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in names:
        made["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=random)
    if "decoder_input_ids" in names:
        made["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length // 2 + 1), generator=random)
    return made


def _call_decoder(model: Any, inputs: Mapping[str, torch.Tensor], shape: Shape) -> Call:
    """The past is what the torch model has cached of the first tokens; of no tokens it is empty."""
    batch, length, past = shape
    argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = transformers.DynamicCache(config=model.config)
    if past:
        model(inputs["input_ids"][:, :past], **{argument: cache}, use_cache=True)
    config = model.config
    heads, width = getattr(config, "num_key_value_heads", config.num_attention_heads), getattr(config, "head_dim", None)
    empty = torch.zeros(batch, heads, 0, width or config.hidden_size // config.num_attention_heads, dtype=model.dtype)
    feed = {
        "input_ids": inputs["input_ids"][:, past:],
        "attention_mask": inputs["attention_mask"],
        "position_ids": torch.arange(past, past + length).repeat(batch, 1),
    }
    for layer in range(config.num_hidden_layers):
        cached = cache.layers[layer] if past else None
        feed[f"past_key_values.{layer}.key"] = empty if cached is None else cached.keys.clone()
        feed[f"past_key_values.{layer}.value"] = empty if cached is None else cached.values.clone()
    answer = model(feed["input_ids"], attention_mask=feed["attention_mask"], **{argument: cache}, use_cache=True)
    expected = {"logits": answer.logits}
    for index, layer in enumerate(cache.layers):
        expected |= {f"present.{index}.key": layer.keys, f"present.{index}.value": layer.values}
    return Call(
        {name: as_array(values) for name, values in feed.items()},
        {name: as_array(values) for name, values in expected.items()},
    )
