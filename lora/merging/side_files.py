"""What stands beside a base's weights: its tokenizer and configuration, and the folders that its users load too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora.bases.checkpoint import CONFIG, INDEX, OF_DIFFUSERS, read_config
from lora.bases.opening import Base

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
# The modules of a sentence-transformers model, which may have weights of their own in folders beside the encoder's.
MODULES = "modules.json"


def write_side_files(stage: Path, base: Base, config: Mapping[str, Any]) -> None:
    """Copy all files of the base but its weights, and write config.json where it is not as it was.

    A folder that ``modules.json`` names is part of the model and is copied with its weights; in other folders, weights
    are those of the base in another form, and are left out.
    """
    if base.folder is None:
        return
    parts = _modules(base.folder)
    for path in sorted(base.folder.rglob("*")):
        place = path.relative_to(base.folder)
        if path.is_file() and _belongs(place, parts):
            (stage / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, stage / place)
    if not base.config:
        return
    if config == read_config(base.folder):
        shutil.copyfile(base.folder / CONFIG, stage / CONFIG)
    else:
        (stage / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _belongs(place: Path, parts: frozenset[str]) -> bool:
    """Whether a file of the base, at this place in its folder, is kept. Hidden folders are tools' own."""
    if any(part.startswith(".") for part in place.parts[:-1]):
        return False
    if len(place.parts) > 1:
        return place.parts[0] in parts or place.suffix not in WEIGHT_SUFFIXES
    return place.suffix not in WEIGHT_SUFFIXES and place.name not in (INDEX, OF_DIFFUSERS[1], CONFIG)


def _modules(folder: Path) -> frozenset[str]:
    """The folders at the top that hold modules of a sentence-transformers model."""
    try:
        listed = json.loads((folder / MODULES).read_bytes())
        return frozenset(Path(module["path"]).parts[0] for module in listed if module.get("path"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return frozenset()  # no such model
