"""Text in, predictions out: the base's own tokenizer, and a softmax that does not overflow."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from engines.feeds.text import Prediction, TextEncoder, predictions
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import File, encode
from exporter.bundle.task_part import task_part
from lora.errors import BundleError, EngineError

TEXTS = {
    "plain": ["A moving, funny film."],
    "of several lengths": [
        "Short.",
        "A rather longer sentence, of more words than the other one has.",
        "Of middling length.",
    ],
    "empty": [""],
    "empty among others": ["", "not empty"],
    "blank": ["   \t\n "],
    "accents": ["Crème brûlée à la façon de Zoë — naïve Ångström"],
    "decomposed accents": ["Cre\u0300me bru\u0302le\u0301e"],
    "chinese and japanese": ["这部电影很好看。", "映画はとても面白かった"],
    "cyrillic, arabic, hindi": ["Все счастливые семьи", "كان فيلما جميلا", "यह एक अच्छी फिल्म है"],
    "emoji": ["👍🏽👩‍👩‍👧 loved it 🎬!!!"],
    "special tokens": ["[CLS] spelled [SEP] out [MASK] [PAD] [UNK]"],
    "control characters": ["null \0 bell \a zero-width \u200b replacement \ufffd"],
    "longer than the limit": ["word " * 600],
    "one endless word": ["a" * 3000],
    "longer than the limit among others": ["It was the best of times. " * 120, "Brief."],
}


@pytest.fixture(scope="module")
def encoder(real_bundle: Bundle) -> TextEncoder:
    return TextEncoder(real_bundle)


@pytest.fixture(scope="module")
def reference(real_base: Path) -> Any:
    """What the model's own training used; it takes its limit from tokenizer_config.json."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(real_base)
    return lambda texts: dict(tokenizer(texts, padding=True, truncation=True, return_tensors="np"))


def assert_equal_encodings(encoder: TextEncoder, reference: Any, bundle: Bundle, texts: list[str]) -> None:
    expected, found = reference(texts), encoder.encode(texts, task_part(bundle, "movies").graph)
    assert set(found) == set(expected) == {"input_ids", "attention_mask", "token_type_ids"}
    for name, values in found.items():
        assert values.dtype == np.int64
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize("texts", TEXTS.values(), ids=TEXTS.keys())
def test_encodes_as_transformers_does(encoder: TextEncoder, reference: Any, real_bundle: Bundle, texts: list[str]):
    assert_equal_encodings(encoder, reference, real_bundle, texts)


def test_sentences_that_come_with_the_package_are_encoded_as_transformers_does(
    encoder: TextEncoder, reference: Any, real_bundle: Bundle
):
    lines = (
        (Path(__file__).parents[3] / "exporter" / "proof" / "sentences.txt").read_text(encoding="utf-8").splitlines()
    )
    assert_equal_encodings(encoder, reference, real_bundle, lines)


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4))
def test_encodes_any_text_as_transformers_does(
    encoder: TextEncoder, reference: Any, real_bundle: Bundle, texts: list[str]
):
    assert_equal_encodings(encoder, reference, real_bundle, texts)


def test_text_above_the_limit_is_cut_to_it(encoder: TextEncoder, real_bundle: Bundle):
    inputs = encoder.encode(["word " * 600], task_part(real_bundle, "movies").graph)
    assert inputs["input_ids"].shape == (1, real_bundle.manifest.base.longest)


def test_limit_is_the_bases_own(tiny_bundle: Bundle):
    inputs = TextEncoder(tiny_bundle).encode(["word " * 600], task_part(tiny_bundle, "first").graph)
    assert inputs["input_ids"].shape == (1, 64)


def test_only_the_graphs_inputs_are_made(encoder: TextEncoder, real_bundle: Bundle):
    graph = task_part(real_bundle, "movies").graph
    assert list(encoder.encode(["text"], msgspec.structs.replace(graph, inputs=graph.inputs[:2]))) == [
        "input_ids",
        "attention_mask",
    ]


def test_bundle_without_a_tokenizer_is_refused(tiny_bundle: Bundle):
    base = msgspec.structs.replace(tiny_bundle.manifest.base, files=())
    with pytest.raises(BundleError, match=r"came without tokenizer\.json; give token ids"):
        TextEncoder(replace(tiny_bundle, manifest=msgspec.structs.replace(tiny_bundle.manifest, base=base)))


def test_damaged_tokenizer_is_refused(tiny_bundle: Bundle, tmp_path: Path):
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    tokenizer = copy / "base" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b"[UNK]", b"[unk]"))
    with pytest.raises(BundleError, match=r"tokenizer\.json: content does not match"):
        TextEncoder(open_bundle(copy))


def logits(columns: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, st.tuples(st.integers(1, 4), st.just(columns)), elements=st.floats(-1e4, 1e4, width=32))


@given(values=logits(3))
def test_classes_come_with_the_softmax_of_their_logits(values: np.ndarray):
    expected = scipy.special.softmax(values.astype(np.float64), axis=1)
    found = predictions(values, ("a", "b", "c"))
    chosen = [row["abc".index(prediction.label)] for row, prediction in zip(values, found, strict=True)]
    np.testing.assert_allclose(chosen, values.max(axis=1), atol=1e-6)  # classes as close as that may tie
    np.testing.assert_allclose([prediction.score for prediction in found], expected.max(axis=1), rtol=1e-5)


@given(values=logits(1))
def test_regression_gives_the_value_and_no_label(values: np.ndarray):
    assert predictions(values, ()) == [Prediction(None, float(row[0])) for row in values]


def test_a_completion_keeps_the_space_that_it_begins_with():
    """Llama's decoder takes the first space of what it is given away: of a whole text that is none of the text's."""
    tokenizer = Tokenizer(WordLevel({"\u2581a": 0, "\u2581sat": 1}, unk_token="\u2581a"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    encoder = TextEncoder.__new__(TextEncoder)
    encoder._tokenizer = tokenizer
    assert encoder.decode([1, 1]) == "sat sat"
    assert encoder.completion([0], [1, 1]) == " sat sat"
    assert encoder.completion([0], []) == ""


def test_a_tokenizer_that_is_none_is_named(tiny_copy: Path, real_base: Path):
    bundle = open_bundle(tiny_copy)
    content = b'{"model": {"type": "NoSuch"}}'
    path = tiny_copy / "base" / "tokenizer.json"
    path.write_bytes(content)
    file = File("base/tokenizer.json", len(content), hashlib.sha256(content).hexdigest())
    base = msgspec.structs.replace(bundle.manifest.base, files=(file,))
    (tiny_copy / "manifest.json").write_bytes(encode(msgspec.structs.replace(bundle.manifest, base=base)))
    with pytest.raises(BundleError) as refused:
        TextEncoder(open_bundle(tiny_copy))
    assert str(refused.value).startswith(f"{path}: not a tokenizer that can be read (")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_no_numbers_are_refused(value: float):
    with pytest.raises(
        EngineError, match="the outputs of text 2 are not finite: the model overflows; export it in float32 or bfloat16"
    ):
        predictions(np.array([[0.0, 1.0], [value, 0.0]]), ["no", "yes"])
