"""Reading PEFT adapters: what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora.errors import AdapterError
from lora.formats.peft import read_peft
from lora.merging.fit import fit

A, B = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
KEY = "base_model.model.layer.lora_{}.weight"
SOUND = {KEY.format("A"): A, KEY.format("B"): B}


def saved(folder: Path, tensors: dict | None = None, **config) -> Path:
    save_file(SOUND if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"} | config))
    return folder


REFUSED_FIELDS = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 2},
    "use_qalora": True,
    "use_bdlora": {"x": 1},
    "kasa_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "velora_config": {"x": 1},
    "megatron_config": {"x": 1},
    "layer_replication": [[0, 2], [1, 3]],
    "ensure_weight_tying": True,
    "a_field_of_next_year": True,
    "peft_type": "XLORA",
    "init_lora_weights": "pissa",
    "bias": "some",
    "rank_pattern": {"(": 3},
    "r": 0,
}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_a_field_that_changes_the_maths_is_refused_by_name(field: str, tmp_path: Path):
    with pytest.raises(AdapterError, match=r"adapter_config\.json: ") as refusal:
        read_peft(saved(tmp_path, **{field: REFUSED_FIELDS[field]}))
    assert {"rank_pattern": "pattern", "r": "rank of 'r'"}.get(field, f"'{field}'") in str(refusal.value)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_would_never_come_to_an_end_is_given_up(field: str, tmp_path: Path):
    """A stranger's adapter is not to hang whoever looks at it."""
    (module,) = {
        name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        for name in SOUND
        if name.endswith(".lora_A.weight")
    }
    long = {name.replace(module, "a" * 64): tensor for name, tensor in SOUND.items()}
    with pytest.raises(
        AdapterError, match=r"takes longer than 1 s to match with 'a{64}'; write it without nested repetition"
    ) as refused:
        read_peft(saved(tmp_path, long, **{field: {"((a|aa)+)+c": 2}}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("init", ["olora", "corda", "lora_ga", "loftq", "pissa_niter_16"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str, tmp_path: Path):
    with pytest.raises(AdapterError, match="changes the base before training"):
        read_peft(saved(tmp_path, init_lora_weights=init))


def test_an_initialisation_that_is_not_known_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="'init_lora_weights' is 'of-next-year', which is not known"):
        read_peft(saved(tmp_path, init_lora_weights="of-next-year"))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_passed_over(init: object, tmp_path: Path):
    assert len(read_peft(saved(tmp_path, init_lora_weights=init)).changes) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"inference_mode": True, "lora_dropout": 0.5, "revision": "main", "runtime_config": {}},
        {"a_field_of_next_year": None},
    ],
)
def test_fields_without_effect_are_passed_over(config: dict, tmp_path: Path):
    assert len(read_peft(saved(tmp_path, **config)).changes) == 1


TENSORS = {
    "belongs to no layer": SOUND | {"base_model.model.other.weight": A},
    "base_model.model.layer.lora_C": SOUND | {"base_model.model.layer.lora_C.weight": A},
    "tensor 'foreign'": SOUND | {"foreign": A},
    "lora_B.weight' is missing": {KEY.format("A"): A},
    "lora_B.weight' belongs to no layer": {KEY.format("B"): B},
    "lora_B.bias' belongs to no layer": SOUND | {"base_model.model.layer.lora_B.bias": B[:, 0]},
    "lora_magnitude_vector' belongs to no layer": SOUND | {"base_model.model.layer.lora_magnitude_vector": B[:, 0]},
    "configuration says rank 2": SOUND | {KEY.format("A"): np.ones((3, 6), np.float32)},
    "holds NaN or infinity": SOUND | {KEY.format("A"): np.full((2, 6), np.nan, np.float32)},
    "expected a floating-point type": SOUND | {KEY.format("A"): np.ones((2, 6), np.int8)},
    "holds no tensors": {},
}


@pytest.mark.parametrize("message", TENSORS)
def test_a_tensor_that_has_no_meaning_here_is_refused(message: str, tmp_path: Path):
    with pytest.raises(AdapterError) as refusal:
        read_peft(saved(tmp_path, TENSORS[message]))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"r": "8", "lora_alpha": 1}',
        b'{"lora_alpha": 1}',
        b'{"r": 2, "lora_alpha": Infinity}',
        b"\xff",
    ],
)
def test_a_configuration_that_can_not_be_read_is_refused(content: bytes, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match="not a PEFT LoRA configuration"):
        read_peft(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, tmp_path: Path):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=f"{name}: no such file"):
        read_peft(tmp_path)


MISFITS = {
    "module 'layer' has no weight in the base": ({"other.weight": np.ones((4, 6))}, {}),
    "fits a base tensor of shape (4, 6), but the base has (5, 6)": ({"layer.weight": np.ones((5, 6))}, {}),
    "fits a base tensor of shape (4, 6), but the base has (4, 6, 2)": ({"layer.weight": np.ones((4, 6, 2))}, {}),
}


@pytest.mark.parametrize("message", MISFITS)
def test_an_adapter_of_another_base_is_refused(message: str, tmp_path: Path):
    base, config = MISFITS[message]
    with pytest.raises(AdapterError) as refusal:
        fit(read_peft(saved(tmp_path, **config)), base)
    assert message in str(refusal.value)


def test_a_bias_for_a_layer_without_one_is_refused(tmp_path: Path):
    adapter = read_peft(saved(tmp_path, SOUND | {"base_model.model.layer.lora_B.bias": B[:, 0]}, lora_bias=True))
    with pytest.raises(AdapterError, match="module 'layer' has no bias in the base"):
        fit(adapter, {"layer.weight": np.ones((4, 6))})


def test_square_experts_are_refused_because_the_file_does_not_say_how_they_lie(tmp_path: Path):
    tensors = {KEY.format("A"): np.ones((6, 6), np.float32), KEY.format("B"): np.ones((6, 6), np.float32)}
    adapter = read_peft(saved(tmp_path, tensors, target_parameters=["layer.up"]))
    with pytest.raises(AdapterError, match="in more than one way, and the file does not say which"):
        fit(adapter, {"layer.up": np.ones((3, 6, 6))})


def test_a_headless_base_is_found_without_the_prefix_of_the_model_with_a_head(tmp_path: Path):
    tensors = {key.replace("layer", "bert.encoder.layer"): values for key, values in SOUND.items()}
    ((place,),) = fit(
        read_peft(saved(tmp_path, tensors)), {"encoder.layer.weight": np.ones((4, 6)), "pooler.weight": np.ones(3)}
    )
    assert place.parameter == "encoder.layer.weight"


def test_a_weight_stored_transposed_is_recognised_by_its_shape(tmp_path: Path):
    ((place,),) = fit(read_peft(saved(tmp_path, fan_in_fan_out=False)), {"layer.weight": np.ones((6, 4))})
    assert place.change.layout == "transposed"
