"""Saving a demo adapter so that it can be committed.

The same training gives the same bytes, and the base is pinned by its hash.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from lora.bases.checkpoint import fingerprint
from lora.files.tensorfile import Lazy, write_tensors


def save_adapter(model: Any, folder: Path, base_name: str, base: Path) -> None:
    """Write PEFT's own files of ``model`` into ``folder``.

    They name the public base and hold the fingerprint of the checkpoint ``base``.
    """
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = json.loads(config_path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, in whatever order
    config["base_model_name_or_path"] = base_name
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: Lazy(values.dtype, values.shape, values.copy) for name, values in load_file(weights_path).items()}
    write_tensors(weights_path, tensors, {"format": "pt", "base_sha256": fingerprint(base)})
