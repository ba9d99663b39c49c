"""Optimization profiles, as they are given on the command line and where they are not."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.backends import AxisRange
from engines.building.profiles import default_profiles, given_profile
from exporter.bundle.records import MODEL, Base, Graph, Head, Port
from lora.errors import EngineError

ENCODER = Graph(
    MODEL,
    Head("SEQ_CLS", 2),
    tuple(Port(name, "int64", ("batch", "sequence")) for name in ("attention_mask", "input_ids")),
    (),
    {},
)
DECODER = Graph(
    MODEL,
    Head("CAUSAL_LM", 96),
    (
        Port("input_ids", "int64", ("batch", "sequence")),
        Port("attention_mask", "int64", ("batch", "total_sequence")),
        Port("past_key_values.0.key", "float16", ("batch", 4, "past_sequence", 16)),
    ),
    (),
    {},
)
BASE = Base(sha256="0", precision="float32", longest=64, vocabulary=96, weights=(), files=())
DEFAULT = {"batch": AxisRange(1, 1, 8), "sequence": AxisRange(1, 64, 64)}


def test_the_issues_example():
    assert given_profile(["input_ids=1x16,1x128,8x512"], ENCODER, DEFAULT) == {
        "batch": AxisRange(1, 1, 8),
        "sequence": AxisRange(16, 128, 512),
    }


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=2, max_size=2))
def test_axes_are_those_of_the_inputs_shape_in_order(sizes: list[list[int]]):
    text = "input_ids=" + ",".join(f"{batch}x{length}" for batch, length in zip(*sizes, strict=True))
    assert given_profile([text], ENCODER, DEFAULT) == {
        axis: AxisRange(*size) for axis, size in zip(("batch", "sequence"), sizes, strict=True)
    }


def test_two_inputs_may_say_the_same_and_an_axis_that_none_names_has_the_default():
    texts = ["past_key_values.0.key=1x4x0x16,1x4x8x16,2x4x32x16", "input_ids=1x1,1x1,2x1"]
    axes = given_profile(texts, DECODER, default_profiles(DECODER, BASE)[0])
    assert (axes["batch"], axes["past_sequence"], axes["sequence"]) == (
        AxisRange(1, 1, 2),
        AxisRange(0, 8, 32),
        AxisRange(1, 1, 1),
    )
    assert axes["total_sequence"] == AxisRange(1, 9, 33)  # what the mask covers follows from both


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["input_ids"], "expected INPUT=SMALLEST,TYPICAL,LARGEST, such as input_ids=1x16,1x128,8x512"),
        (["input_ids=1x16,1x128"], "expected INPUT=SMALLEST,TYPICAL,LARGEST"),
        (["input_ids=1x-1,1x1,1x1"], "expected INPUT=SMALLEST,TYPICAL,LARGEST"),
        (["input_ids=1x²,1x1,1x1"], "expected INPUT=SMALLEST,TYPICAL,LARGEST"),
        (["pixels=1x1,1x1,1x1"], "no input 'pixels'; the model has attention_mask, input_ids, past_key_values.0.key"),
        (["input_ids=1,1,8"], "input 'input_ids' has rank 2 (batch, sequence); expected INPUT="),
        (["input_ids=1x8,1x4,1x9"], "axis 'sequence' is given 8, 4, 9; expected smallest ≤ typical ≤ largest"),
        (["input_ids=2x1,2x2,1x3"], "axis 'batch' is given 2, 2, 1; expected smallest ≤ typical ≤ largest"),
        (
            ["past_key_values.0.key=1x4x0x16,1x4x8x16,2x5x32x16"],
            "an axis of input 'past_key_values.0.key' is always 4; give 4 in all three shapes",
        ),
        (
            ["input_ids=1x1,1x1,1x1", "attention_mask=2x1,2x1,2x1"],
            "axis 'batch' is given 2, 2, 2 here and 1, 1, 1 by another input",
        ),
    ],
)
def test_what_is_wrong_is_said_with_the_text(texts: list[str], said: str):
    with pytest.raises(EngineError) as refused:
        given_profile(texts, DECODER, default_profiles(DECODER, BASE)[0])
    assert str(refused.value).startswith(f"--profile '{texts[-1]}': {said}")


def test_defaults_stay_within_what_the_base_takes():
    assert default_profiles(ENCODER, BASE)[0]["sequence"] == AxisRange(1, 64, 64)
    assert default_profiles(ENCODER, msgspec.structs.replace(BASE, longest=4096))[0]["sequence"] == AxisRange(
        1, 128, 512
    )
    assert default_profiles(ENCODER, msgspec.structs.replace(BASE, longest=0))[0]["sequence"] == AxisRange(1, 128, 512)


def test_a_decoder_has_a_profile_for_the_prompt_and_a_narrower_one_for_the_next_token():
    prompt, step = default_profiles(DECODER, BASE)
    assert (prompt["sequence"], prompt["past_sequence"]) == (AxisRange(1, 64, 64), AxisRange(0, 0, 64))
    assert (step["sequence"], step["past_sequence"], step["total_sequence"]) == (
        AxisRange(1, 1, 1),
        AxisRange(0, 64, 64),
        AxisRange(1, 65, 65),
    )
