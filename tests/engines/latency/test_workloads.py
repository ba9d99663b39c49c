"""The grid of loads, and what is done of each."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from engines.latency.report import Load
from engines.latency.workloads import loads_of, work_of
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import Graph, Port
from exporter.bundle.task_part import task_part
from lora.errors import EngineError
from lora.files.tensorfile import Array


def decoding(bundle: Bundle) -> Bundle:
    """The bundle, as if its task were a decoder with one layer's cache."""
    part = task_part(bundle, "first")
    cache = Port("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 4))
    mask = Port("attention_mask", "int64", ("batch", "total_sequence"))
    ids, positions = (Port(name, "int64", ("batch", "sequence")) for name in ("input_ids", "position_ids"))
    graph = msgspec.structs.replace(part.graph, inputs=(ids, mask, positions, cache))
    graphs = {**bundle.manifest.graphs, part.part.graph: graph}
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=graphs))


def test_every_batch_meets_every_length(tiny_bundle: Bundle):
    assert loads_of(task_part(tiny_bundle, "first"), [1, 8], [16, 64]) == [
        Load(1, 16),
        Load(1, 64),
        Load(8, 16),
        Load(8, 64),
    ]


def test_a_decoder_also_makes_the_next_token_and_generates(tiny_bundle: Bundle):
    bundle = decoding(tiny_bundle)
    assert loads_of(task_part(bundle, "first"), [2], [16]) == [Load(2, 16), Load(2, 1, past=16)]
    assert loads_of(task_part(bundle, "first"), [2], [16], tokens=5) == [
        Load(2, 16),
        Load(2, 1, past=16),
        Load(2, 16, tokens=5),
    ]


@pytest.mark.parametrize(
    ("length", "tokens", "said"),
    [
        (65, 0, "batch 1, length 65 is more than the 64 tokens"),
        (64, 0, "batch 1, length 1 after 64 is more than the 64 tokens"),
        (60, 5, "batch 1, length 60, then 5 tokens generated is more than the 64 tokens"),
    ],
)
def test_more_tokens_than_the_base_takes_are_refused(tiny_bundle: Bundle, length: int, tokens: int, said: str):
    with pytest.raises(EngineError, match=f"\\A{tiny_bundle.path}: {said} that the base takes\\Z"):
        loads_of(task_part(decoding(tiny_bundle), "first"), [1], [length], tokens)
    assert loads_of(task_part(tiny_bundle, "first"), [1], [64]) == [Load(1, 64)]
    assert loads_of(task_part(decoding(tiny_bundle), "first"), [1], [60], 4)[-1] == Load(1, 60, tokens=4)


def test_pixels_have_a_size_of_their_own_whatever_lengths_are_given(tiny_bundle: Bundle):
    part = task_part(tiny_bundle, "first")
    seen = msgspec.structs.replace(part.graph, inputs=(Port("pixel_values", "float32", ("batch", 3, 8, 8)),))
    bundle = Bundle(tiny_bundle.path, msgspec.structs.replace(tiny_bundle.manifest, graphs={part.part.graph: seen}))
    assert loads_of(task_part(bundle, "first"), [1, 4], [128, 256]) == [Load(1, 128), Load(4, 128)]


def test_tokens_are_not_asked_of_a_classifier(tiny_bundle: Bundle):
    with pytest.raises(
        EngineError, match=r"task 'first' is of type SEQ_CLS and generates no tokens; leave --tokens out\Z"
    ):
        loads_of(task_part(tiny_bundle, "first"), [1], [8], tokens=3)


class Seen:
    """A session that keeps what it is fed, and answers with a cache one longer."""

    def __init__(self) -> None:
        self.fed: list[dict[str, tuple[int, ...]]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.fed.append({name: values.shape for name, values in inputs.items()})
        rows, length = inputs["input_ids"].shape
        cache = inputs.get("past_key_values.0.key", np.zeros((rows, 2, 0, 4)))
        return {
            "logits": np.zeros((rows, length, 7)),
            "present.0.key": np.zeros((rows, 2, cache.shape[2] + length, 4), np.float32),
        }


def graph_of(bundle: Bundle) -> Graph:
    return task_part(bundle, "first").graph


def test_one_run_has_the_loads_sizes(tiny_bundle: Bundle):
    seen = Seen()
    work_of(graph_of(tiny_bundle), 96, Load(3, 5))(seen)
    assert seen.fed == [dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (3, 5))]
    seen = Seen()
    work_of(graph_of(decoding(tiny_bundle)), 96, Load(3, 1, past=5))(seen)
    assert seen.fed == [
        {"input_ids": (3, 1), "attention_mask": (3, 6), "position_ids": (3, 1), "past_key_values.0.key": (3, 2, 5, 4)}
    ]


def test_a_generation_is_the_prompt_and_one_run_a_token(tiny_bundle: Bundle):
    seen = Seen()
    work_of(graph_of(decoding(tiny_bundle)), 96, Load(2, 5, tokens=3))(seen)
    assert [fed["input_ids"] for fed in seen.fed] == [(2, 5), (2, 1), (2, 1)]
    assert [fed["past_key_values.0.key"][2] for fed in seen.fed] == [0, 5, 6]
