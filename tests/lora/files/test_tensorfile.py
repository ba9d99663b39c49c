"""Safetensors files, against the safetensors library."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora.errors import CheckpointError
from lora.files.tensorfile import Lazy, TensorFile, TensorWriter, write_tensors

DTYPES = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def lazy(values: np.ndarray) -> Lazy:
    return Lazy(values.dtype, values.shape, lambda: values)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=5), st.integers(0, 2**32 - 1))
def test_what_is_written_is_read_by_us_and_by_the_library(
    tmp_path_factory: pytest.TempPathFactory, layout: dict, seed: int
):
    random, path = np.random.default_rng(seed), tmp_path_factory.mktemp("t") / "file"
    tensors = {name: random.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in layout.items()}
    write_tensors(path, {name: lazy(values) for name, values in tensors.items()}, {"k": "v"})
    for read in (load_file(path), TensorFile(path)):
        assert set(read) == set(tensors)
        for name, values in tensors.items():
            np.testing.assert_array_equal(read[name], values)
            assert read[name].dtype == values.dtype
    assert TensorFile(path).metadata == {"k": "v"}


def test_bfloat16_and_non_contiguous_arrays_survive(tmp_path: Path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16).T
    write_tensors(tmp_path / "file", {"a": lazy(values)})
    np.testing.assert_array_equal(TensorFile(tmp_path / "file")["a"], values)


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path):
    write_tensors(
        tmp_path / "file",
        {"a": lazy(np.zeros(3, np.int8)), "b": lazy(np.zeros(3, np.float64)), "c": lazy(np.zeros(3, np.float16))},
    )
    assert all(span.offset % span.dtype.itemsize == 0 for span in TensorFile(tmp_path / "file").spans.values())


def test_a_writer_takes_fewer_tensors_than_it_kept_room_for(tmp_path: Path):
    expected = {name: (np.dtype(np.float64), (5,)) for name in "abc"}
    with TensorWriter(tmp_path / "file", expected) as writer:
        writer.add("b", np.arange(5, dtype=np.float32))
    assert list(load_file(tmp_path / "file")) == ["b"]


def test_a_writer_that_fails_leaves_a_file_that_nobody_can_read(tmp_path: Path):
    with suppress(RuntimeError), TensorWriter(tmp_path / "file", {"a": (np.dtype(np.float32), (5,))}) as writer:
        writer.add("a", np.zeros(5, np.float32))
        raise RuntimeError
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        TensorFile(tmp_path / "file")


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path):
    save_file({"a": np.zeros(100, np.float32)}, tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"file: not a whole safetensors file \("):
        TensorFile(tmp_path / "file")


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file; expected a safetensors file"):
        TensorFile(tmp_path / "file")


def test_a_dtype_that_numpy_lacks_is_refused_by_name(tmp_path: Path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}'
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="tensor 'a' has dtype F8_E4M3"):
        TensorFile(tmp_path / "file")
