"""A tiny Llama quantized as others do it: by bitsandbytes, and as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import transformers
from safetensors.numpy import load_file

from lora.bases.gguf_llama import INNER, OUTER


def four_bit(base: Path, folder: Path) -> Path:
    """The base in nf4, in ``folder``."""
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(folder)
    return folder


def gguf_file(base: Path, path: Path) -> Path:
    """The base in Q8_0, with what a converter says of it; rows are in whatever order they come."""
    config = transformers.AutoConfig.from_pretrained(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {there: here for here, there in OUTER.items()}
    inner = {there: here for here, there in INNER.items()}
    for name, values in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            module = f"blk.{layer}.{inner[rest]}"
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get(module, module)}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
