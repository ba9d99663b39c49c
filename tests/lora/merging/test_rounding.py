"""What rounding costs, on the random Gaussian weights of the known figures."""

from __future__ import annotations

import numpy as np
import pytest

from lora.adapter import LowRank, Replacement
from lora.files.tensorfile import numpy_dtype
from lora.merging.merge import merge
from lora.merging.rounding import survival

SIZE, RANK = 512, 8


def of_relative_size(relative: float, dtype: str):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(SIZE, SIZE)).astype(numpy_dtype(dtype))
    a, b = rng.normal(size=(RANK, SIZE)).astype(np.float32), rng.normal(size=(SIZE, RANK)).astype(np.float32)
    scaling = relative * np.linalg.norm(weight.astype(np.float64)) / np.linalg.norm(b.astype(np.float64) @ a)
    (merged,) = merge({"m.weight": weight}, {"m.weight": [LowRank("m", a, b, RANK, float(scaling))]}, "test")
    exact = weight.astype(np.float64) + scaling * b.astype(np.float64) @ a
    return survival(merged), merged, exact, weight


@pytest.mark.parametrize(
    ("relative", "dtype", "lost"),
    [(1e-2, "bfloat16", 0.17), (1e-3, "bfloat16", 0.78), (1e-2, "float16", 0.021), (1e-3, "float16", 0.21)],
)
def test_the_share_that_is_lost_grows_as_the_update_shrinks(relative: float, dtype: str, lost: float):
    report, merged, exact, weight = of_relative_size(relative, dtype)
    by_formula = np.linalg.norm(merged.stored.astype(np.float64) - exact) / np.linalg.norm(
        exact - weight.astype(np.float64)
    )
    assert report.lost == pytest.approx(by_formula, rel=1e-3)
    assert report.lost == pytest.approx(lost, rel=0.1)
    assert report.warns == (lost > 0.1)


def test_most_weights_are_left_as_they_were_when_a_small_update_is_stored_in_bfloat16():
    report, merged, _, weight = of_relative_size(1e-3, "bfloat16")
    assert report.unchanged == pytest.approx(np.mean(merged.stored.view(np.uint16) == weight.view(np.uint16)))
    assert report.unchanged == pytest.approx(0.78, abs=0.05)


def test_float32_loses_next_to_nothing():
    assert of_relative_size(1e-3, "float32")[0].lost < 1e-4


def test_a_new_tensor_has_nothing_to_lose():
    (merged,) = merge({}, {"head.weight": [Replacement("head.weight", np.ones(3, np.float32))]}, "test")
    assert survival(merged) is None
