"""Ten thousand damaged adapters: each is refused in one line, or its merge equals the formula on what the files now
say.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora.errors import LorafuseError
from lora.formats.peft import read_peft
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import merge

RUNS = 10_000
MODULES = ("layers.0.q", "layers.0.v", "layers.1.q")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
JUNK = (None, True, -1, 0, 1, 2, 3.5, 1e308, "", "x", "(", [], [1], {}, {"q": 2}, {"q": "2"}, 10**30, "all", ["q"])


@pytest.fixture(scope="module")
def base() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"{module}.weight": rng.normal(size=(6, 10)).astype(np.float32) for module in MODULES} | {
        "head.weight": np.ones((2, 6), np.float32)
    }


@pytest.fixture(scope="module")
def sound() -> tuple[dict, dict]:
    """The configuration and the tensors before anything was damaged."""
    rng = np.random.default_rng(1)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "modules_to_save": ["head"],
    }
    tensors = {"base_model.model.head.weight": rng.normal(size=(2, 6)).astype(np.float32)}
    for module in MODULES:
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(4, 10)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(6, 4)).astype(np.float32)
    return config, tensors


def damage_config(chance: random.Random, config: dict) -> str:
    fields = [
        *config,
        "use_dora",
        "lora_bias",
        "fan_in_fan_out",
        "alora_invocation_tokens",
        "layer_replication",
        "target_parameters",
        "new_field",
        "init_lora_weights",
    ]
    fields += ["trainable_token_indices", "lora_dropout", "task_type"]
    for _ in range(chance.randint(1, 2)):
        config[chance.choice(fields)] = copy.deepcopy(chance.choice(JUNK))
    text = json.dumps(config)
    if chance.random() < 0.2:
        text = text.replace("{", '{"r": 2, ', 1)  # a duplicate key: the last one counts, for everybody
    if chance.random() < 0.1:
        text = text[: chance.randrange(len(text))]
    return text


def damage_tensors(chance: random.Random, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name = chance.choice(sorted(tensors))
    match chance.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensors[name].copy()
            tensors[name].flat[chance.randrange(tensors[name].size)] = chance.choice(
                [math.nan, math.inf, -math.inf, 1e30]
            )
        case 2:
            tensors[name] = np.zeros((chance.randint(0, 7), chance.randint(0, 12)), np.float32)
        case 3:
            tensors[name] = tensors[name].astype(chance.choice([np.float16, np.float64, np.int8, np.bool_]))
        case 4:
            tensors[
                name.replace("lora_A", chance.choice(["lora_C", "lora_B", "lora_magnitude_vector"]))
                + chance.choice(["", "x"])
            ] = tensors.pop(name)
        case _:
            tensors[name] = tensors[name][..., None]
    return tensors


def damage_bytes(chance: random.Random, content: bytearray) -> bytes:
    header = struct.unpack("<Q", content[:8])[0]
    match chance.randrange(4):
        case 0:
            content[chance.randrange(8 + header)] ^= 1 << chance.randrange(8)
        case 1:
            del content[chance.randrange(len(content)) :]
        case 2:
            content[:8] = struct.pack("<Q", chance.choice([0, 1, header - 1, header + 8, 2**40, 2**63]))
        case _:
            digits = [index for index in range(8, 8 + header) if content[index : index + 1].isdigit()]
            content[chance.choice(digits)] = ord(chance.choice("0123456789"))
    return bytes(content)


def write_damaged(chance: random.Random, folder: Path, sound: tuple[dict, dict]) -> None:
    config, tensors = copy.deepcopy(sound[0]), dict(sound[1])
    kind = chance.randrange(3)
    (folder / CONFIG).write_text(damage_config(chance, config) if kind == 0 else json.dumps(config))
    save_file(damage_tensors(chance, tensors) if kind == 1 else tensors, folder / WEIGHTS)
    if kind == 2:
        (folder / WEIGHTS).write_bytes(damage_bytes(chance, bytearray((folder / WEIGHTS).read_bytes())))


def formula(folder: Path, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The merge that the files ask for, in float64, by a reading of them that shares no code with ours."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    merged = {name: values.astype(np.float64) for name, values in base.items()}
    for name, values in tensors.items():
        if "lora_" not in name:
            merged[name.removeprefix("base_model.model.")] = values.astype(np.float64)
    for module in MODULES:
        pair = [tensors.get(f"base_model.model.{module}.lora_{factor}.weight") for factor in "AB"]
        if pair[0] is None:
            continue
        rank, alpha = (
            (config.get(f"{what}_pattern") or {}).get("q" if module.endswith("q") else "", config[key])
            for what, key in (("rank", "r"), ("alpha", "lora_alpha"))
        )
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        merged[f"{module}.weight"] += scaling * pair[1].astype(np.float64) @ pair[0].astype(np.float64)
    return merged


def test_damaged_adapters_are_refused_or_merged_by_the_formula(tmp_path: Path, base: dict, sound: tuple[dict, dict]):
    chance, outcomes = random.Random(0), Counter()
    tracemalloc.start()
    for run in range(RUNS):
        write_damaged(chance, tmp_path, sound)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            adapter = read_peft(tmp_path)
            result = {
                merged.parameter: merged.stored for merged in merge(base, changes_by_parameter(base, adapter), tmp_path)
            }
        except LorafuseError as error:
            assert "\n" not in str(error).strip(), f"run {run}"
            outcomes["refused"] += 1
        else:
            for name, want in formula(tmp_path, base).items():
                np.testing.assert_allclose(
                    result.get(name, base.get(name)), want, rtol=1e-5, atol=1e-5, err_msg=f"run {run}: {name}"
                )
            outcomes["merged"] += 1
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000, f"run {run}: memory was taken on trust"
    tracemalloc.stop()
    assert min(outcomes["refused"], outcomes["merged"]) > RUNS // 50, outcomes
