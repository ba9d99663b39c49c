"""Reading diffusers files: every spelling of a key, where the scaling comes from, one component at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file

from lora.adapter import Adapter
from lora.errors import AdapterError
from lora.formats.diffusers import read_diffusers
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply

sizes, ranks = st.integers(1, 9), st.integers(1, 5)
alphas = st.one_of(st.none(), st.floats(0, 64, width=16))
dtypes = st.sampled_from([np.float16, bfloat16, np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)
MODULE = "unet.mid.attn1.to_q"
PEFT_SLOTS = (".lora_A.weight", ".lora_B.weight")
WEIGHTS = "pytorch_lora_weights.safetensors"


def factors(
    seed: int,
    a: tuple[int, ...],
    b: tuple[int, ...],
    dtype=np.float32,
    module: str = MODULE,
    slots: tuple[str, str] = PEFT_SLOTS,
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        module + slots[0]: random.normal(size=a).astype(dtype),
        module + slots[1]: random.normal(size=b).astype(dtype),
    }


def saved(folder: Path, tensors: dict[str, np.ndarray], fields: dict | None = None) -> Path:
    metadata = {"format": "pt"} | ({} if fields is None else {"lora_adapter_metadata": json.dumps(fields)})
    save_file(tensors, folder / WEIGHTS, metadata)
    return folder / WEIGHTS


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def merged(adapter: Adapter, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: apply(changes, base[name], np.float64) for name, changes in changes_by_parameter(base, adapter).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("diffusers")


# {as the file spells A and B of one module: as the base spells it}
SPELLINGS = {
    ("unet.mid.attn1.to_q.lora_A.weight", "unet.mid.attn1.to_q.lora_B.weight"): "mid.attn1.to_q",
    ("unet.mid.attn1.to_q.lora.down.weight", "unet.mid.attn1.to_q.lora.up.weight"): "mid.attn1.to_q",
    (
        "unet.mid.attn1.processor.to_q_lora.down.weight",
        "unet.mid.attn1.processor.to_q_lora.up.weight",
    ): "mid.attn1.to_q",
    (
        "unet.mid.attn1.processor.to_k_lora.down.weight",
        "unet.mid.attn1.processor.to_k_lora.up.weight",
    ): "mid.attn1.to_k",
    (
        "unet.mid.attn1.processor.to_v_lora.down.weight",
        "unet.mid.attn1.processor.to_v_lora.up.weight",
    ): "mid.attn1.to_v",
    (
        "unet.mid.attn1.processor.to_out_lora.down.weight",
        "unet.mid.attn1.processor.to_out_lora.up.weight",
    ): "mid.attn1.to_out.0",
    ("transformer.x.lora_A.weight", "transformer.x.lora_B.weight"): "x",
    (
        "text_encoder.h.0.q_proj.lora_linear_layer.down.weight",
        "text_encoder.h.0.q_proj.lora_linear_layer.up.weight",
    ): "h.0.q_proj",
    ("text_encoder_2.proj.lora.down.weight", "text_encoder_2.proj.lora.up.weight"): "proj",
}


@pytest.mark.parametrize("keys", SPELLINGS, ids=lambda keys: keys[0])
def test_every_spelling_is_read(keys: tuple[str, str], tmp_path: Path):
    tensors, base = factors(0, (2, 6), (3, 2), module="", slots=keys), weight(3, 6)
    found = merged(read_diffusers(saved(tmp_path, tensors)), {f"{SPELLINGS[keys]}.weight": base})
    np.testing.assert_allclose(
        found[f"{SPELLINGS[keys]}.weight"], base + tensors[keys[1]].astype(np.float64) @ tensors[keys[0]], rtol=1e-6
    )


@given(seeds, sizes, sizes, ranks, alphas, dtypes, st.booleans())
def test_a_layer_gains_alpha_over_rank_times_b_a(
    folder: Path, seed: int, out: int, width: int, rank: int, alpha: float | None, dtype: type, conv: bool
):
    extents = (3, 3) if conv else ()
    tensors, base = (
        factors(seed, (rank, width, *extents), (out, rank, *(1 for _ in extents)), dtype),
        weight(out, width, *extents),
    )
    a, b = (tensors[MODULE + slot].astype(np.float64) for slot in PEFT_SLOTS)
    scaling = 1.0 if alpha is None else alpha / rank
    file = saved(folder, tensors | ({} if alpha is None else {f"{MODULE}.alpha": np.array(alpha)}))
    update = np.einsum("or,r...->o...", b.reshape(out, rank), a)
    np.testing.assert_allclose(
        merged(read_diffusers(file), {"mid.attn1.to_q.weight": base})["mid.attn1.to_q.weight"],
        base + scaling * update,
        rtol=1e-12,
        atol=1e-12,
    )


def test_alpha_is_divided_by_the_rank(tmp_path: Path):
    """Known wrong answer (diffusers PR 14409): alpha taken for alpha / rank."""
    (update,) = read_diffusers(saved(tmp_path, factors(0, (4, 6), (3, 4)) | {f"{MODULE}.alpha": np.array(8.0)})).changes
    assert update.scaling == 2.0


def test_a_missing_alpha_means_a_scaling_of_one(tmp_path: Path):
    """Known wrong answer: a missing alpha taken for 1."""
    (update,) = read_diffusers(saved(tmp_path, factors(0, (4, 6), (3, 4)))).changes
    assert update.scaling == 1.0


FIELDS = {
    "alpha / r": ({"unet.r": 4, "unet.lora_alpha": 8}, 2.0),
    "rank stabilised": ({"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
    "rank of the module": ({"unet.r": 2, "unet.lora_alpha": 8, "unet.rank_pattern": {"mid.attn1.to_q": 4}}, 2.0),
    "alpha of the module": ({"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_q": 2}}, 0.5),
    "beside another component": (
        {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 64},
        2.0,
    ),
    "of another component only": ({"text_encoder.r": 2, "text_encoder.lora_alpha": 64}, 1.0),
}


@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("slots", [PEFT_SLOTS, (".lora.down.weight", ".lora.up.weight")], ids=["peft", "down and up"])
def test_the_scaling_is_that_of_the_configuration(slots: tuple[str, str], case: str, tmp_path: Path):
    fields, scaling = FIELDS[case]
    (update,) = read_diffusers(saved(tmp_path, factors(0, (4, 6), (3, 4), slots=slots), fields)).changes
    assert (update.module, update.scaling) == ("mid.attn1.to_q", scaling)


def test_a_similarly_named_component_keeps_its_own_configuration(tmp_path: Path):
    fields = {"text_encoder.r": 4, "text_encoder.lora_alpha": 8, "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 1}
    tensors = factors(0, (4, 6), (3, 4), module="text_encoder.x") | factors(
        0, (4, 6), (3, 4), module="text_encoder_2.x"
    )
    file = saved(tmp_path, tensors, fields)
    assert [read_diffusers(file, name).changes[0].scaling for name in ("text_encoder", "text_encoder_2")] == [2.0, 0.25]


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = torch.nn.Linear(6, 4), torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.conv = torch.nn.Conv2d(6, 4, 3)


CONFIGS = {
    "plain": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv"]),
    "patterns": LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["to_q", "to_out.0", "conv"],
        rank_pattern={"to_q": 3},
        alpha_pattern={"conv": 1},
    ),
    "rank stabilised": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "conv"], use_rslora=True),
    "DoRA": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv"], use_dora=True),
    "lora_B with a bias": LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], lora_bias=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_merge_is_pefts(name: str, tmp_path: Path):
    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({"attn1": Attention()}).double()
    base = {key: values.numpy().copy() for key, values in plain.state_dict().items()}
    model = get_peft_model(plain, CONFIGS[name]).double()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data += torch.rand_like(parameter)
    tensors = {
        key.replace("base_model.model.", "unet."): values.numpy().copy()
        for key, values in get_peft_model_state_dict(model).items()
    }
    fields = {
        f"unet.{key}": sorted(value) if isinstance(value, set) else value
        for key, value in CONFIGS[name].to_dict().items()
    }
    found = merged(read_diffusers(saved(tmp_path, tensors, fields)), base)
    expected = model.merge_and_unload().state_dict()
    for key in found:
        np.testing.assert_allclose(
            found[key], expected[key].numpy(), rtol=1e-6, atol=1e-6
        )  # PEFT keeps lora_ in float32
    assert set(found) == {key for key in base if not np.array_equal(base[key], expected[key].numpy())}


def test_a_folder_is_read_by_its_usual_name(tmp_path: Path):
    saved(tmp_path, factors(0, (2, 6), (3, 2)))
    adapter = read_diffusers(tmp_path)
    assert (adapter.path, adapter.files, adapter.format) == (tmp_path, (tmp_path / WEIGHTS,), "diffusers")


def test_a_folder_with_a_pickle_only_is_read(tmp_path: Path):
    torch.save(
        {key: torch.from_numpy(values) for key, values in factors(0, (2, 6), (3, 2)).items()},
        tmp_path / "pytorch_lora_weights.bin",
    )
    assert read_diffusers(tmp_path).files == (tmp_path / "pytorch_lora_weights.bin",)


def test_a_folder_without_the_file_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"pytorch_lora_weights\.safetensors: no such file"):
        read_diffusers(tmp_path)


COMPONENTS = ["unet", "transformer", "text_encoder", "text_encoder_2"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_component_is_read_and_the_others_are_named(component: str, tmp_path: Path):
    tensors = {
        key: value
        for name in COMPONENTS
        for key, value in factors(0, (2, 6), (3, 2), module=f"{name}.in_{name}").items()
    }
    adapter = read_diffusers(saved(tmp_path, tensors), component)
    assert [change.module for change in adapter.changes] == [f"in_{component}"]
    assert set(adapter.skipped) == set(COMPONENTS) - {component}


def test_one_of_several_components_has_to_be_chosen(tmp_path: Path):
    tensors = factors(0, (2, 6), (3, 2)) | factors(0, (2, 6), (3, 2), module="text_encoder.x")
    with pytest.raises(AdapterError, match=r"holds updates of text_encoder, unet; say which component"):
        read_diffusers(saved(tmp_path, tensors))


def test_a_component_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"holds no updates of component 'transformer'; it has unet"):
        read_diffusers(saved(tmp_path, factors(0, (2, 6), (3, 2))), "transformer")


SOUND = factors(0, (2, 6), (3, 2))
UNREADABLE = {
    "'x.lora_A.weight' belongs to no component; expected unet., ": SOUND | {"x.lora_A.weight": np.ones((2, 6))},
    "are two spellings of one": SOUND | {f"{MODULE}.lora.down.weight": np.ones((2, 6))},
    "'text_encoder.x.to_q_lora.down.weight' is spelled as by diffusers before": {
        "text_encoder.x.to_q_lora.down.weight": np.ones((2, 6))
    },
    "'unet.mid.attn1.to_q.lora_magnitude_vector' is DoRA's": SOUND | {f"{MODULE}.lora_magnitude_vector": np.ones(3)},
    "'unet.mid.attn1.to_q.bias' belongs to no layer": SOUND | {f"{MODULE}.bias": np.ones(3)},
    "'unet.x.alpha' belongs to no layer": SOUND | {"unet.x.alpha": np.ones(1)},
    "'unet.x.lora.up.weight' belongs to no layer": SOUND | {"unet.x.lora.up.weight": np.ones((3, 2))},
    "'x.lora_B.weight' is missing": SOUND | {"unet.x.lora_A.weight": np.ones((2, 6))},
    "'unet.x.lora.down.weight' holds NaN": SOUND | {"unet.x.lora.down.weight": np.full((2, 6), np.nan)},
    "but their ranks differ": factors(0, (2, 6), (3, 4)),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_file_that_can_not_be_read_exactly_is_refused(message: str, tmp_path: Path):
    with pytest.raises(AdapterError) as refusal:
        read_diffusers(saved(tmp_path, UNREADABLE[message]))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


BAD_FIELDS = {
    "the configuration says rank 3": {"unet.r": 3, "unet.lora_alpha": 4},
    "not a PEFT LoRA configuration": {"unet.r": 2},
    "field 'a_field_of_next_year' is not known": {"unet.r": 2, "unet.lora_alpha": 4, "unet.a_field_of_next_year": 1},
    "field 'init_lora_weights' is 'pissa'": {"unet.r": 2, "unet.lora_alpha": 4, "unet.init_lora_weights": "pissa"},
    "lora_magnitude_vector' is missing": {"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": True},
    "'lora_adapter_metadata' is a list": [],
}


@pytest.mark.parametrize("message", BAD_FIELDS)
def test_a_configuration_that_can_not_be_honoured_is_refused(message: str, tmp_path: Path):
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_diffusers(saved(tmp_path, SOUND, BAD_FIELDS[message]))


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path):
    save_file(SOUND, tmp_path / WEIGHTS, {"lora_adapter_metadata": "{"})
    with pytest.raises(AdapterError, match="'lora_adapter_metadata' is not JSON"):
        read_diffusers(tmp_path)


def test_alpha_beside_a_configuration_is_refused(tmp_path: Path):
    tensors = SOUND | {f"{MODULE}.alpha": np.array(8.0)}
    with pytest.raises(AdapterError, match=r"to_q\.alpha' belongs to no layer"):
        read_diffusers(saved(tmp_path, tensors, {"unet.r": 2, "unet.lora_alpha": 4}))
