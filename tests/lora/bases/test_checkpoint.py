"""Base checkpoints: one file or shards, tied embeddings, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora.bases.checkpoint import Checkpoint, fingerprint
from lora.errors import CheckpointError

ONES = {"a": np.ones(3, np.float32)}


def sharded(folder: Path, weight_map: object) -> Path:
    save_file(ONES, folder / "one.safetensors")
    save_file({"b": np.zeros(2, np.float16)}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_one_mapping(tmp_path: Path):
    checkpoint = Checkpoint(sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))
    assert (set(checkpoint), checkpoint["b"].dtype) == ({"a", "b"}, np.float16)


def test_fingerprint_is_the_files_hash_and_for_shards_the_hash_of_their_hashes(tmp_path: Path):
    (tmp_path / "single").mkdir()
    save_file(ONES, tmp_path / "single/model.safetensors")
    assert (
        fingerprint(tmp_path / "single")
        == hashlib.sha256((tmp_path / "single/model.safetensors").read_bytes()).hexdigest()
    )
    shards = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    hashes = [
        hashlib.sha256((shards / name).read_bytes()).hexdigest() for name in ("one.safetensors", "two.safetensors")
    ]
    assert fingerprint(shards) == hashlib.sha256("".join(hashes).encode()).hexdigest()


@pytest.mark.parametrize("weight_map", [{"a": "../one.safetensors"}, {"a": "/etc/passwd"}, {"a": 1}, [], None])
def test_an_index_that_leaves_its_folder_or_is_none_is_refused(weight_map: object, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: (shard|not a safetensors index)"):
        Checkpoint(sharded(tmp_path, weight_map))


def test_a_missing_shard_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"three\.safetensors: no such file"):
        Checkpoint(sharded(tmp_path, {"a": "three.safetensors"}))


def test_a_folder_without_safetensors_says_how_to_save_them(tmp_path: Path):
    with pytest.raises(CheckpointError, match="save the base with save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "1"])
def test_a_config_that_is_no_json_object_is_refused(content: str, tmp_path: Path):
    save_file(ONES, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "tie", "found"),
    [("LlamaForCausalLM", True, True), ("LlamaForCausalLM", False, False), ("BertModel", True, False)],
)
def test_a_tied_output_embedding_is_found_under_its_own_name(architecture: str, tie: bool, found: bool, tmp_path: Path):
    save_file({"model.embed_tokens.weight": np.ones((4, 2), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "tie_word_embeddings": tie}))
    checkpoint = Checkpoint(tmp_path)
    assert ("lm_head.weight" in checkpoint, list(checkpoint)) == (found, ["model.embed_tokens.weight"])
