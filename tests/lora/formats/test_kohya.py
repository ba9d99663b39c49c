"""Reading kohya files: flattened names, one scaling per module, one component at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from lora.adapter import Adapter
from lora.errors import AdapterError
from lora.formats.kohya import read_kohya
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply

sizes, ranks = st.integers(1, 9), st.integers(1, 5)
alphas = st.one_of(st.none(), st.floats(0, 64, width=16))
dtypes = st.sampled_from([np.float16, bfloat16, np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)
FLAT, DOTTED = "lora_unet_mid_block_to_q", "mid_block.to_q.weight"


def factors(
    seed: int,
    down: tuple[int, ...],
    up: tuple[int, ...],
    alpha: float | None = None,
    dtype=np.float32,
    flat: str = FLAT,
) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tensors = {
        f"{flat}.lora_down.weight": random.normal(size=down).astype(dtype),
        f"{flat}.lora_up.weight": random.normal(size=up).astype(dtype),
    }
    return tensors | ({} if alpha is None else {f"{flat}.alpha": np.array(alpha, np.float32)})


def exact(tensors: dict[str, np.ndarray], slot: str) -> np.ndarray:
    return tensors[f"{FLAT}.lora_{slot}.weight"].astype(np.float64)


def saved(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def merged(adapter: Adapter, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: apply(changes, base[name], np.float64) for name, changes in changes_by_parameter(base, adapter).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("kohya")


@given(seeds, sizes, sizes, ranks, alphas, dtypes)
def test_a_linear_layer_gains_alpha_over_rank_times_up_down(
    folder: Path, seed: int, out: int, width: int, rank: int, alpha: float | None, dtype: type
):
    tensors, base = factors(seed, (rank, width), (out, rank), alpha, dtype), weight(out, width)
    scaling = 1.0 if alpha is None else alpha / rank
    found = merged(read_kohya(saved(folder, tensors)), {DOTTED: base})
    np.testing.assert_allclose(
        found[DOTTED], base + scaling * exact(tensors, "up") @ exact(tensors, "down"), rtol=1e-12, atol=1e-12
    )


@given(seeds, sizes, sizes, ranks, alphas, st.tuples(st.integers(1, 3), st.integers(1, 3)), dtypes)
def test_a_convolution_gains_the_two_composed(
    folder: Path, seed: int, out: int, width: int, rank: int, alpha: float | None, extents: tuple[int, int], dtype: type
):
    tensors, base = (
        factors(seed, (rank, width, *extents), (out, rank, 1, 1), alpha, dtype),
        weight(out, width, *extents),
    )
    scaling = 1.0 if alpha is None else alpha / rank
    update = np.einsum("or,rikl->oikl", exact(tensors, "up")[:, :, 0, 0], exact(tensors, "down"))
    found = merged(read_kohya(saved(folder, tensors)), {DOTTED: base})
    np.testing.assert_allclose(found[DOTTED], base + scaling * update, rtol=1e-12, atol=1e-12)


def test_the_merged_convolution_computes_what_the_unmerged_did(tmp_path: Path):
    tensors, base = factors(0, (2, 3, 3, 3), (5, 2, 1, 1), 4.0), weight(5, 3, 3, 3)
    kernel = torch.from_numpy(merged(read_kohya(saved(tmp_path, tensors)), {DOTTED: base})[DOTTED])
    image = torch.from_numpy(weight(1, 3, 6, 6))
    side = torch.conv2d(
        torch.conv2d(image, torch.from_numpy(exact(tensors, "down")), padding=1), torch.from_numpy(exact(tensors, "up"))
    )
    torch.testing.assert_close(
        torch.conv2d(image, kernel, padding=1), torch.conv2d(image, torch.from_numpy(base), padding=1) + 2 * side
    )


@given(seeds, sizes, sizes, ranks)
def test_a_convolution_of_extent_one_fits_a_base_that_is_linear(
    folder: Path, seed: int, out: int, width: int, rank: int
):
    tensors, base = factors(seed, (rank, width, 1, 1), (out, rank, 1, 1), 3.0), weight(out, width)
    update = 3.0 / rank * exact(tensors, "up")[:, :, 0, 0] @ exact(tensors, "down")[:, :, 0, 0]
    np.testing.assert_allclose(
        merged(read_kohya(saved(folder, tensors)), {DOTTED: base})[DOTTED], base + update, rtol=1e-12, atol=1e-12
    )


def test_a_missing_alpha_means_a_scaling_of_one(tmp_path: Path):
    """Known wrong answer: a missing alpha taken for 1, so that the update shrinks by the rank."""
    (update,) = read_kohya(saved(tmp_path, factors(0, (4, 6), (3, 4)))).changes
    assert update.scaling == 1.0


def test_alpha_is_divided_by_the_rank(tmp_path: Path):
    """Known wrong answer: alpha taken for alpha / rank."""
    (update,) = read_kohya(saved(tmp_path, factors(0, (4, 6), (3, 4), 8.0))).changes
    assert update.scaling == 2.0


def test_every_module_has_its_own_rank_and_alpha(tmp_path: Path):
    """Known wrong answer: one alpha for all modules."""
    tensors = (
        factors(0, (4, 6), (3, 4), 8.0, flat="lora_te_a")
        | factors(0, (2, 6), (3, 2), 3.0, flat="lora_te_b")
        | factors(0, (2, 6), (3, 2), flat="lora_te_c")
    )
    assert {change.module: change.scaling for change in read_kohya(saved(tmp_path, tensors)).changes} == {
        "a": 2.0,
        "b": 1.5,
        "c": 1.0,
    }


@pytest.mark.parametrize(
    "alpha", [np.array(8, np.int64), np.array([8.0], np.float32), np.array(8, bfloat16), np.array([[8]], np.int32)]
)
def test_alpha_is_read_however_it_was_stored(alpha: np.ndarray, tmp_path: Path):
    (update,) = read_kohya(saved(tmp_path, factors(0, (4, 6), (3, 4)) | {f"{FLAT}.alpha": alpha})).changes
    assert update.scaling == 2.0


@pytest.mark.parametrize("alpha", [np.array(np.nan), np.ones(2), np.array(True), np.ones(0)])
def test_what_is_no_alpha_is_refused(alpha: np.ndarray, tmp_path: Path):
    with pytest.raises(
        AdapterError, match=r"lora_unet_mid_block_to_q\.alpha' of dtype .* is no alpha; expected one finite number"
    ):
        read_kohya(saved(tmp_path, factors(0, (4, 6), (3, 4)) | {f"{FLAT}.alpha": alpha}))


COMPONENTS = ["unet", "transformer", "te", "te1", "te2", "te3"]


@pytest.mark.parametrize("component", COMPONENTS)
def test_one_component_is_read_and_the_others_are_named(component: str, tmp_path: Path):
    tensors = {
        key: value
        for name in COMPONENTS
        for key, value in factors(0, (2, 6), (3, 2), flat=f"lora_{name}_in_{name}").items()
    }
    adapter = read_kohya(saved(tmp_path, tensors), component)
    assert [change.module for change in adapter.changes] == [f"in_{component}"]
    assert set(adapter.skipped) == set(COMPONENTS) - {component}


def test_the_only_component_needs_no_choice(tmp_path: Path):
    adapter = read_kohya(saved(tmp_path, factors(0, (2, 6), (3, 2))))
    assert (adapter.format, adapter.spelling, adapter.skipped) == ("kohya", "flattened", ())


def test_one_of_several_components_has_to_be_chosen(tmp_path: Path):
    tensors = factors(0, (2, 6), (3, 2)) | factors(0, (2, 6), (3, 2), flat="lora_te1_x")
    with pytest.raises(AdapterError, match=r"holds updates of te1, unet; say which component"):
        read_kohya(saved(tmp_path, tensors))


def test_a_component_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"holds no updates of component 'te2'; it has unet"):
        read_kohya(saved(tmp_path, factors(0, (2, 6), (3, 2))), "te2")


REFUSED_SLOTS = {
    "lora_mid.weight": "LoCon",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "dora_scale": "DoRA as LyCORIS stores it",
    "diff": "full difference",
    "diff_b": "full difference",
    "oft_blocks": "OFT",
    "on_input": "IA3",
    "w_norm": "normalisation",
    "b_norm": "normalisation",
}


@pytest.mark.parametrize("slot", REFUSED_SLOTS)
def test_other_maths_is_refused_by_name(slot: str, tmp_path: Path):
    with pytest.raises(AdapterError, match="can't be merged here; convert the adapter to plain LoRA") as refusal:
        read_kohya(saved(tmp_path, factors(0, (2, 6), (3, 2)) | {f"{FLAT}.{slot}": np.ones((2, 2))}))
    assert REFUSED_SLOTS[slot] in str(refusal.value)
    assert f"'{FLAT}.{slot}'" in str(refusal.value)


UNREADABLE = {
    "'bundle_emb.x' belongs to no component; expected lora_unet_": factors(0, (2, 6), (3, 2))
    | {"bundle_emb.x": np.ones(3)},
    "'lora_prior_x.alpha' belongs to no component": factors(0, (2, 6), (3, 2)) | {"lora_prior_x.alpha": np.ones(1)},
    "'lora_unet_mid_block_to_q.bias' belongs to no layer": factors(0, (2, 6), (3, 2)) | {f"{FLAT}.bias": np.ones(3)},
    "'lora_unet_other.alpha' belongs to no layer": factors(0, (2, 6), (3, 2)) | {"lora_unet_other.alpha": np.ones(1)},
    "mid_block_to_q.lora_up.weight' is missing": {f"{FLAT}.lora_down.weight": np.ones((2, 6))},
    "'lora_unet_mid_block_to_q.lora_up.weight' belongs to no layer": {f"{FLAT}.lora_up.weight": np.ones((3, 2))},
    "'lora_unet_mid_block_to_q.lora_down.weight' holds NaN": factors(0, (2, 6), (3, 2))
    | {f"{FLAT}.lora_down.weight": np.full((2, 6), np.nan)},
    "but their ranks differ": factors(0, (2, 6), (3, 4)),
    "has a second convolution B (3, 2, 3, 3)": factors(0, (2, 6, 1, 1), (3, 2, 3, 3)),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_file_that_can_not_be_read_exactly_is_refused(message: str, tmp_path: Path):
    with pytest.raises(AdapterError) as refusal:
        read_kohya(saved(tmp_path, UNREADABLE[message]))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_flattened_name_that_two_modules_have_is_refused(tmp_path: Path):
    adapter = read_kohya(saved(tmp_path, factors(0, (2, 6), (3, 2))))
    with pytest.raises(AdapterError, match="'mid_block_to_q' stands for several modules"):
        merged(adapter, {"mid_block.to_q.weight": weight(3, 6), "mid.block.to_q.weight": weight(3, 6)})


@pytest.mark.parametrize("shape", [(3, 6, 3, 3), (3, 5, 1, 1), (4, 6), (3, 6, 1)])
def test_a_convolution_for_another_kernel_is_refused(shape: tuple[int, ...], tmp_path: Path):
    adapter = read_kohya(saved(tmp_path, factors(0, (2, 6, 1, 1), (3, 2, 1, 1))))
    with pytest.raises(AdapterError, match="trained on another model"):
        merged(adapter, {DOTTED: weight(*shape)})


def test_a_kernel_with_extent_is_not_squeezed(tmp_path: Path):
    adapter = read_kohya(saved(tmp_path, factors(0, (2, 6, 3, 3), (3, 2, 1, 1))))
    with pytest.raises(AdapterError, match="trained on another model"):
        merged(adapter, {DOTTED: weight(3, 6)})


def test_a_module_that_the_base_lacks_is_named(tmp_path: Path):
    adapter = read_kohya(saved(tmp_path, factors(0, (2, 6), (3, 2))))
    with pytest.raises(AdapterError, match="module 'mid_block_to_q' has no weight in the base"):
        merged(adapter, {"mid_block.to_k.weight": weight(3, 6)})
