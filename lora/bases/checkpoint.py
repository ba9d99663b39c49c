"""A base checkpoint as transformers lays it out: one safetensors file, or shards named by an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora.bases.tensors import BaseTensors
from lora.errors import CheckpointError
from lora.files.tensorfile import Array, Span, TensorFile, file_sha256

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# The same of a part of a diffusers pipeline; and the file that lists the parts.
OF_DIFFUSERS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
PIPELINE = "model_index.json"
# The output embedding of transformers' language models, and the names of the input embedding that it may be tied to.
OUTPUT_EMBEDDING = "lm_head.weight"
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")


class Checkpoint(BaseTensors):
    """The tensors of a checkpoint folder by name, mapped read-only from whichever shard holds them.

    ``tied`` names weights that are stored under another name (a tied output embedding); they are found, not listed.
    Raises CheckpointError when the folder holds no safetensors weights, or a shard is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = tuple(TensorFile(path) for path in weight_files(folder))
        self.home = {name: file for file in self.files for name in file}
        self.config = read_config(folder)
        self.tied = _tied(self.config, set(self.home))

    def __getitem__(self, name: str) -> Array:
        stored = self.tied.get(name, name)
        return self.home[stored][stored]

    def span(self, name: str) -> Span:
        """A tensor's dtype, shape and place in its file, without mapping it."""
        stored = self.tied.get(name, name)
        return self.home[stored].spans[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without mapping it."""
        return self.span(name).shape

    def __contains__(self, name: object) -> bool:
        return name in self.home or name in self.tied

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in a fixed order."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint with config.json and {SINGLE}")
    for single, index in ((SINGLE, INDEX), OF_DIFFUSERS):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in _shard_names(folder / index)]
    if (folder / PIPELINE).is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"{folder}: a diffusers pipeline of several models; give the folder of the one that the adapter is for:"
            f" {', '.join(str(folder / part) for part in parts)}"
        )
    raise CheckpointError(
        f"{folder}: neither {SINGLE} nor {INDEX}; save the base with save_pretrained(safe_serialization=True)"
    )


def index_beside(names: Iterable[str]) -> str:
    """What the index of these weights' files is called."""
    return OF_DIFFUSERS[1] if any(name.startswith("diffusion_") for name in names) else INDEX


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json; empty where there is none. Raises CheckpointError when it is not a JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(config).__name__}; fetch it again")
    return config


def fingerprint(folder: Path) -> str:
    """SHA-256 that identifies a base's weights: of its one file, or of its shards' hashes in order."""
    hashes = [file_sha256(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index}: not a safetensors index with a 'weight_map' ({error!r}); fetch it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                f"{index}: shard {name!r} is not a plain file name beside the index; refusing to follow it"
            )
    return names


def _tied(config: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    """The output embedding of a language model whose configuration ties it and whose file leaves it out."""
    models = " ".join(map(str, config.get("architectures") or ()))
    if (
        not config.get("tie_word_embeddings", True)
        or OUTPUT_EMBEDDING in names
        or not any(kind in models for kind in ("LM", "ConditionalGeneration"))
    ):
        return {}
    inputs = [name for name in names if name.endswith(INPUT_EMBEDDINGS)]
    return {OUTPUT_EMBEDDING: inputs[0]} if len(inputs) == 1 else {}
