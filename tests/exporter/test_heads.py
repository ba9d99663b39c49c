"""Which dense model an adapter was trained in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporter.bundle.records import MODEL, Head
from exporter.heads import head_of, heads_of, is_of_head
from lora.adapter import Adapter, LowRank, Replacement, Rows
from lora.errors import ExportError

LANGUAGE = {"architectures": ["LlamaForCausalLM"], "vocab_size": 96}


def adapter_with(task_type: str | None = "SEQ_CLS", *changes, **saved: tuple[int, ...]) -> Adapter:
    replacements = tuple(
        Replacement(name.replace("__", "."), np.zeros(shape, np.float32)) for name, shape in saved.items()
    )
    return Adapter(Path("adapter"), "PEFT", (), "0", (*changes, *replacements), task_type)


@pytest.fixture
def base(tmp_path: Path):
    """A folder with the configuration given."""

    def write(**config: object) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def low_rank(module: str) -> LowRank:
    return LowRank(module, np.zeros((2, 8), np.float32), np.zeros((8, 2), np.float32), 2, 1.0)


@pytest.mark.parametrize(
    ("saved", "outputs"),
    [
        ({"classifier__weight": (2, 8), "classifier__bias": (2,)}, 2),
        ({"classifier__dense__weight": (8, 8), "classifier__out_proj__weight": (5, 8)}, 5),
        ({"score__weight": (1, 8)}, 1),
    ],
    ids=["BERT", "RoBERTa", "Llama, a regression"],
)
def test_the_head_has_as_many_outputs_as_its_last_layer_has_rows(base, saved: dict[str, tuple[int, ...]], outputs: int):
    assert head_of(adapter_with(**saved), base()) == Head("SEQ_CLS", outputs)


@pytest.mark.parametrize(
    ("config", "outputs"),
    [({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3), ({"num_labels": 4}, 4), ({}, 2)],
    ids=["labels", "their number", "neither"],
)
def test_an_adapter_without_a_head_has_the_bases_own(base, config: dict[str, object], outputs: int):
    assert head_of(adapter_with(classifier__bias=(2,)), base(**config)) == Head("SEQ_CLS", outputs)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForQuestionAnswering", "QUESTION_ANS"),
        ("LlamaForCausalLM", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("ViTForImageClassification", "IMAGE_CLS"),
        ("BertModel", "FEATURE_EXTRACTION"),
    ],
)
def test_the_bases_architecture_says_the_task_type_that_an_adapter_leaves_open(base, architecture: str, expected: str):
    config = base(architectures=[architecture], vocab_size=96, hidden_size=8)
    assert head_of(adapter_with(None), config).task_type == expected


def test_whisper_is_exported_as_an_encoder(base):
    config = base(architectures=["WhisperForConditionalGeneration"], model_type="whisper", vocab_size=96, d_model=32)
    assert head_of(adapter_with(None), config) == Head("FEATURE_EXTRACTION", 32)


def test_what_whisper_was_trained_in_does_not_change_that(base):
    config = base(architectures=["WhisperForConditionalGeneration"], model_type="whisper", vocab_size=96, d_model=32)
    assert head_of(adapter_with("SEQ_2_SEQ_LM"), config) == Head("FEATURE_EXTRACTION", 32)


def test_an_adapter_of_the_part_that_is_not_exported_is_refused(base):
    module = "model.decoder.layers.0.encoder_attn.q_proj"
    config = base(model_type="whisper", d_model=32)
    said = (
        f"adapter: changes '{module}', but of a whisper model the encoder alone is exported; train one of the encoder"
    )
    with pytest.raises(ExportError) as refused:
        head_of(adapter_with(None, low_rank(module)), config)
    assert str(refused.value) == said
    sound = low_rank(module.replace("decoder", "encoder"))
    assert head_of(adapter_with(None, sound), config).task_type == "FEATURE_EXTRACTION"


TEXT = low_rank("text_model.encoder.layers.0.self_attn.q_proj")
VISION = low_rank("vision_model.encoder.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ([TEXT], {"text", "vision"}),
        ([TEXT, VISION], {"text", "vision"}),
        ([low_rank("text_projection")], {"text", "vision"}),
        ([VISION], {MODEL}),
        ([low_rank("visual_projection")], {MODEL}),
        ([], {MODEL}),
    ],
    ids=["text", "both", "the text's projection", "vision", "the image's projection", "neither"],
)
def test_a_model_of_two_towers_has_both_as_parts_where_the_text_is_changed(
    base, changes: list[LowRank], roles: set[str]
):
    heads = heads_of(adapter_with(None, *changes), base(model_type="clip", projection_dim=32))
    assert heads == dict.fromkeys(roles, Head("FEATURE_EXTRACTION", 32))


def test_any_other_model_has_one_part(base):
    config = base(architectures=["BertModel"], model_type="bert", hidden_size=8)
    assert heads_of(adapter_with(None, TEXT), config) == {MODEL: Head("FEATURE_EXTRACTION", 8)}


def test_the_users_word_comes_first_then_the_adapters(base):
    config = base(**LANGUAGE)
    assert head_of(adapter_with("SEQ_CLS"), config, "CAUSAL_LM").task_type == "CAUSAL_LM"
    assert head_of(adapter_with("SEQ_CLS"), config).task_type == "SEQ_CLS"


@pytest.mark.parametrize(("adapters", "users"), [("NO_SUCH", None), ("SEQ_CLS", "NO_SUCH")])
def test_an_unknown_task_type_is_refused_with_those_that_are_known(base, adapters: str, users: str | None):
    with pytest.raises(
        ExportError, match=r"\Aadapter: task_type 'NO_SUCH' can't be exported; expected one of SEQ_CLS, [^\n]*\Z"
    ):
        head_of(adapter_with(adapters), base(), users)


def test_a_language_model_of_unknown_vocabulary_is_refused(base):
    with pytest.raises(ExportError, match=r"config\.json: says neither vocabulary nor width"):
        head_of(adapter_with("CAUSAL_LM"), base(architectures=["LlamaForCausalLM"]))


@pytest.mark.parametrize(
    "change",
    [low_rank("lm_head"), low_rank("model.embed_tokens"), Replacement("lm_head.weight", np.zeros((96, 8), np.float32))],
    ids=["an update of the output embedding", "of the input's", "a saved output embedding"],
)
def test_a_change_of_one_of_two_tied_embeddings_unties_them(base, change):
    assert head_of(adapter_with("CAUSAL_LM", change), base(**LANGUAGE)) == Head("CAUSAL_LM", 96, tied=False)
    assert head_of(adapter_with("CAUSAL_LM", change), base(**LANGUAGE, tie_word_embeddings=False)).tied


def test_other_changes_and_trained_tokens_leave_them_tied(base):
    rows = Rows("model.embed_tokens", (3,), np.zeros((1, 8), np.float32))
    assert head_of(adapter_with("CAUSAL_LM", low_rank("model.layers.0.self_attn.q_proj"), rows), base(**LANGUAGE)).tied


def test_only_the_last_layer_is_the_heads(base):
    assert [
        name
        for name in ("classifier.weight", "classifier.out_proj.bias", "bert.score.weight", "classifier.dense.weight")
        if is_of_head(name)
    ] == [
        "classifier.weight",
        "classifier.out_proj.bias",
        "bert.score.weight",
    ]
