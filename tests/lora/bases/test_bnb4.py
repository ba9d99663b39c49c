"""Value for value against bitsandbytes itself, on the CPU; damaged files are refused before anything is dequantized.

bitsandbytes 0.50.2 has two implementations for the CPU: one in plain torch for every device, and a kernel, which has a
path with AVX-512 and one without. The kernel is wrong where a row does not end with a block: of a 3 × 96 weight in
blocks of 64 it gives back values three times as far from the original as the other's. So the plain one is the oracle,
and the kernel is where it agrees.

A value is one float32 product, rounded once: IEEE 754 leaves no choice, so every implementation must give equal values
on every processor. The sign of a zero is no part of that. fp4 has two codes for zero. The code book holds +0.0 for
both, and the plain implementation, the kernel's path with AVX-512 and we give what the book holds; its path without
AVX-512 takes the sign from the code's first bit and gives −0.0 for the second.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora.bases.bnb4 import PIECE, Bnb4
from lora.errors import CheckpointError
from lora.files.tensorfile import Array

W = "layer.weight"
HERE = Path("checkpoint")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantized(
    weight: torch.Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False
) -> dict[str, Array]:
    """The tensors that bitsandbytes saves for a weight, under the names that transformers gives them."""
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    return {W: packed.numpy()} | {f"{W}.{part}": value.numpy() for part, value in state.as_dict(packed=True).items()}


def read_state(tensors: dict[str, Array]) -> functional.QuantState:
    parts = {name.removeprefix(f"{W}."): torch.from_numpy(value.copy()) for name, value in tensors.items() if name != W}
    return functional.QuantState.from_dict(parts, device=torch.device("cpu"))


def by_bitsandbytes(tensors: dict[str, Array]) -> torch.Tensor:
    state, packed = read_state(tensors), torch.from_numpy(tensors[W].copy()).reshape(-1)
    scales = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    )
    with torch.compiler.set_stance("force_eager"):  # it would be compiled anew for every shape
        return _dequantize_4bit_compute(packed, scales, state.code, state.blocksize, state.shape, state.dtype)


def random_weight(shape: tuple[int, ...], dtype: str = "bfloat16", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def small(**changes: object) -> dict[str, Array]:
    """A nested weight of 33 × 5 elements, with ``changes`` to its quant state; a None removes the field."""
    tensors = quantized(random_weight((33, 5)), nested=True)
    mark = f"{W}.quant_state.bitsandbytes__nf4"
    fields = json.loads(tensors[mark].tobytes()) | changes
    text = json.dumps({name: value for name, value in fields.items() if value is not None})
    return tensors | {mark: np.frombuffer(text.encode(), np.uint8)}


def assert_same_values(ours: Array, theirs: torch.Tensor) -> None:
    """Of one dtype and shape, and equal without a tolerance; +0.0 and −0.0 are equal."""
    assert str(theirs.dtype) == f"torch.{ours.dtype}"
    assert ours.shape == tuple(theirs.shape)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple),
    quant_type=st.sampled_from(("nf4", "fp4")),
    blocksize=st.sampled_from(BLOCKSIZES),
    nested=st.booleans(),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 1000),
)
@example(shape=(1,), quant_type="nf4", blocksize=64, nested=True, dtype="float32", seed=0)
@example(shape=(7, 13), quant_type="fp4", blocksize=32, nested=True, dtype="bfloat16", seed=0)
@example(
    shape=(300, 70), quant_type="nf4", blocksize=32, nested=True, dtype="float16", seed=0
)  # more than one group of scales
@settings(max_examples=100, deadline=None)
def test_a_weight_is_what_bitsandbytes_dequantizes(shape, quant_type, blocksize, nested, dtype, seed):
    tensors = quantized(random_weight(shape, dtype, seed), quant_type, blocksize, nested)
    assert_same_values(Bnb4(tensors, HERE)[W], by_bitsandbytes(tensors))


@pytest.mark.parametrize("blocksize", [64, 4096])
def test_a_weight_of_several_pieces_is_what_bitsandbytes_dequantizes(blocksize):
    rows = 2 * PIECE // 1001 + 1  # the last piece is short, and of an odd number of elements
    tensors = quantized(random_weight((rows, 1001)), blocksize=blocksize, nested=True)
    assert_same_values(Bnb4(tensors, HERE)[W], by_bitsandbytes(tensors))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_where_rows_end_with_blocks_bitsandbytes_public_function_agrees(quant_type, nested, dtype):
    tensors = quantized(random_weight((48, 192), dtype), quant_type, nested=nested)
    assert_same_values(
        Bnb4(tensors, HERE)[W], functional.dequantize_4bit(torch.from_numpy(tensors[W].copy()), read_state(tensors))
    )


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("nested", [False, True])
def test_both_zeros_of_fp4_are_positive_as_the_code_book_has_them(nested, dtype):
    tensors = quantized(random_weight((48, 192), dtype), "fp4", nested=nested)
    codes = np.stack([tensors[W] >> 4, tensors[W] & 15], axis=-1).reshape(48, 192)
    assert {0, 8} <= set(codes.flat)  # the weight has zeros of both codes
    ours = Bnb4(tensors, HERE)[W].astype(np.float32)
    np.testing.assert_array_equal(ours[codes % 8 == 0].view(np.uint32), 0)
    assert not by_bitsandbytes(tensors).signbit()[torch.from_numpy(codes % 8 == 0)].any()


def test_codes_stored_as_another_dtype_are_the_same_codes():
    tensors = quantized(random_weight((8, 16)))
    stored_wide = tensors | {W: tensors[W].reshape(-1).view(np.float32).reshape(-1, 1)}
    np.testing.assert_array_equal(Bnb4(stored_wide, HERE)[W], Bnb4(tensors, HERE)[W])


def test_other_tensors_are_as_stored_and_parts_are_hidden():
    bias = np.arange(3, dtype=np.float16)
    weights = Bnb4(small() | {"layer.bias": bias}, HERE)
    assert sorted(weights) == ["layer.bias", W]
    assert weights["layer.bias"] is bias
    assert len(weights) == 2
    assert f"{W}.absmax" not in weights
    with pytest.raises(KeyError):
        weights[f"{W}.absmax"]


def test_shape_is_known_without_dequantizing():
    weights = Bnb4(small() | {"layer.bias": np.zeros(4)}, HERE)
    assert weights.shape(W) == (33, 5)
    assert weights.shape("layer.bias") == (4,)


def test_nothing_is_read_on_opening_but_states_and_sizes(monkeypatch):
    monkeypatch.setattr("lora.bases.bnb4._dequantized", lambda *_: pytest.fail("dequantized on opening"))
    assert W in Bnb4(small(), HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_type": "nf3"}, "Invalid enum value 'nf3'"),
        ({"quant_type": "fp4"}, "quant state of type fp4"),
        ({"blocksize": 63}, "Invalid enum value 63"),
        ({"blocksize": 32}, "absmax.*needs uint8 \\(6,\\)"),
        ({"blocksize": None}, "missing required field `blocksize`"),
        ({"dtype": "float64"}, "Invalid enum value 'float64'"),
        ({"shape": [33, 7]}, "needs uint8 \\(4,\\)"),
        ({"shape": [165, 0]}, "Expected `int` >= 1"),
        ({"shape": [32, 5]}, "'layer.weight' is uint8 \\(83, 1\\).*is 80 bytes"),
        ({"nested_blocksize": 1}, "nested_absmax.*needs float32 \\(3,\\)"),
        ({"nested_offset": None}, "some of nested_blocksize"),
        ({"nested_blocksize": None, "nested_dtype": None, "nested_offset": None}, "absmax.*needs float32 \\(3,\\)"),
        ({"unknown": 1}, "unknown field `unknown`"),
    ],
)
def test_a_wrong_quant_state_is_refused_by_name(changes, message):
    with pytest.raises(CheckpointError, match=f"^checkpoint: .*{message}"):
        Bnb4(small(**changes), HERE)


@pytest.mark.parametrize("cut", [0, 1, 40, 150])
def test_a_truncated_quant_state_is_refused(cut):
    tensors = small()
    mark = f"{W}.quant_state.bitsandbytes__nf4"
    assert len(tensors[mark]) > cut
    with pytest.raises(CheckpointError, match=f"'{mark}' is not a quant state"):
        Bnb4(tensors | {mark: tensors[mark][:cut]}, HERE)


def test_a_quant_state_that_is_no_text_is_refused():
    with pytest.raises(CheckpointError, match="is not a quant state"):
        Bnb4(small() | {f"{W}.quant_state.bitsandbytes__nf4": np.full(9, 0xFF, np.uint8)}, HERE)


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_tensor_is_refused_by_name(part):
    tensors = small()
    del tensors[W + part]
    with pytest.raises(CheckpointError, match=f"'{W + part}' is missing"):
        Bnb4(tensors, HERE)


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_tensor_of_another_length_is_refused_by_name(part):
    tensors = small()
    with pytest.raises(CheckpointError, match=f"'{W + part}' is"):
        Bnb4(tensors | {W + part: tensors[W + part][:-1]}, HERE)


def test_codes_laid_out_in_a_row_are_refused():
    tensors = small()
    with pytest.raises(CheckpointError, match="codes in one column"):
        Bnb4(tensors | {W: tensors[W].T}, HERE)


def test_scales_without_a_quant_state_are_refused():
    tensors = small()
    del tensors[f"{W}.quant_state.bitsandbytes__nf4"]
    with pytest.raises(CheckpointError, match=f"'{W}' has a tensor absmax but no quant state"):
        Bnb4(tensors, HERE)


def test_another_code_book_is_refused():
    """bitsandbytes ignores the file's own code book, so one that differs leaves open what the weights are."""
    tensors = small()
    with pytest.raises(CheckpointError, match="quant_map' is not nf4's"):
        Bnb4(tensors | {f"{W}.quant_map": tensors[f"{W}.quant_map"] + np.float32(1e-4)}, HERE)
