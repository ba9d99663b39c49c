"""A base checkpoint as transformers lays it out: one safetensors file, or shards named by an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora.errors import CheckpointError
from lora.tensorfile import Array, TensorFile, file_sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Checkpoint(Mapping[str, Array]):
    """The tensors of a checkpoint folder by name, mapped read-only from whichever shard holds them.

    Raises CheckpointError when the folder holds no safetensors weights, or a shard is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self.files = weight_files(folder)
        self._home = {name: shard for shard in map(TensorFile, self.files) for name in shard}

    def __getitem__(self, name: str) -> Array:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in a fixed order."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint with config.json and {SINGLE}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: neither {SINGLE} nor {INDEX}; save the base with save_pretrained(safe_serialization=True)")
    return [folder / name for name in _shard_names(folder / INDEX)]


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index with a 'weight_map' ({error!r}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name beside the index; refusing to follow it")
    return names


def fingerprint(folder: Path) -> str:
    """SHA-256 that identifies a base's weights: of its one file, or of its shards' hashes in order."""
    hashes = [file_sha256(path) for path in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
