"""Models whose configuration or dtype does not say all: output embeddings of their own, layers kept wide, rows of
padding alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from float32_sums import engines_bound
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    DECODER,
    LABELS,
    SHAPES,
    T5,
    TEXT,
    Architecture,
    call,
    export,
    load_base,
    model_path,
    open_session,
    save_adapter,
    save_base,
    worst_differences,
)

from lora.errors import ExportError

OWN = [
    (
        dataclasses.replace(
            ARCHITECTURES["Llama"], config=transformers.LlamaConfig(**DECODER, tie_word_embeddings=True)
        ),
        "model.embed_tokens.weight",
    ),
    (
        dataclasses.replace(ARCHITECTURES["T5"], config=transformers.T5Config(**T5, tie_word_embeddings=False)),
        "shared.weight",
    ),
]


@pytest.mark.parametrize(("architecture", "embedding"), OWN, ids=["Llama", "T5 1.1"])
def test_a_checkpoint_with_an_output_embedding_of_its_own_keeps_it_whatever_its_config_says(
    architecture: Architecture, embedding: str, tmp_path: Path
):
    base = save_base(architecture, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    own = np.random.default_rng(0).normal(size=tensors[embedding].shape).astype(np.float32)
    save_file({**tensors, "lm_head.weight": own}, base / "model.safetensors", {"format": "pt"})
    bundle = export(architecture, base, None, "unadapted", tmp_path / "bundle").bundle
    session = open_session(model_path(bundle, "unadapted"))
    made = call(architecture, load_base(architecture, base), [value.name for value in session.get_inputs()], SHAPES[1])
    found = worst_differences({"logits": session.run(["logits"], made.feed)[0]}, {"logits": made.expected["logits"]})
    assert found["logits"] <= engines_bound(model_path(bundle, "unadapted"), SHAPES[1][1])


def test_t5_in_float16_keeps_in_float32_what_transformers_does(tmp_path: Path):
    def enlarge(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter *= 3e4

    base = save_base(ARCHITECTURES["T5"], tmp_path / "base", change=enlarge)
    bundle = export(ARCHITECTURES["T5"], base, None, "unadapted", tmp_path / "bundle", precision="float16").bundle
    session = open_session(model_path(bundle, "unadapted"))
    model = load_base(ARCHITECTURES["T5"], base, torch.float16)
    made = call(ARCHITECTURES["T5"], model, [value.name for value in session.get_inputs()], SHAPES[1])
    assert worst_differences({"logits": session.run(["logits"], made.feed)[0]}, made.expected)["logits"] <= 5e-3


def test_a_row_that_is_padded_on_the_left_is_finite_in_float16_however_low_its_scores(tmp_path: Path):
    def lower(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.q_proj.bias += 4
            layer.self_attn.k_proj.bias -= 4

    base = save_base(ARCHITECTURES["Qwen2"], tmp_path / "base", torch.float16, change=lower)
    bundle = export(ARCHITECTURES["Qwen2"], base, None, "unadapted", tmp_path / "bundle", precision="float16").bundle
    ids, mask = np.random.default_rng(0).integers(3, 96, (2, 7)), np.ones((2, 7), np.int64)
    ids[1, :4], mask[1, :4] = 0, 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    cache = {
        f"past_key_values.{layer}.{part}": np.zeros((2, 2, 0, 16), np.float16)
        for layer in range(2)
        for part in ("key", "value")
    }
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
    (logits,) = ReferenceEvaluator(str(model_path(bundle, "unadapted"))).run(["logits"], feed)
    with torch.no_grad():
        given = {name: torch.from_numpy(values) for name, values in feed.items() if name not in cache}
        wanted = load_base(ARCHITECTURES["Qwen2"], base, torch.float16)(**given).logits[:, -1].float().numpy()
    assert np.isfinite(wanted).all()
    assert worst_differences({"logits": logits[:, -1]}, {"logits": wanted})["logits"] <= 5e-3


def test_a_model_that_decides_by_length_what_it_computes_is_refused(tmp_path: Path):
    """BigBird attends to everything in short texts and to blocks in long ones: one graph holds for one of the two."""
    config = transformers.BigBirdConfig(**TEXT, block_size=4, num_random_blocks=1)
    bird = Architecture(
        "BigBird",
        config,
        "BigBirdModel",
        "BigBirdForSequenceClassification",
        ["query", "value"],
        "SEQ_CLS",
        head=("classifier",),
        labels=LABELS,
    )
    base = save_base(bird, tmp_path / "base")
    with pytest.raises(
        ExportError, match=r"holds for a sequence of at most 28, and the base takes 64: .*original_full"
    ):
        export(bird, base, save_adapter(bird, base, tmp_path / "adapter"), "task", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
