"""The maths of every change, against formulas in float64, over shapes, ranks, scales, layouts and dtypes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.adapter import Change, Increment, LowRank, Rows
from lora.errors import AdapterError
from lora.files.tensorfile import Array, numpy_dtype
from lora.merging.delta import changed, delta, error_bound
from lora.merging.merge import merge

sizes = st.integers(1, 9)
scales = st.floats(-8, 8).filter(lambda scale: abs(scale) > 1e-3)
dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
seeds = st.integers(0, 2**32 - 1)
EPSILON = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place


def normal(random: np.random.Generator, *shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


def check_merge(weight: Array, change: Change, want: Array) -> None:
    """What is stored is the formula's value, to within float32's error and one rounding to the weight's dtype."""
    try:
        stored = {merged.parameter: merged.stored for merged in merge({"w": weight}, {"w": [change]}, "test")}.get(
            "w", weight
        )
    except AdapterError as error:  # every weight was rounded back to what it was
        assert "changes none" in str(error), error
        stored = weight
    assert stored.dtype == weight.dtype
    bound = error_bound(change, weight.astype(np.float64)) + EPSILON[weight.dtype.name] * np.abs(want) * 1.01 + 1e-7
    assert (np.abs(stored.astype(np.float64) - want) <= bound).all()


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, sizes, scales, dtypes, st.booleans(), seeds)
def test_linear_and_transposed(
    rows: int, columns: int, rank: int, scale: float, dtype: str, transposed: bool, seed: int
):
    random = np.random.default_rng(seed)
    a, b = normal(random, rank, columns), normal(random, rows, rank)
    weight = normal(random, *((columns, rows) if transposed else (rows, columns))).astype(numpy_dtype(dtype))
    product = scale * b.astype(np.float64) @ a.astype(np.float64)
    change = LowRank("m", a, b, rank, scale, "transposed" if transposed else "linear")
    check_merge(weight, change, weight.astype(np.float64) + (product.T if transposed else product))


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, sizes, st.lists(st.integers(1, 3), min_size=1, max_size=3), scales, dtypes, seeds)
def test_convolutions_of_one_to_three_dimensions(
    out: int, channels: int, rank: int, kernel: list[int], scale: float, dtype: str, seed: int
):
    random = np.random.default_rng(seed)
    a, b = normal(random, rank, channels, *kernel), normal(random, out, rank, *[1] * len(kernel))
    weight = normal(random, out, channels, *kernel).astype(numpy_dtype(dtype))
    composed = np.einsum("or,ri...->oi...", b.astype(np.float64).reshape(out, rank), a.astype(np.float64))
    check_merge(weight, LowRank("m", a, b, rank, scale, "conv"), weight.astype(np.float64) + scale * composed)


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, sizes, sizes, scales, dtypes, st.booleans(), seeds)
def test_stacked_experts_in_both_layouts(
    experts: int, out: int, inner: int, rank: int, scale: float, dtype: str, out_first: bool, seed: int
):
    random = np.random.default_rng(seed)
    a, b = normal(random, experts * rank, inner), normal(random, out, rank * experts)
    weight = normal(random, *((experts, out, inner) if out_first else (experts, inner, out))).astype(numpy_dtype(dtype))
    subscripts = "ore,eri->eoi" if out_first else "ore,eri->eio"
    update = np.einsum(
        subscripts, b.astype(np.float64).reshape(out, rank, experts), a.astype(np.float64).reshape(experts, rank, inner)
    )
    check_merge(
        weight,
        LowRank("m", a, b, rank, scale, "experts" if out_first else "experts_transposed"),
        weight.astype(np.float64) + scale * update,
    )


@settings(max_examples=150, deadline=None)
@given(sizes, sizes, sizes, scales, dtypes, seeds)
def test_dora_sets_the_norm_of_each_output_row(rows: int, columns: int, rank: int, scale: float, dtype: str, seed: int):
    random = np.random.default_rng(seed)
    a, b, magnitude = normal(random, rank, columns), normal(random, rows, rank), np.abs(normal(random, rows)) + 0.1
    weight = normal(random, rows, columns).astype(numpy_dtype(dtype))
    updated = weight.astype(np.float64) + scale * b.astype(np.float64) @ a.astype(np.float64)
    change = LowRank("m", a, b, rank, scale, magnitude=magnitude)
    check_merge(
        weight, change, magnitude[:, None].astype(np.float64) * updated / np.linalg.norm(updated, axis=1, keepdims=True)
    )


@settings(max_examples=60, deadline=None)
@given(sizes, scales, dtypes, seeds)
def test_a_bias_is_incremented_by_the_scaled_value(size: int, scale: float, dtype: str, seed: int):
    random = np.random.default_rng(seed)
    bias, value = normal(random, size).astype(numpy_dtype(dtype)), normal(random, size)
    check_merge(bias, Increment("m", value, scale), bias.astype(np.float64) + scale * value.astype(np.float64))


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 8), min_size=1), sizes, seeds)
def test_trained_rows_are_replaced_and_the_others_kept(rows: set[int], width: int, seed: int):
    random = np.random.default_rng(seed)
    weight, values = normal(random, 9, width), normal(random, len(rows), width)
    result = changed(Rows("m", tuple(rows), values), weight)
    others = sorted(set(range(9)) - rows)
    np.testing.assert_array_equal(result[list(rows)], values)
    np.testing.assert_array_equal(result[others], weight[others])


@given(sizes, sizes, scales, seeds)
def test_the_update_is_linear_in_its_scaling(rows: int, columns: int, scale: float, seed: int):
    random = np.random.default_rng(seed)
    a, b = normal(random, 2, columns), normal(random, rows, 2)
    one, scaled = (delta(LowRank("m", a, b, 2, factor), (rows, columns), np.float64) for factor in (1.0, scale))
    np.testing.assert_allclose(scaled, scale * one)
