"""Finding an adapter's format: by its files and keys, and never by a guess."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lora.errors import AdapterError
from lora.formats.read import ReadOptions, read_adapter

A, B = np.ones((2, 6), np.float32), np.ones((3, 2), np.float32)
# {format: its tensors}
TENSORS = {
    "PEFT": {"base_model.model.layer.lora_A.weight": A, "base_model.model.layer.lora_B.weight": B},
    "diffusers": {"unet.layer.lora_A.weight": A, "unet.layer.lora_B.weight": B},
    "kohya": {"lora_unet_layer.lora_down.weight": A, "lora_unet_layer.lora_up.weight": B},
    "loralib": {"layer.lora_A": A, "layer.lora_B": B},
}
OPTIONS = {"alpha": 4.0, "component": "unet", "enable_lora": (True, True), "fan_in_fan_out": False}
APPLY = {
    "PEFT": set(),
    "diffusers": {"component"},
    "kohya": {"component"},
    "loralib": {"alpha", "enable_lora", "fan_in_fan_out"},
}
NEEDED = {"loralib": ReadOptions(alpha=4.0)}


def saved(folder: Path, form: str, name: str = "lora.safetensors", **more: np.ndarray) -> Path:
    """The file that a user would give, or the folder for PEFT."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "PEFT":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
        save_file(TENSORS[form] | more, folder / "adapter_model.safetensors")
        return folder
    save_file(TENSORS[form] | more, folder / name)
    return folder / name


@pytest.mark.parametrize("form", TENSORS)
def test_the_format_is_found(form: str, tmp_path: Path):
    adapter = read_adapter(saved(tmp_path, form), NEEDED.get(form, ReadOptions()))
    assert adapter.format == form
    assert [change.module for change in adapter.changes] == ["layer"]


@pytest.mark.parametrize("form", ["diffusers", "kohya", "loralib"])
def test_a_folder_with_one_file_is_that_file(form: str, tmp_path: Path):
    saved(tmp_path, form)
    (tmp_path / "README.md").write_text("about")
    assert read_adapter(tmp_path, NEEDED.get(form, ReadOptions())).format == form


def test_diffusers_name_for_the_file_tells_it_from_others(tmp_path: Path):
    saved(tmp_path, "loralib", "embeddings.safetensors")
    file = saved(tmp_path, "diffusers", "pytorch_lora_weights.safetensors")
    assert read_adapter(tmp_path).files == (file,)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
@pytest.mark.parametrize("form", ["diffusers", "kohya", "loralib"])
def test_a_torch_state_dict_is_read(form: str, suffix: str, tmp_path: Path):
    file = tmp_path / f"lora{suffix}"
    torch.save({key: torch.from_numpy(values) for key, values in TENSORS[form].items()}, file)
    assert read_adapter(file, NEEDED.get(form, ReadOptions())).format == form


DIFFUSERS_KEYS = [
    "unet.a.lora.down.weight",
    "unet.a.processor.to_q_lora.up.weight",
    "text_encoder.a.lora_linear_layer.down.weight",
    "text_encoder_2.a.lora_B.weight",
]
KOHYA_KEYS = ["lora_te_a.lora_up.weight", "lora_te1_a.alpha", "lora_unet_a.hada_w1_a", "lora_prior_a.lora_down.weight"]


@pytest.mark.parametrize("key", DIFFUSERS_KEYS + KOHYA_KEYS)
def test_a_key_of_a_format_goes_to_its_reader(key: str, tmp_path: Path):
    save_file({key: A}, tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError) as refusal:
        read_adapter(tmp_path)
    assert "expected a folder with adapter_config.json" not in str(refusal.value)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", TENSORS)
def test_an_option_of_another_format_is_refused(form: str, option: str, tmp_path: Path):
    path = saved(tmp_path, form)
    refused = f"option {option} is not for a {form} adapter"
    try:
        read_adapter(path, ReadOptions(**{option: OPTIONS[option]}))
        message = ""
    except AdapterError as error:
        message = str(error)
    assert (refused in message) == (option not in APPLY[form])


def test_options_reach_the_reader(tmp_path: Path):
    more = {"fused.lora_A": np.ones((4, 7), np.float32), "fused.lora_B": np.ones((4, 2), np.float32)}
    adapter = read_adapter(
        saved(tmp_path, "loralib", **more), ReadOptions(alpha=8.0, enable_lora=(True, True), fan_in_fan_out=True)
    )
    assert [(change.module, change.scaling, change.layout, change.square) for change in adapter.changes] == [
        ("fused", 4.0, "transposed", None),
        ("layer", 4.0, "view", "transposed"),
    ]


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_the_component_reaches_the_reader(form: str, tmp_path: Path):
    with pytest.raises(AdapterError, match="holds no updates of component 'transformer'; it has unet"):
        read_adapter(saved(tmp_path, form), ReadOptions(component="transformer"))


@given(st.sampled_from(sorted(TENSORS)), st.sampled_from(sorted(TENSORS)))
def test_mixed_formats_are_refused_and_listed(tmp_path_factory: pytest.TempPathFactory, first: str, second: str):
    file = tmp_path_factory.mktemp("mixed") / "lora.safetensors"
    save_file(TENSORS[first] | TENSORS[second], file)
    if first == second != "PEFT":
        assert read_adapter(file, NEEDED.get(first, ReadOptions())).format == first
        return
    with pytest.raises(AdapterError) as refusal:
        read_adapter(file)
    assert all(form in str(refusal.value) for form in (first, second))


UNKNOWN = {
    "a base model": {"encoder.layer.weight": B},
    "PEFT's keys without a prefix": {"layer.lora_A.weight": A, "layer.lora_B.weight": B},
    "XLabs": {"double_blocks.0.processor.qkv_lora1.down.weight": A},
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_format_is_refused_with_what_is_understood(case: str, tmp_path: Path):
    save_file(UNKNOWN[case], tmp_path / "lora.safetensors")
    with pytest.raises(AdapterError) as refusal:
        read_adapter(tmp_path / "lora.safetensors")
    assert f"holds keys such as '{min(UNKNOWN[case])}'" in str(refusal.value)
    assert all(word in str(refusal.value) for word in ("adapter_config.json", "diffusers", "kohya", "loralib"))


def test_a_file_of_black_forest_labs_names_is_diffusers(tmp_path: Path):
    tensors = {"diffusion_model.layer.lora_A.weight": A, "diffusion_model.layer.lora_B.weight": B}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert read_adapter(tmp_path / "lora.safetensors").format == "diffusers"


def test_pefts_tensors_without_their_configuration_are_refused(tmp_path: Path):
    saved(tmp_path, "PEFT")
    with pytest.raises(AdapterError, match=r"without their scaling; give the folder that has adapter_config\.json"):
        read_adapter(tmp_path / "adapter_model.safetensors")


def test_a_folder_of_two_formats_is_refused(tmp_path: Path):
    saved(tmp_path, "PEFT")
    saved(tmp_path, "diffusers", "pytorch_lora_weights.safetensors")
    with pytest.raises(
        AdapterError, match=r"holds adapter_config\.json \(PEFT\) and pytorch_lora_weights\.safetensors \(diffusers\)"
    ):
        read_adapter(tmp_path)


def test_a_folder_of_several_files_is_refused(tmp_path: Path):
    saved(tmp_path, "kohya", "a.safetensors")
    saved(tmp_path, "loralib", "b.safetensors")
    with pytest.raises(
        AdapterError, match=r"holds a\.safetensors, b\.safetensors and no adapter_config\.json; give one file"
    ):
        read_adapter(tmp_path)


def test_a_folder_without_tensors_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="holds no tensors and no adapter_config"):
        read_adapter(tmp_path)


def test_a_missing_path_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="nowhere: no such file or folder; expected a folder with adapter_config"):
        read_adapter(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match=r"lora\.gguf: not a whole safetensors file"):
        read_adapter(tmp_path / "lora.gguf")
