"""A real Llama against transformers' own reading of it, bit for bit; small files written by the gguf package for the
rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora.bases.gguf_llama import GgufBase, _halves
from lora.errors import CheckpointError
from lora.files.tensorfile import Array
from scripts.support.packaged_files import smollm2

LAYERS, WIDTH, HEADS, KV_HEADS, INNER, VOCABULARY = 2, 64, 4, 2, 96, 40
SHAPES = {
    "attn_norm.weight": (WIDTH,),
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_v.weight": (WIDTH // HEADS * KV_HEADS, WIDTH),
    "attn_output.weight": (WIDTH, WIDTH),
    "ffn_norm.weight": (WIDTH,),
    "ffn_gate.weight": (INNER, WIDTH),
    "ffn_up.weight": (INNER, WIDTH),
    "ffn_down.weight": (WIDTH, INNER),
}
FIELDS = {"llama.block_count": LAYERS, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS}
Q_PROJ, K_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"


def made_tensors() -> dict[str, Array]:
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in SHAPES.items()}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(
    path: Path, tensors: dict[str, Array], fields: dict | None = None, kind: str = "F32", architecture: str = "llama"
) -> Path:
    """A GGUF file; matrices are stored as ``kind``. A None among the fields removes one."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (FIELDS | (fields or {})).items():
        match value:
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
            case int():
                writer.add_uint32(key, value)
    for name, values in tensors.items():
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(values: Array, heads: int) -> Array:
    """What llama.cpp's converter does to a query or key, one row at a time: row j · d/2 + i of a head goes to row 2i +
    j.
    """
    size = values.shape[0] // heads
    moved = np.empty_like(values)
    for head in range(heads):
        for row in range(size):
            half, angle = divmod(row, size // 2)
            moved[head * size + 2 * angle + half] = values[head * size + row]
    return moved


def test_a_real_llama_is_what_transformers_reads():
    import torch
    import transformers

    path = smollm2()
    base = GgufBase(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = model.state_dict()
    assert {*base, *base.tied} == theirs.keys()
    assert base.quantized == ("Q4_1", "Q8_0")
    different = [
        name
        for name, values in theirs.items()
        if not np.array_equal(base[name].view(np.uint32), values.numpy().view(np.uint32))
    ]
    assert different == []
    assert all(base.shape(name) == tuple(values.shape) for name, values in theirs.items())


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(0, 4))
@settings(deadline=None)
def test_rows_come_back_in_the_order_of_transformers(heads, half, columns):
    shape = (heads * half * 2, columns) if columns else (heads * half * 2,)  # without columns: a bias
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(_halves(interleaved(rows, heads), heads), rows)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_tensors_become_float32(tmp_path, kind):
    tensors = made_tensors()
    base = GgufBase(write(tmp_path / "a.gguf", tensors, kind=kind))
    stored = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(tensors["blk.1.ffn_down.weight"], stored), stored)
    np.testing.assert_array_equal(base["model.layers.1.mlp.down_proj.weight"], expected)
    assert base[Q_PROJ + ".weight"].dtype == np.float32
    assert base.shape(Q_PROJ + ".weight") == (WIDTH, WIDTH)
    assert base.quantized == (kind,)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_plain_tensors_keep_their_dtype(tmp_path, kind, dtype):
    tensors = made_tensors()
    base = GgufBase(write(tmp_path / "a.gguf", tensors, kind=kind))
    embedding = base["model.embed_tokens.weight"]
    assert embedding.dtype == dtype
    np.testing.assert_array_equal(embedding, tensors["token_embd.weight"].astype(dtype))
    assert base.quantized == ()


def test_queries_keys_and_their_biases_are_reordered_and_nothing_else(tmp_path):
    tensors = made_tensors() | {
        "blk.1.attn_q.bias": np.arange(WIDTH, dtype=np.float32),
        "blk.1.attn_v.bias": np.arange(KV_HEADS * 16, dtype=np.float32),
    }
    stored = {name: interleaved(values, HEADS) if "attn_q" in name else values for name, values in tensors.items()}
    stored |= {name: interleaved(values, KV_HEADS) for name, values in tensors.items() if "attn_k" in name}
    base = GgufBase(write(tmp_path / "a.gguf", stored))
    np.testing.assert_array_equal(base[Q_PROJ + ".weight"], tensors["blk.1.attn_q.weight"])
    np.testing.assert_array_equal(base[Q_PROJ + ".bias"], tensors["blk.1.attn_q.bias"])
    np.testing.assert_array_equal(base[K_PROJ + ".weight"], tensors["blk.1.attn_k.weight"])
    np.testing.assert_array_equal(base["model.layers.1.self_attn.v_proj.bias"], tensors["blk.1.attn_v.bias"])
    np.testing.assert_array_equal(base["model.layers.1.self_attn.o_proj.weight"], tensors["blk.1.attn_output.weight"])
    np.testing.assert_array_equal(base["model.layers.1.mlp.gate_proj.weight"], tensors["blk.1.ffn_gate.weight"])
    np.testing.assert_array_equal(base["model.layers.0.mlp.up_proj.weight"], tensors["blk.0.ffn_up.weight"])


def test_without_head_count_kv_keys_have_as_many_heads_as_queries(tmp_path):
    tensors = made_tensors()
    stored = tensors | {"blk.1.attn_k.weight": interleaved(tensors["blk.1.attn_k.weight"], HEADS)}
    base = GgufBase(write(tmp_path / "a.gguf", stored, {"llama.attention.head_count_kv": None}))
    np.testing.assert_array_equal(base[K_PROJ + ".weight"], tensors["blk.1.attn_k.weight"])


def test_a_missing_output_embedding_is_tied_and_a_stored_one_is_not(tmp_path):
    tied = GgufBase(write(tmp_path / "tied.gguf", made_tensors()))
    assert "lm_head.weight" in tied
    assert "lm_head.weight" not in list(tied)
    np.testing.assert_array_equal(tied["lm_head.weight"], tied["model.embed_tokens.weight"])
    untied = GgufBase(
        write(tmp_path / "untied.gguf", made_tensors() | {"output.weight": np.ones((VOCABULARY, WIDTH), np.float32)})
    )
    assert untied.tied == {}
    assert len(untied) == len(tied) + 1
    assert untied["lm_head.weight"].min() == 1


def test_rotary_factors_are_no_parameters(tmp_path):
    plain = GgufBase(write(tmp_path / "a.gguf", made_tensors()))
    with_factors = GgufBase(write(tmp_path / "b.gguf", made_tensors() | {"rope_freqs.weight": np.ones(8, np.float32)}))
    assert list(with_factors) == list(plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"split.count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"llama.block_count": 3}, "holds 2 layers, but llama.block_count is 3"),
        ({"llama.block_count": 1}, "holds 2 layers, but llama.block_count is 1"),
        ({"llama.block_count": None}, "llama.block_count is None"),
        ({"llama.attention.head_count": None}, "llama.attention.head_count is None"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is \\[4, 4\\]; expected a positive number"),
        ({"llama.attention.head_count": 5}, "q_proj.weight' has 64 rows, which 5 heads"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_field(tmp_path, fields, message):
    path = write(tmp_path / "a.gguf", made_tensors(), fields)
    with pytest.raises(CheckpointError, match=f"^{path}: .*{message}"):
        GgufBase(path)


def test_another_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'qwen2'; only 'llama' is read"):
        GgufBase(write(tmp_path / "a.gguf", made_tensors(), architecture="qwen2"))


def test_experts_are_refused_by_tensor(tmp_path):
    tensors = made_tensors() | {"blk.0.ffn_gate_exps.weight": np.zeros((2, INNER, WIDTH), np.float32)}
    with pytest.raises(CheckpointError, match=r"tensor 'blk\.0\.ffn_gate_exps\.weight' has no place"):
        GgufBase(write(tmp_path / "a.gguf", tensors))


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    tensors = made_tensors()
    del tensors["blk.1.attn_k.weight"]
    with pytest.raises(CheckpointError, match=f"1 tensors are missing, the first is '{K_PROJ}.weight'"):
        GgufBase(write(tmp_path / "a.gguf", tensors))


def test_a_type_that_gguf_cant_dequantize_is_refused_by_name(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 40), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="tensors of type Q8_1 can't be dequantized"):
        GgufBase(path)


def test_the_other_byte_order_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="written for the other byte order"):
        GgufBase(path)


def test_a_file_cut_anywhere_is_refused_and_nothing_else_happens(tmp_path):
    data = write(tmp_path / "whole.gguf", made_tensors(), kind="Q8_0").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (*range(200), *range(200, len(data) - 1, 997), len(data) - 64):
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="not a whole GGUF file"):
            GgufBase(cut)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "a.gguf", made_tensors(), kind="Q8_0")


@given(damage=st.dictionaries(st.integers(0, 1500), st.integers(0, 255), min_size=1, max_size=3))
@example(damage={218: 0})  # the number of the embedding's columns
@example(damage={101: 2})  # the number of layers
@example(damage={366: 10})  # a tensor's name gets a second line
@settings(max_examples=200, deadline=None)
def test_a_damaged_header_is_refused_or_read(whole, damage):
    data = bytearray(whole.read_bytes())
    for position, value in damage.items():
        data[position] = value
    path = whole.with_name("damaged.gguf")
    path.write_bytes(data)
    try:
        base = GgufBase(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        assert all(base[name].shape == base.shape(name) for name in base)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        GgufBase(tmp_path / "nowhere.gguf")


def test_the_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf; run: pip install 'lorafuse\[gguf\]'"):
        GgufBase(tmp_path / "a.gguf")
