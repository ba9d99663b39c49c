"""What a base is, is found in its files, and a quantized one is opened only when that was asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from lora.bases.checkpoint import Checkpoint, fingerprint
from lora.bases.opening import open_base
from lora.errors import CheckpointError

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny random Llama in bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["nf4", "fp4"])
def four_bit(request, dense, tmp_path_factory) -> Path:
    """The same, quantized and saved by transformers and bitsandbytes."""
    return save_4bit(dense, tmp_path_factory.mktemp(request.param), request.param)


def save_4bit(dense: Path, folder: Path, quant_type: str, **settings: object) -> Path:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=True, **settings
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(folder)
    return folder


def checkpoint(folder: Path, tensors: dict, config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def gguf_file(tmp_path) -> Path:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key, value in (("block_count", 1), ("attention.head_count", 2)):
        writer.add_uint32(f"llama.{key}", value)
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    for name in ("token_embd", "output_norm", *(f"blk.0.{part}" for part in parts)):
        values = np.ones(32 if name.endswith("norm") else (32, 32), np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "a.gguf"


@pytest.mark.parametrize("dequantize", [False, True])
def test_a_dense_checkpoint_is_w(dense, dequantize):
    base = open_base(dense, dequantize)
    assert base.formula == "W + ΔW"
    assert isinstance(base.tensors, Checkpoint)
    assert base.folder == dense
    assert base.config["model_type"] == "llama"
    assert base.fingerprint() == fingerprint(dense)


def test_a_4bit_checkpoint_is_dequantized_when_asked(four_bit, dense):
    base = open_base(four_bit, dequantize=True)
    assert base.formula == f"dequant(W4, {four_bit.name[:3]}) + ΔW"
    assert set(base.tensors) == set(Checkpoint(dense))
    model = transformers.AutoModelForCausalLM.from_pretrained(four_bit, device_map="cpu")
    from bitsandbytes.functional import dequantize_4bit

    weight = model.get_parameter(Q_PROJ)
    assert np.array_equal(
        base.tensors[Q_PROJ].astype(np.float32), dequantize_4bit(weight.data, weight.quant_state).float().numpy()
    )


def test_the_dense_configuration_says_nothing_of_the_quantization(four_bit):
    config = json.loads((four_bit / "config.json").read_text())
    del config["quantization_config"]
    assert open_base(four_bit, dequantize=True).config == config


def test_dequantized_weights_differ_from_the_unquantized(four_bit, dense):
    """Else a base taken for the other would not show."""
    before, after = (
        Checkpoint(dense)[Q_PROJ].astype(np.float32),
        open_base(four_bit, dequantize=True).tensors[Q_PROJ].astype(np.float32),
    )
    assert 0.05 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.2


def test_a_4bit_checkpoint_is_refused_unless_asked(four_bit):
    with pytest.raises(
        CheckpointError,
        match=(
            r"is quantized \(bitsandbytes: W4, ...\).*unquantized base for W16 \+ ΔW, or pass --dequantize for dequant"
        ),
    ):
        open_base(four_bit)


def test_4bit_tensors_decide_where_the_configuration_is_silent(four_bit, tmp_path):
    folder = checkpoint(tmp_path / "silent", load_file_bits(four_bit), {"model_type": "llama"})
    with pytest.raises(CheckpointError, match="is quantized"):
        open_base(folder)


def load_file_bits(folder: Path) -> dict:
    return {name: np.asarray(values) for name, values in load_file(folder / "model.safetensors").items()}


def test_a_tied_output_embedding_is_found_in_a_4bit_checkpoint(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)).save_pretrained(
        tmp_path / "tied"
    )
    base = open_base(save_4bit(tmp_path / "tied", tmp_path / "tied4", "nf4"), dequantize=True)
    assert "lm_head.weight" not in list(base.tensors)
    assert "lm_head.weight" in base.tensors
    np.testing.assert_array_equal(base.tensors["lm_head.weight"], base.tensors["model.embed_tokens.weight"])


def test_a_configuration_of_4bit_without_quant_states_is_refused(tmp_path):
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = checkpoint(tmp_path / "stale", {"a.weight": np.ones((2, 2), np.float32)}, config)
    with pytest.raises(CheckpointError, match="none has a quant state; if they are dense, remove quantization_config"):
        open_base(folder, dequantize=True)


def test_a_quantized_gguf_file_is_dequantized_when_asked(gguf_file):
    base = open_base(gguf_file, dequantize=True)
    assert base.formula == "dequant(Q8_0) + ΔW"
    assert (base.folder, base.config) == (None, {})
    assert base.fingerprint() == hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=r"is quantized \(GGUF: Q8_0\)"):
        open_base(gguf_file)


def test_a_gguf_file_is_known_by_its_first_bytes(gguf_file):
    renamed = gguf_file.rename(gguf_file.with_suffix(".bin"))
    assert open_base(renamed, dequantize=True).formula == "dequant(Q8_0) + ΔW"


def test_a_folder_of_gguf_files_names_one(gguf_file):
    with pytest.raises(CheckpointError, match=f"give one of them, such as {gguf_file}"):
        open_base(gguf_file.parent)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a GGUF file"):
        open_base(tmp_path / "a.txt")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_base(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "method",
    [
        "gptq",
        "awq",
        "hqq",
        "aqlm",
        "fp8",
        "quanto",
        "eetq",
        "vptq",
        "compressed-tensors",
        "mxfp4",
        "torchao",
        "never-heard-of",
    ],
)
@pytest.mark.parametrize("dequantize", [False, True])
def test_a_method_in_the_configuration_is_refused_by_name(tmp_path, method, dequantize):
    folder = checkpoint(
        tmp_path / "base", {"a.weight": np.ones((2, 2), np.float32)}, {"quantization_config": {"quant_method": method}}
    )
    with pytest.raises(
        CheckpointError, match=f"config.json: quantized by method '{method}' in quantization_config.*unquantized base"
    ):
        open_base(folder, dequantize)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"load_in_8bit": True, "quant_method": "bitsandbytes"}}, "'bitsandbytes 8-bit'"),
        ({"quantization_config": {"load_in_8bit": True}}, "'bitsandbytes 8-bit'"),
        ({"quantization_config": {"bits": 4}}, "'not named'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "'compressed-tensors' in compression_config"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "'gptq'"),
    ],
)
def test_other_places_of_the_configuration_are_read(tmp_path, config, message):
    folder = checkpoint(tmp_path / "base", {"a.weight": np.ones((2, 2), np.float32)}, config)
    with pytest.raises(CheckpointError, match=message):
        open_base(folder, dequantize=True)


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_a_file_beside_the_weights_is_refused_by_name(tmp_path, name, method):
    folder = checkpoint(tmp_path / "base", {"a.weight": np.ones((2, 2), np.float32)})
    (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{name}: quantized by method '{method}'"):
        open_base(folder, dequantize=True)


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (("m.qweight", "m.qzeros", "m.scales", "m.g_idx"), "GPTQ"),
        (("m.qweight", "m.qzeros", "m.scales"), "AWQ"),
        (("m.qweight", "m.scales"), "GPTQ or the like"),
        (("m.W_q", "m.scale", "m.zero"), "HQQ"),
        (("m.codes", "m.codebooks", "m.scales"), "AQLM"),
        (("m.weight", "m.SCB"), "bitsandbytes 8-bit"),
        (("m.weight", "m.weight_scale_inv"), "fp8 in blocks"),
        (("m.weight", "m.weight_scale"), "fp8 or 8-bit with scales"),
        (("m.weight_packed", "m.weight_scale"), "compressed-tensors"),
        (("m.weight", "m.weight_scales"), "EETQ"),
        (("m.weight._data", "m.weight._scale"), "quanto"),
        (("m.gate_up_proj_blocks", "m.gate_up_proj_scales"), "MXFP4"),
    ],
)
def test_tensors_of_a_method_are_refused_by_name_where_no_file_says_it(tmp_path, names, method):
    folder = checkpoint(tmp_path / "base", dict.fromkeys(names, np.ones((2, 2), np.float32)), {})
    with pytest.raises(CheckpointError, match=f"'{method}' by tensor 'm\\."):
        open_base(folder, dequantize=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_a_matrix_of_integers_is_no_weight(tmp_path, dtype):
    folder = checkpoint(
        tmp_path / "base", {"m.weight": np.ones((2, 2), dtype), "positions": np.ones((1, 4), np.int64)}, {}
    )
    with pytest.raises(CheckpointError, match=f"by tensor 'm.weight' of {dtype}"):
        open_base(folder, dequantize=True)


def test_integer_buffers_and_lone_scales_are_dense(tmp_path):
    tensors = {"m.weight": np.ones((2, 2), np.float32), "vq.codebooks": np.ones(3, np.float32)}
    tensors |= {"position_ids": np.ones((1, 4), np.int64), "n.weight": np.ones(3, np.int64)}
    assert open_base(checkpoint(tmp_path / "base", tensors, {"quantization_config": None})).formula == "W + ΔW"
