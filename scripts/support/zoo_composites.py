"""The models of the zoo that are made of two: an image's and a text's, an encoder's and a decoder's."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from scripts.support.zoo_models import DECODER, GPT2, IMAGE, TEXT, Model, image, seq2seq, text

IMAGE_TOKEN = 90  # stands for a part of the image
QV = ("q_proj", "v_proj")


def image_in_text(model: Any) -> dict[str, torch.Tensor]:
    """Four tokens that stand for the image, then text."""
    ids = torch.cat([torch.full((2, 4), IMAGE_TOKEN), text(model)["input_ids"]], 1)
    return {**image(model), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_to_text(model: Any) -> dict[str, torch.Tensor]:
    """An image for a vision encoder and tokens for the decoder."""
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "decoder_input_ids": seq2seq(model)["decoder_input_ids"]}


def _llava() -> Any:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE, projection_dim=16),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


def _paligemma() -> Any:
    return transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**IMAGE, vision_use_head=False),
        text_config=transformers.GemmaConfig(**DECODER, head_dim=8),
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**IMAGE | {"patch_size": 4}, vision_use_head=False),
        text_config=transformers.Gemma3TextConfig(**DECODER, head_dim=8),
        mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN,
    )


def _qwen2_vl() -> Any:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 1, "patch_size": 8}
    return transformers.Qwen2VLConfig(
        text_config=dict(DECODER, rope_parameters=rotary),
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=91,
        vision_end_token_id=92,
        video_token_id=93,
    )


def _pair(kind: str, encoder: Any, decoder: Any) -> Any:
    made = getattr(transformers, kind).from_encoder_decoder_configs(encoder, decoder)
    made.decoder_start_token_id, made.pad_token_id = 1, 0
    return made


def _bert_to_gpt2() -> Any:
    decoder = transformers.GPT2Config(**GPT2 | {"add_cross_attention": True, "is_decoder": True})
    return _pair("EncoderDecoderConfig", transformers.BertConfig(**TEXT), decoder)


def _bert_to_bert() -> Any:
    decoder = transformers.BertConfig(**TEXT | {"add_cross_attention": True, "is_decoder": True})
    return _pair("EncoderDecoderConfig", transformers.BertConfig(**TEXT), decoder)


def _vit_to_gpt2() -> Any:
    decoder = transformers.GPT2Config(**GPT2 | {"add_cross_attention": True, "is_decoder": True})
    return _pair("VisionEncoderDecoderConfig", transformers.ViTConfig(**IMAGE), decoder)


COMPOSITES = {
    "Llava": Model("Llava", _llava, QV, "image and text", "embed_tokens", "lm_head", image_in_text),
    "PaliGemma": Model("PaliGemma", _paligemma, QV, "image and text", "embed_tokens", "lm_head", image_in_text),
    "Gemma3": Model("Gemma3", _gemma3, QV, "image and text", "embed_tokens", "lm_head", image_in_text),
    "Qwen2VL": Model("Qwen2VL", _qwen2_vl, QV, "image and text", "embed_tokens", "lm_head"),
    "BERT to GPT-2": Model(
        "EncoderDecoder", _bert_to_gpt2, ("query", "value", "c_attn", "c_proj"), "pair", "", "lm_head", seq2seq
    ),
    "BERT to BERT": Model(
        "EncoderDecoder", _bert_to_bert, ("query", "value"), "pair", "", "decoder.cls.predictions.decoder", seq2seq
    ),
    "ViT to GPT-2": Model(
        "VisionEncoderDecoder", _vit_to_gpt2, ("q_proj", "c_attn", "c_proj"), "pair", "", "lm_head", image_to_text
    ),
}
