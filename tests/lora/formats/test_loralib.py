"""Reading loralib state dicts: the formulas of its layers, what the user has to say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from lora.adapter import Adapter
from lora.errors import AdapterError
from lora.formats.loralib import read_loralib
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply

sizes, ranks = st.integers(1, 9), st.integers(1, 5)
alphas = st.floats(-64, 64)
dtypes = st.sampled_from([np.float16, bfloat16, np.float32, np.float64])
seeds = st.integers(0, 2**32 - 1)


def factors(seed: int, a: tuple[int, ...], b: tuple[int, ...], dtype=np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"layer.lora_A": random.normal(size=a).astype(dtype), "layer.lora_B": random.normal(size=b).astype(dtype)}


def saved(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape)


def merged(adapter: Adapter, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        name: apply(changes, base[name], np.float64) for name, changes in changes_by_parameter(base, adapter).items()
    }


def product(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return tensors["layer.lora_B"].astype(np.float64) @ tensors["layer.lora_A"].astype(np.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("loralib")


@given(seeds, sizes, sizes, ranks, alphas, dtypes, st.booleans())
def test_a_linear_layer_gains_alpha_over_r_times_b_a(
    folder: Path, seed: int, out: int, width: int, r: int, alpha: float, dtype: type, stored_in_out: bool
):
    tensors = factors(seed, (r, width), (out, r), dtype)
    base = weight(width, out) if stored_in_out else weight(out, width)
    update = alpha / r * product(tensors)
    found = merged(read_loralib(saved(folder, tensors), alpha, fan_in_fan_out=stored_in_out), {"layer.weight": base})
    np.testing.assert_allclose(
        found["layer.weight"], base + (update.T if stored_in_out else update), rtol=1e-12, atol=1e-12
    )


@given(seeds, sizes, sizes, ranks, alphas)
def test_an_embedding_gains_the_transposed_product(
    folder: Path, seed: int, vocabulary: int, width: int, r: int, alpha: float
):
    assume(vocabulary != width)  # a square one is what the user says
    tensors, base = factors(seed, (r, vocabulary), (width, r)), weight(vocabulary, width)
    found = merged(read_loralib(saved(folder, tensors), alpha), {"layer.weight": base})
    np.testing.assert_allclose(found["layer.weight"], base + alpha / r * product(tensors).T, rtol=1e-12, atol=1e-12)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), ranks, st.integers(1, 4), alphas, st.booleans())
def test_a_convolution_takes_the_product_as_its_bytes(
    folder: Path, seed: int, out: int, width: int, groups: int, r: int, k: int, alpha: float, wrapped: bool
):
    name = "layer.conv.weight" if wrapped else "layer.weight"
    tensors, base = factors(seed, (r * k, width * groups * k), (out * k, r * k)), weight(out * groups, width, k, k)
    found = merged(read_loralib(saved(folder, tensors), alpha), {name: base})
    np.testing.assert_allclose(
        found[name], base + alpha / r * product(tensors).reshape(base.shape), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(4, 6, 1), (4, 6, 1, 1, 1)])
def test_a_convolution_of_one_or_three_dimensions_has_extent_one(shape: tuple[int, ...], tmp_path: Path):
    tensors, base = factors(0, (2, 6), (4, 2)), weight(*shape)
    found = merged(read_loralib(saved(tmp_path, tensors), 5.0), {"layer.weight": base})
    np.testing.assert_allclose(found["layer.weight"], base + 2.5 * product(tensors).reshape(shape), rtol=1e-12)


@given(
    seeds,
    st.lists(st.booleans(), min_size=1, max_size=4).filter(any),
    st.integers(1, 3),
    sizes,
    ranks,
    alphas,
    dtypes,
    st.booleans(),
)
def test_a_fused_layer_gains_one_product_per_enabled_part(
    folder: Path,
    seed: int,
    enabled: list[bool],
    rows: int,
    width: int,
    r: int,
    alpha: float,
    dtype: type,
    stored_in_out: bool,
):
    parts = sum(enabled)
    tensors = factors(seed, (r * parts, width), (rows * parts, r), dtype)
    pairs = zip(
        np.split(tensors["layer.lora_B"].astype(np.float64), parts),
        np.split(tensors["layer.lora_A"].astype(np.float64), parts),
        strict=True,
    )
    update = np.concatenate([alpha / r * np.matmul(*next(pairs)) if on else np.zeros((rows, width)) for on in enabled])
    base = np.ascontiguousarray(weight(*update.shape).T if stored_in_out else weight(*update.shape))
    found = merged(read_loralib(saved(folder, tensors), alpha, tuple(enabled), stored_in_out), {"layer.weight": base})
    np.testing.assert_allclose(
        found["layer.weight"], base + (update.T if stored_in_out else update), rtol=1e-12, atol=1e-12
    )


def test_alpha_is_divided_by_the_rank(tmp_path: Path):
    """Known wrong answer: alpha taken for alpha / r."""
    (update,) = read_loralib(saved(tmp_path, factors(0, (4, 6), (3, 4))), 8.0).changes
    assert update.scaling == 2.0


def test_the_rank_of_a_fused_layer_is_not_that_of_its_stacked_factors(tmp_path: Path):
    """Known wrong answer: the rank of a fused QKV tripled, and its scaling divided by three."""
    (update,) = read_loralib(saved(tmp_path, factors(0, (12, 6), (18, 4))), 8.0, (True, True, True)).changes
    assert (update.rank, update.scaling) == (4, 2.0)


def test_the_rank_of_a_kernel_is_not_that_of_its_factors(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (12, 18), (15, 12))), 8.0)
    ((update,),) = changes_by_parameter({"layer.weight": weight(5, 6, 3, 3)}, adapter).values()
    assert (update.rank, update.scaling) == (4, pytest.approx(2.0))


@pytest.mark.parametrize("alpha", [None, float("nan"), float("inf")])
def test_a_missing_alpha_is_asked_for(alpha: float | None, tmp_path: Path):
    """Known wrong answer: a default in place of the alpha that the file lacks."""
    with pytest.raises(AdapterError, match=r"lora\.safetensors: loralib saves no alpha; give the lora_alpha"):
        read_loralib(saved(tmp_path, factors(0, (2, 6), (3, 2))), alpha)


@pytest.mark.parametrize("stored_in_out", [False, True])
def test_a_square_weight_is_stored_as_the_user_says(stored_in_out: bool, tmp_path: Path):
    tensors, base = factors(0, (2, 5), (5, 2)), weight(5, 5)
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0, fan_in_fan_out=stored_in_out), {"layer.weight": base})
    np.testing.assert_allclose(
        found["layer.weight"], base + (product(tensors).T if stored_in_out else product(tensors))
    )


def test_a_square_weight_needs_the_users_word(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (2, 5), (5, 2))), 2.0)
    with pytest.raises(AdapterError, match=r"'layer' is square.*give fan_in_fan_out"):
        merged(adapter, {"layer.weight": weight(5, 5)})


def test_a_square_fused_weight_needs_the_users_word(tmp_path: Path):
    with pytest.raises(AdapterError, match=r"'layer' has a square weight.*give fan_in_fan_out"):
        read_loralib(saved(tmp_path, factors(0, (4, 6), (6, 2))), 2.0, (True, True))


def test_a_square_product_may_be_a_kernels(tmp_path: Path):
    tensors, base = factors(0, (4, 6), (6, 4)), weight(3, 3, 2, 2)
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0, fan_in_fan_out=True), {"layer.weight": base})
    np.testing.assert_allclose(found["layer.weight"], base + product(tensors).reshape(base.shape))


def test_plain_layers_stand_beside_fused_ones(tmp_path: Path):
    tensors = factors(0, (4, 7), (4, 2)) | {"plain.lora_A": np.ones((2, 7)), "plain.lora_B": np.ones((3, 2))}
    base = {"layer.weight": np.zeros((6, 7)), "plain.weight": np.zeros((3, 7))}
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0, (True, False, True)), base)
    np.testing.assert_array_equal(found["plain.weight"], np.full((3, 7), 2.0))
    assert [bool(rows.any()) for rows in np.split(found["layer.weight"], 3)] == [True, False, True]


def test_with_one_enabled_part_a_plain_layer_is_refused_and_not_misread(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (2, 6), (5, 2))), 2.0, (True, False, False))
    with pytest.raises(AdapterError, match="the base has"):
        merged(adapter, {"layer.weight": weight(5, 6)})


def test_a_model_that_is_one_layer_has_no_name(tmp_path: Path):
    tensors = {"lora_A": np.ones((2, 6)), "lora_B": np.ones((5, 2)), "bias": np.ones(5)}
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0), {"weight": np.zeros((5, 6)), "bias": np.zeros(5)})
    assert {name: values.mean() for name, values in found.items()} == {"weight": 2.0, "bias": 1.0}


@pytest.mark.parametrize(
    "name", ["layer.bias", "norm.bias", "attention.in_proj_bias", "relative_attention_bias.weight"]
)
def test_a_saved_bias_replaces_the_bases(name: str, tmp_path: Path):
    tensors = factors(0, (2, 6), (5, 2)) | {name: np.full(5, 3.0, np.float32)}
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0), {"layer.weight": weight(5, 6), name: np.ones(5)})
    np.testing.assert_array_equal(found[name], np.full(5, 3.0))


@pytest.mark.parametrize("name", ["layer.bias", "layer.conv.bias"])
def test_a_convolutions_saved_bias_finds_the_base_wrapped_or_plain(name: str, tmp_path: Path):
    tensors = factors(0, (2, 6), (5, 2)) | {"layer.conv.bias": np.full(5, 3.0, np.float32)}
    kernel = name.replace("bias", "weight")
    found = merged(read_loralib(saved(tmp_path, tensors), 2.0), {kernel: weight(5, 6, 1), name: np.ones(5)})
    np.testing.assert_array_equal(found[name], np.full(5, 3.0))


def test_a_saved_bias_that_the_base_lacks_is_refused(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (2, 6), (5, 2)) | {"head.bias": np.ones(2, np.float32)}), 2.0)
    with pytest.raises(AdapterError, match=r"the base has no 'head\.bias'"):
        merged(adapter, {"layer.weight": weight(5, 6)})


def test_a_saved_bias_of_another_length_is_refused(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (2, 6), (5, 2)) | {"layer.bias": np.ones(2, np.float32)}), 2.0)
    with pytest.raises(AdapterError, match=r"'layer\.bias' fits a base tensor of shape \(2,\)"):
        merged(adapter, {"layer.weight": weight(5, 6), "layer.bias": np.ones(5)})


UNREADABLE = {
    "is a MergedLinear with updates for 2 of its parts; give enable_lora": (factors(0, (4, 6), (6, 2)), None),
    "has updates for 2 parts in B (6, 2), but enable_lora": (factors(0, (4, 6), (6, 2)), (True, True, True)),
    "has updates for 2 parts in B (5, 2), but enable_lora": (factors(0, (4, 6), (5, 2)), (True, True)),
    "no layer of the file is a MergedLinear; leave it out": (factors(0, (2, 6), (5, 2)), (True, True)),
    "expected at least one part": (factors(0, (4, 6), (6, 2)), (False, False)),
    "has factors A (3, 6) and B (5, 2)": (factors(0, (3, 6), (5, 2)), None),
    "has factors A (2, 6) and B (5, 4)": (factors(0, (2, 6), (5, 4)), None),
    "has factors A (2, 6, 1) and B (5, 2)": (factors(0, (2, 6, 1), (5, 2)), None),
    "has factors A (2,) and B (5, 2)": (factors(0, (2,), (5, 2)), None),
    "has factors A (0, 6) and B (5, 0)": (factors(0, (0, 6), (5, 0)), None),
    "'layer.lora_B' is missing": ({"layer.lora_A": np.ones((2, 6))}, None),
    "'layer.lora_B' belongs to no layer": ({"layer.lora_B": np.ones((5, 2))}, None),
    "'layer.weight' belongs to no layer": (factors(0, (2, 6), (5, 2)) | {"layer.weight": np.ones((5, 6))}, None),
    "'layer.lora_C' belongs to no layer": (factors(0, (2, 6), (5, 2)) | {"layer.lora_C": np.ones((5, 6))}, None),
    "'layer.lora_A' has dtype int64": (
        {"layer.lora_A": np.ones((2, 6), np.int64), "layer.lora_B": np.ones((5, 2))},
        None,
    ),
    "'layer.lora_A' holds NaN": ({"layer.lora_A": np.full((2, 6), np.nan), "layer.lora_B": np.ones((5, 2))}, None),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_a_file_that_can_not_be_read_exactly_is_refused(message: str, tmp_path: Path):
    tensors, enable_lora = UNREADABLE[message]
    with pytest.raises(AdapterError) as refusal:
        read_loralib(saved(tmp_path, tensors), 2.0, enable_lora)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


NO_KERNEL = {
    "three taps": ((2, 6), (4, 2), (4, 6, 3)),
    "loralib's own shapes for three taps": ((6, 18), (12, 6), (4, 6, 3)),
    "uneven kernel": ((6, 18), (12, 6), (4, 6, 3, 1)),
    "rank no multiple of the extent": ((4, 18), (12, 4), (4, 6, 3, 3)),
    "other channels in": ((6, 15), (12, 6), (4, 6, 3, 3)),
    "other channels out": ((6, 18), (15, 6), (4, 6, 3, 3)),
    "same number of values": ((6, 9), (24, 6), (4, 6, 3, 3)),
    "a vector": ((2, 6), (4, 2), (24,)),
    "an empty kernel": ((2, 6), (4, 2), (4, 0, 3, 3)),
}


@pytest.mark.parametrize("case", NO_KERNEL)
def test_factors_that_are_no_such_kernels_are_refused(case: str, tmp_path: Path):
    a, b, shape = NO_KERNEL[case]
    adapter = read_loralib(saved(tmp_path, factors(0, a, b)), 2.0)
    with pytest.raises(AdapterError, match="whose product is no kernel of shape"):
        merged(adapter, {"layer.weight": weight(*shape)})


def test_a_fused_layer_read_as_a_plain_one_is_refused_with_a_hint(tmp_path: Path):
    adapter = read_loralib(saved(tmp_path, factors(0, (2, 6), (5, 2))), 2.0)
    with pytest.raises(AdapterError, match="give enable_lora"):
        merged(adapter, {"layer.weight": weight(15, 6)})
