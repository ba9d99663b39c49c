"""Greedy generation on an engine, against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import load
from engines.backends import Session
from engines.feeds.generate import check_generates, greedy, stop_tokens
from engines.feeds.text import positions
from exporter.bundle.manifest import Bundle
from exporter.bundle.staging import describe
from exporter.bundle.task_part import task_part
from exporter.task import Request, export_task
from lora.errors import EngineError
from lora.files.tensorfile import Array

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}
LENGTHS = (7, 3, 5)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, initializer_range=0.5)
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def bundle(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(folder / "adapter")
    wrapped.unload()
    export_task(Request(folder / "base", None, "unadapted"), folder / "bundle")
    return export_task(Request(folder / "base", folder / "adapter", "adapted"), folder / "bundle").bundle


@pytest.fixture(scope="module")
def session(bundle: Bundle):
    with load(bundle.path, "unadapted", threads=1) as opened:
        yield opened


def prompts() -> dict[str, Array]:
    """Three prompts of different lengths, padded on the left."""
    random = np.random.default_rng(1)
    ids, mask = np.zeros((3, max(LENGTHS)), np.int64), np.zeros((3, max(LENGTHS)), np.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:], mask[row, -length:] = random.integers(3, 96, length), 1
    cache = {
        f"past_key_values.{layer}.{part}": np.zeros((3, 2, 0, 16), np.float32)
        for layer in range(2)
        for part in ("key", "value")
    }
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), **cache}


def reference(model: Any, inputs: dict[str, Array], tokens: int) -> list[list[int]]:
    ids, mask = (torch.from_numpy(inputs[name]) for name in ("input_ids", "attention_mask"))
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0)[
        :, ids.shape[1] :
    ].tolist()


def test_a_batch_of_prompts_gets_the_tokens_that_transformers_gives(model: Any, session: Session):
    made = greedy(session, prompts(), 12)
    assert made == reference(model, prompts(), 12)
    assert len({token for row in made for token in row}) > 8, "the model says the same thing whatever it is asked"


def test_the_adapted_model_says_what_pefts_merged_one_says(model: Any, bundle: Bundle, session: Session):
    merged = peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(bundle.path.parent / "base"), bundle.path.parent / "adapter"
    )
    merged = merged.merge_and_unload()
    merged.generation_config.eos_token_id = None
    with load(bundle.path, "adapted", threads=1) as adapted:
        made = greedy(adapted, prompts(), 12)
    assert made == reference(merged, prompts(), 12)
    assert made != greedy(session, prompts(), 12)


def test_a_row_ends_before_its_first_stop_token_and_others_go_on(session: Session):
    whole = greedy(session, prompts(), 12)
    stop = whole[1][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert greedy(session, prompts(), 12, frozenset({stop})) == expected
    assert len(expected[1]) <= 4


def test_generation_ends_when_every_row_has(session: Session):
    calls = []

    class Counting:
        def run(self, inputs):
            calls.append(inputs["input_ids"].shape)
            return session.run(inputs)

    everything = frozenset(range(96))
    assert greedy(Counting(), prompts(), 12, everything) == [[], [], []]  # type: ignore[arg-type]
    assert calls == [(3, max(LENGTHS))]


def test_inputs_that_the_engine_does_not_take_are_refused(session: Session):
    inputs = prompts()
    del inputs["position_ids"]
    with pytest.raises(EngineError, match="position_ids"):
        greedy(session, inputs, 2)


def test_a_classifier_generates_nothing(tiny_bundle: Bundle):
    with pytest.raises(EngineError, match=r"task 'first' is of type SEQ_CLS and generates no tokens"):
        check_generates(task_part(tiny_bundle, "first"))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [({"eos_token_id": [5, 7]}, 2, {5, 7}), ({"eos_token_id": 0}, 2, {0}), (None, 2, {2}), (None, None, set())],
    ids=["several", "token 0", "of the configuration", "of neither"],
)
def test_the_stop_tokens_are_the_generation_configs_or_the_configs(
    bundle: Bundle, tmp_path: Path, generation: dict | None, config: int | None, expected: set[int]
):
    (tmp_path / "base").mkdir()
    for name, content in (("generation_config.json", generation), ("config.json", {"eos_token_id": config})):
        if content is not None:
            (tmp_path / "base" / name).write_text(json.dumps(content))
    files = tuple(describe(tmp_path, f"base/{file.name}") for file in sorted((tmp_path / "base").iterdir()))
    base = msgspec.structs.replace(bundle.manifest.base, files=files)
    assert stop_tokens(Bundle(tmp_path, msgspec.structs.replace(bundle.manifest, base=base))) == expected


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_positions_count_the_tokens_of_a_row_whatever_side_the_padding_is_on(lengths: list[int]):
    left, right = np.zeros((len(lengths), 9), np.int64), np.zeros((len(lengths), 9), np.int64)
    for row, length in enumerate(lengths):
        left[row, 9 - length :], right[row, :length] = 1, 1
        assert (
            positions(left)[row, 9 - length :].tolist()
            == positions(right)[row, :length].tolist()
            == list(range(length))
        )
