"""Shared fixtures: the real base and adapters, a tiny random base, and bundles made of each once per run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from compiled import HERE, Built, configured, tensorrt_root
from filelock import FileLock
from safetensors.numpy import save_file

from exporter.bundle.manifest import Bundle
from exporter.task import Request, add_task, export_task
from scripts.support.demo_tasks import MOVIES, SUPERSENSE
from scripts.support.packaged_files import minilm

# What PEFT's save_pretrained writes into adapter_config.json, as far as the merge is concerned.
CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["query", "value"],
    "modules_to_save": ["classifier", "score"],
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 30522,
    "max_position_embeddings": 64,
}

WriteAdapter = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The machine is shared; one thread a process keeps tests steady."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_base() -> Path:
    """all-MiniLM-L6-v2, from its package."""
    return minilm()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, real_base: Path) -> Path:
    """A randomly initialised BERT of two layers, with MiniLM's real tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-base")
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(real_base / name, folder / name)
    return folder


@pytest.fixture
def write_adapter(tmp_path: Path) -> WriteAdapter:
    """Writes a PEFT adapter folder for ``tiny_base``; ``tensors`` and ``config`` override parts, a None removes one."""
    return lambda name="adapter", **changes: save_adapter(tmp_path / name, **changes)


def save_adapter(
    folder: Path,
    *,
    seed: int = 0,
    outputs: int = 2,
    tensors: dict | None = None,
    config: dict | None = None,
    metadata: dict | None = None,
) -> Path:
    random = np.random.default_rng(seed)
    width, rank = TINY["hidden_size"], CONFIG["r"]
    made = {
        "base_model.model.classifier.weight": random.normal(size=(outputs, width)),
        "base_model.model.classifier.bias": random.normal(size=outputs),
    }
    for layer in range(TINY["num_hidden_layers"]):
        for target in ("query", "value"):
            module = f"base_model.model.bert.encoder.layer.{layer}.attention.self.{target}"
            made[f"{module}.lora_A.weight"] = random.normal(size=(rank, width)) * 0.2
            made[f"{module}.lora_B.weight"] = random.normal(size=(width, rank)) * 0.2
    made |= tensors or {}
    folder.mkdir(parents=True)
    save_file(
        {name: np.asarray(value, np.float32) for name, value in made.items() if value is not None},
        folder / "adapter_model.safetensors",
        metadata,
    )
    fields = {name: value for name, value in (CONFIG | (config or {})).items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Bundle:
    """One task, ``first``, on the tiny base. Tests that change it use ``tiny_copy``."""
    folder = tmp_path_factory.mktemp("tiny")
    request = Request(tiny_base, save_adapter(folder / "adapter"), "first", ("no", "yes"))
    return export_task(request, folder / "bundle").bundle


@pytest.fixture
def tiny_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of ``tiny_bundle`` that a test may change."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def stored_both_ways(tiny_copy: Path, write_adapter) -> Path:
    """One adapter twice: as ``dense`` and as ``factors``."""
    adapter = write_adapter(seed=1)
    add_task(tiny_copy, adapter, "dense")
    add_task(tiny_copy, adapter, "factors", store="factors")
    return tiny_copy


@pytest.fixture(scope="session")
def real_bundle(tmp_path_factory: pytest.TempPathFactory, real_base: Path) -> Bundle:
    """The real base with the trained ``movies`` and ``supersense`` tasks: two heads."""
    out = tmp_path_factory.mktemp("real") / "bundle"
    export_task(Request(real_base, MOVIES.adapter, "movies", MOVIES.labels), out)
    return export_task(Request(real_base, SUPERSENSE.adapter, "supersense", SUPERSENSE.labels), out).bundle


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Built:
    """Compiled with every warning an error; once for all of pytest's processes."""
    for tool in ("cmake", "ninja", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed here")
    temporary = tmp_path_factory.getbasetemp()
    folder = (temporary if worker_id == "master" else temporary.parent) / "cpp"
    with FileLock(f"{folder}.lock"):
        shared = configured(
            folder / "shared",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}",
        )
        sanitized = configured(
            folder / "sanitized",
            "-DCMAKE_CXX_FLAGS=-Werror -O1 -g1",
            "-DLORAFUSE_SANITIZE=address,undefined",
            "-DBUILD_SHARED_LIBS=OFF",
            f"-DLORAFUSE_TESTS={HERE}",
        )
        tensorrt = configured(
            folder / "tensorrt",
            f"-DCMAKE_INSTALL_PREFIX={folder / 'with-tensorrt'}",
            *tensorrt_root(folder / "roots"),
        )
    return Built(shared, sanitized, tensorrt)
