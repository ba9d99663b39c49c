"""The structures that are written down, each held against transformers' own model of the same configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tiny_models import GPT2, IMAGE, T5, TEXT, WHISPER

from lora.bases.architectures import ARCHITECTURES, written_down
from lora.bases.checkpoint import Checkpoint, read_config
from lora.bases.structure import BaseStructure
from lora.formats.model_class import ModelClass
from lora.modules.base_structure import structure_by_transformers

DECODER = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {
    "vision_config": dict(IMAGE, projection_dim=16),
    "text_config": dict(TEXT, projection_dim=16),
    "projection_dim": 16,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER),
    "mistral": lambda: transformers.MistralConfig(**DECODER),
    "qwen2": lambda: transformers.Qwen2Config(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**DECODER, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**DECODER, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**DECODER, head_dim=8),
    "phi": lambda: transformers.PhiConfig(**DECODER),
    "phi3": lambda: transformers.Phi3Config(**DECODER),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "bert": lambda: transformers.BertConfig(**TEXT),
    "roberta": lambda: transformers.RobertaConfig(**TEXT),
    "t5": lambda: transformers.T5Config(**T5),
    "vit": lambda: transformers.ViTConfig(**IMAGE),
    "clip": lambda: transformers.CLIPConfig(**CLIP),
    "whisper": lambda: transformers.WhisperConfig(**WHISPER),
}
# The classes that save a base, and the classes in which an adapter of it is trained.
DECODERS = (("ForCausalLM", "Model"), ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model"))
CLASSES = {
    "gemma3_text": (("ForCausalLM", "TextModel"), ("ForCausalLM", "TextForSequenceClassification", "TextModel")),
    "gpt2": (("LMHeadModel", "Model"), ("LMHeadModel", "ForSequenceClassification", "ForTokenClassification")),
    "bert": (
        ("Model", "ForMaskedLM", "ForPreTraining"),
        ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"),
    ),
    "roberta": (("Model", "ForMaskedLM"), ("ForMaskedLM", "ForCausalLM", "ForSequenceClassification", "Model")),
    "t5": (
        ("ForConditionalGeneration",),
        ("ForConditionalGeneration", "EncoderModel", "Model", "ForSequenceClassification"),
    ),
    "vit": (("Model", "ForImageClassification"), ("Model", "ForImageClassification")),
    "clip": (("Model",), ("Model", "VisionModel", "TextModel")),
    "whisper": (("ForConditionalGeneration",), ("ForConditionalGeneration", "Model")),
}
CASES = [
    (kind, saved, trained)
    for kind in CONFIGS
    for saved in CLASSES.get(kind, DECODERS)[0]
    for trained in CLASSES.get(kind, DECODERS)[1]
]


def saved_base(kind: str, ending: str, folder: Path, **changes: object) -> Path:
    config = CONFIGS[kind]()
    for name, value in changes.items():
        setattr(config, name, value)
    getattr(transformers, ARCHITECTURES[kind].stem + ending)(config).save_pretrained(folder)
    return folder


def both(folder: Path, wanted: ModelClass) -> tuple[BaseStructure, BaseStructure]:
    stored = Checkpoint(folder)
    written = written_down(read_config(folder), stored, wanted)
    assert written is not None
    return written, structure_by_transformers(folder, stored, wanted)


def assert_same(written: BaseStructure, theirs: BaseStructure) -> None:
    """The written-down one knows what is stored; of it, it knows as much as transformers does."""
    expected = {name: parameter for name, parameter in theirs.parameters.items() if parameter.stored}
    known = {name: written.parameters.get(name) for name in expected}
    assert {name: known[name] and known[name].stored for name in expected} == {
        name: parameter.stored for name, parameter in expected.items()
    }
    matrices = [name for name, parameter in expected.items() if len(parameter.shape) > 1]
    assert {name: (known[name].kind, known[name].shape) for name in matrices} == {
        name: (expected[name].kind, expected[name].shape) for name in matrices
    }
    assert (written.model, sorted(written.tied), written.flag_unties) == (
        theirs.model,
        sorted(theirs.tied),
        theirs.flag_unties,
    )
    assert written.shared() == theirs.shared()


@pytest.mark.parametrize(("kind", "saved", "trained"), CASES)
def test_what_is_written_down_is_what_transformers_makes(kind: str, saved: str, trained: str, tmp_path: Path):
    stem = ARCHITECTURES[kind].stem
    if not hasattr(transformers, stem + trained):
        pytest.skip(f"transformers has no {stem + trained}")
    folder = saved_base(kind, saved, tmp_path)
    assert_same(*both(folder, ModelClass(name=stem + trained)))


def test_every_architecture_that_is_written_down_is_tested():
    assert set(CONFIGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bert"])
@pytest.mark.parametrize("flag", [True, False])
def test_what_is_tied_follows_the_configuration(kind: str, flag: bool, tmp_path: Path):
    saved = CLASSES.get(kind, DECODERS)[0][0] if kind != "bert" else "ForMaskedLM"
    folder = saved_base(kind, saved, tmp_path, tie_word_embeddings=flag)
    written, theirs = both(folder, ModelClass())
    assert_same(written, theirs)
    assert bool(theirs.tied) is flag


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_task_chooses_the_same_class(kind: str, task: str, tmp_path: Path):
    folder = saved_base(kind, "Model", tmp_path)
    if (kind, task) == ("llama", "QUESTION_ANS"):  # its body is called "transformer" there
        assert written_down(read_config(folder), Checkpoint(folder), ModelClass(task_type=task)) is None
        return
    assert_same(*both(folder, ModelClass(task_type=task)))
