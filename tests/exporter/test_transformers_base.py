"""The base model, through transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from engines import load
from exporter.bundle.records import Head
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from exporter.transformers_base import base_weights, input_limits, known_config, skeleton
from lora.errors import ExportError

TWO = Head("SEQ_CLS", 2)
HEAD = ("classifier.weight", "classifier.bias")


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_base`` that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def configured(base: Path, **changes: object) -> Path:
    config = json.loads((base / "config.json").read_bytes()) | changes
    (base / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return base


def test_the_skeleton_is_a_float32_model_with_the_head_in_evaluation_mode(base: Path):
    model = skeleton(configured(base, dtype="float16"), Head("SEQ_CLS", 5))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.classifier.weight.shape[0] == 5
    assert not model.training


def test_base_weights_are_the_checkpoints_under_the_models_names_without_the_head(base: Path):
    weights = base_weights(base, TWO, replaced=HEAD)
    stored = load_file(base / "model.safetensors")
    assert weights.keys() == {f"bert.{name}" for name in stored}
    for name, values in stored.items():
        np.testing.assert_array_equal(weights[f"bert.{name}"], values)


def test_base_weights_are_float32_whatever_the_checkpoint_holds(base: Path):
    half = {name: values.astype(np.float16) for name, values in load_file(base / "model.safetensors").items()}
    save_file(half, base / "model.safetensors", {"format": "pt"})
    weights = base_weights(base, TWO, replaced=HEAD)
    assert {values.dtype for values in weights.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(weights["bert.pooler.dense.weight"], half["pooler.dense.weight"].astype(np.float32))


@pytest.mark.parametrize("outputs", [2, 3], ids=["of the same size", "of another size"])
def test_a_head_that_the_base_came_with_is_left_out_where_the_adapter_replaces_it(base: Path, outputs: int):
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    model.save_pretrained(base)
    assert not set(base_weights(base, Head("SEQ_CLS", outputs), replaced=HEAD)) & set(HEAD)


def test_a_replaced_bias_of_the_encoder_stays_a_base_weight(base: Path):
    bias = "bert.pooler.dense.bias"
    assert bias in base_weights(base, TWO, replaced=(*HEAD, bias))


@pytest.mark.parametrize(
    ("replaced", "absent"),
    [(("classifier.weight",), "classifier.bias"), (HEAD, "bert.pooler.dense.weight")],
    ids=["half a head", "a weight that the checkpoint lacks"],
)
def test_a_weight_that_would_stay_random_is_refused_by_name(base: Path, replaced: tuple[str, ...], absent: str):
    tensors = load_file(base / "model.safetensors")
    tensors.pop(absent.removeprefix("bert."), None)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ExportError, match=f"'{absent}' is neither in the base nor in the adapter, so it would be random"
    ):
        base_weights(base, TWO, replaced)


def test_a_weight_of_another_shape_than_the_config_says_is_refused(base: Path):
    with pytest.raises(ExportError, match=r"'bert\.encoder.*' is neither in the base nor in the adapter"):
        base_weights(configured(base, intermediate_size=16), TWO, HEAD)


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        ({"model_max_length": 62}, 62),
        ({"model_max_length": 10**30}, 64),
        ({"model_max_length": 1e30}, 64),
        ({}, 64),
        (None, 64),
    ],
    ids=["below the positions", "huge", "huge float", "not said", "no tokenizer"],
)
def test_the_longest_input_fits_both_positions_and_tokenizer(
    base: Path, tokenizer: dict[str, float] | None, longest: int
):
    (base / "tokenizer_config.json").unlink()
    if tokenizer is not None:
        (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert input_limits(base, known_config(base)) == (longest, 30522)


SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 34,
}
COUNTED = {
    "Roberta": transformers.RobertaConfig(**SHAPE),
    "Roberta that pads with 3": transformers.RobertaConfig(**SHAPE, pad_token_id=3),
    "MPNet": transformers.MPNetConfig(**SHAPE),
    "XLM-Roberta": transformers.XLMRobertaConfig(**SHAPE),
}


@pytest.mark.parametrize("said", [None, 10**30, 20], ids=["not said", "huge", "below the positions"])
@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_positions_that_start_after_the_padding_id_leave_fewer_tokens(
    config: transformers.PreTrainedConfig, said: int | None, tmp_path: Path
):
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "base")
    if said is not None:
        (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
    taken = max(length for length in range(1, 35) if takes(model, length))
    assert taken == 34 - config.pad_token_id - 1
    assert input_limits(tmp_path / "base", known_config(tmp_path / "base")) == (min(taken, said or taken), 50)


@pytest.mark.parametrize("name", ["Roberta", "MPNet"])
def test_the_exported_graph_takes_the_longest_input(name: str, tmp_path: Path):
    transformers.AutoModelForSequenceClassification.from_config(COUNTED[name]).save_pretrained(tmp_path / "base")
    bundle = export_task(Request(tmp_path / "base", None, "unadapted"), tmp_path / "bundle").bundle
    longest = bundle.manifest.base.longest
    assert longest == 32
    row = np.full((1, longest), 5)
    known = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
    with load(bundle.path, "unadapted", threads=1) as session:
        logits = session.run({port.name: known[port.name] for port in task_part(bundle, "unadapted").graph.inputs})[
            "logits"
        ]
    assert np.isfinite(logits).all()


def takes(model: torch.nn.Module, length: int) -> bool:
    try:
        model(torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("content", ["{", "[]", '{"model_max_length": "x"}', '{"model_max_length": [1]}'])
def test_a_tokenizer_config_that_makes_no_sense_is_refused(base: Path, content: str):
    (base / "tokenizer_config.json").write_text(content)
    with pytest.raises(ExportError, match=r"base: config\.json or tokenizer_config\.json"):
        input_limits(base, known_config(base))


def test_a_model_of_images_takes_no_tokens(base: Path):
    vision_model(base)
    assert input_limits(base, known_config(base))[1] == 0


CONFIGS = {
    "not JSON": "{",
    "not an object": "[]",
    "no model type": "{}",
    "unknown model type": '{"model_type": "no-such-model"}',
    "a wrong type": '{"model_type": "bert", "hidden_size": "x"}',
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_transformers_does_not_know_is_refused_in_one_line(base: Path, content: str):
    (base / "config.json").write_text(content)
    with pytest.raises(ExportError, match=r"\A[^\n]*config\.json: not a model that transformers knows [^\n]*\Z"):
        known_config(base)


def test_a_base_without_config_is_refused(base: Path):
    (base / "config.json").unlink()
    with pytest.raises(ExportError, match=r"config\.json: not a model that transformers knows"):
        known_config(base)


def vision_model(base: Path) -> None:
    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(base)


@pytest.mark.parametrize(
    "change",
    [vision_model, lambda base: configured(base, hidden_size=30)],
    ids=["not for text", "sizes that do not divide"],
)
def test_a_model_that_can_not_have_the_head_is_refused_in_one_line(base: Path, change: Callable[[Path], object]):
    change(base)
    with pytest.raises(
        ExportError, match=r"\A[^\n]*base: transformers [\d.]+ can't make a SEQ_CLS model of this base [^\n]*\Z"
    ):
        skeleton(base, TWO)


def test_a_checkpoint_that_transformers_can_not_load_is_refused_in_one_line(base: Path):
    (base / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ExportError, match=r"\A[^\n]*base: transformers [\d.]+ can't load this base [^\n]*\Z"):
        base_weights(base, TWO, HEAD)
