"""A bundle of the demo's real tasks, and of further tasks made from one of them.

For where many tasks matter, and their quality does not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from exporter.bundle.manifest import Bundle
from exporter.task import Request, add_task, export_task
from scripts.support.demo_tasks import MOVIES, TASKS
from scripts.support.packaged_files import minilm


def demo_bundle(folder: Path) -> Bundle:
    """The three demo tasks, stored dense."""
    for task in TASKS:
        bundle = export_task(Request(minilm(), task.adapter, task.name, task.labels), folder).bundle
    return bundle


def with_further(bundle: Bundle, count: int) -> Bundle:
    """``count`` further tasks, ``task-00`` and so on, stored as factors.

    Each is the movies adapter with its factors B scaled at random, so that no two are alike.
    """
    random = np.random.default_rng(0)
    for number in range(count):
        adapter = _varied(bundle.path.parent / f"adapter-{number}", random)
        bundle = add_task(bundle.path, adapter, f"task-{number:02}", MOVIES.labels, store="factors").bundle
        shutil.rmtree(adapter)
    return bundle


def _varied(folder: Path, random: np.random.Generator) -> Path:
    tensors = load_file(MOVIES.adapter / "adapter_model.safetensors")
    scaled = {
        name: values * random.uniform(0.5, 1.5, values.shape).astype(values.dtype) if "lora_B" in name else values
        for name, values in tensors.items()
    }
    folder.mkdir()
    shutil.copy(MOVIES.adapter / "adapter_config.json", folder)
    save_file(scaled, folder / "adapter_model.safetensors")
    return folder
