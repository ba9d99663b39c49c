"""The models of the zoo, each a few thousand weights, by transformers' configurations; and how each is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

VOCABULARY = 96
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TEXT: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, **WIDTH, **SPECIAL}
DECODER: dict[str, Any] = {**TEXT, "num_key_value_heads": 4}  # square projections throughout
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8, **WIDTH}
AUDIO: dict[str, Any] = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
}
AUDIO |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, **WIDTH, "vocab_size": VOCABULARY}
SEQ2SEQ: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, **SPECIAL}
SEQ2SEQ |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
MOE: dict[str, Any] = {
    **DECODER,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_experts": 3,
    "num_local_experts": 3,
}


def text(model: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 15).reshape(2, 6)}


def seq2seq(model: Any) -> dict[str, torch.Tensor]:
    return {**text(model), "decoder_input_ids": torch.arange(5, 13).reshape(2, 4)}


def image(model: Any) -> dict[str, torch.Tensor]:
    config = getattr(model.config, "vision_config", model.config)
    size, channels = getattr(config, "image_size", 32), getattr(config, "num_channels", 3)
    return {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))}


def image_and_text(model: Any) -> dict[str, torch.Tensor]:
    return {**image(model), **text(model)}


def wave(model: Any) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(0))}


def whisper(model: Any) -> dict[str, torch.Tensor]:
    features = torch.randn(2, model.config.num_mel_bins, 100, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": torch.arange(5, 13).reshape(2, 4)}


@dataclass(frozen=True)
class Model:
    """``stem`` begins the classes' names; ``attention`` are the modules that are usually targeted, ``embedding`` the
    input's, ``head`` the output's. ``prefix`` is what the body is called, for targets that are paths.
    """

    stem: str
    config: Callable[[], Any]
    attention: tuple[str, ...]
    kind: str = "decoder"
    embedding: str = ""
    head: str = ""
    call: Callable[[Any], dict[str, torch.Tensor]] = text
    saved: str = ""
    norms: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()


def _made(config: str, **settings: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, config)(**settings)


QV, EMBED, LM = ("q_proj", "v_proj"), "embed_tokens", "lm_head"
BERT_QV = ("query", "value")
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 32,
    **SPECIAL,
}
CLIP: dict[str, Any] = {
    "vision_config": dict(IMAGE, projection_dim=16),
    "text_config": dict(TEXT, projection_dim=16),
    "projection_dim": 16,
}


def _like_llama(stem: str, config: str = "", **settings: Any) -> Model:
    return Model(stem, _made(config or f"{stem}Config", **{**DECODER, **settings}), QV, "decoder", EMBED, LM)


def _like_bert(stem: str, head: str = "", attention: tuple[str, ...] = BERT_QV, **settings: Any) -> Model:
    return Model(stem, _made(f"{stem}Config", **{**TEXT, **settings}), attention, "encoder", "word_embeddings", head)


def _image(stem: str, attention: tuple[str, ...], **settings: Any) -> Model:
    return Model(stem, _made(f"{stem}Config", **{**IMAGE, **settings}), attention, "image", call=image)


def _seq2seq(stem: str, **settings: Any) -> Model:
    made = _made(f"{stem}Config", **{**SEQ2SEQ, **settings})
    return Model(stem, made, QV, "seq2seq", EMBED, LM, seq2seq)


MODELS: dict[str, Model] = {
    "Llama": _like_llama("Llama"),
    "Llama tied": _like_llama("Llama", tie_word_embeddings=True),
    "Mistral": _like_llama("Mistral"),
    "Qwen2": _like_llama("Qwen2"),
    "Qwen3": _like_llama("Qwen3", head_dim=8),
    "Gemma": _like_llama("Gemma", head_dim=8),
    "Gemma2": _like_llama("Gemma2", head_dim=8),
    "Gemma3 text": _like_llama("Gemma3", "Gemma3TextConfig", head_dim=8),
    "Phi": _like_llama("Phi"),
    "Phi3": Model("Phi3", _made("Phi3Config", **DECODER), ("qkv_proj", "o_proj"), "decoder", EMBED, LM),
    "StableLm": _like_llama("StableLm"),
    "Starcoder2": _like_llama("Starcoder2"),
    "Cohere": _like_llama("Cohere"),
    "Olmo": _like_llama("Olmo"),
    "Olmo2": _like_llama("Olmo2"),
    "Granite": _like_llama("Granite"),
    "GPT2": Model(
        "GPT2", _made("GPT2Config", **GPT2), ("c_attn", "c_proj"), "decoder", "wte", LM, saved="GPT2LMHeadModel"
    ),
    "GPTNeo": Model(
        "GPTNeo",
        _made(
            "GPTNeoConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=32,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            **SPECIAL,
        ),
        QV,
        "decoder",
        "wte",
        LM,
    ),
    "GPTNeoX": Model(
        "GPTNeoX", _made("GPTNeoXConfig", **TEXT), ("query_key_value", "dense"), "decoder", "embed_in", LM
    ),
    "GPTJ": Model("GPTJ", _made("GPTJConfig", **{**GPT2, "rotary_dim": 4}), QV, "decoder", "wte", LM),
    "OPT": Model(
        "OPT",
        _made(
            "OPTConfig",
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=32,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **SPECIAL,
        ),
        QV,
        "decoder",
        EMBED,
        LM,
    ),
    "Bloom": Model(
        "Bloom",
        _made("BloomConfig", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **SPECIAL),
        ("query_key_value", "dense"),
        "decoder",
        "word_embeddings",
        LM,
    ),
    "Falcon": Model(
        "Falcon", _made("FalconConfig", **TEXT), ("query_key_value", "dense"), "decoder", "word_embeddings", LM
    ),
    "GPTBigCode": Model("GPTBigCode", _made("GPTBigCodeConfig", **GPT2), ("c_attn", "c_proj"), "decoder", "wte", LM),
    "Mixtral": Model("Mixtral", _made("MixtralConfig", **MOE), QV, "moe", EMBED, LM),
    "Qwen2Moe": Model(
        "Qwen2Moe", _made("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=16), QV, "moe", EMBED, LM
    ),
    "Qwen3Moe": Model("Qwen3Moe", _made("Qwen3MoeConfig", **MOE, head_dim=8), QV, "moe", EMBED, LM),
    "Olmoe": Model("Olmoe", _made("OlmoeConfig", **MOE), QV, "moe", EMBED, LM),
    "GptOss": Model("GptOss", _made("GptOssConfig", **MOE, head_dim=8, sliding_window=4), QV, "moe", EMBED, LM),
    "Bert": _like_bert("Bert", "decoder"),
    "Roberta": _like_bert("Roberta", "decoder", type_vocab_size=1),
    "XLMRoberta": _like_bert("XLMRoberta", "decoder", type_vocab_size=1),
    "Camembert": _like_bert("Camembert", "decoder", type_vocab_size=1),
    "Electra": _like_bert("Electra", embedding_size=32),
    "Albert": _like_bert("Albert", "decoder", embedding_size=32, classifier_dropout_prob=0.0),
    "MPNet": _like_bert("MPNet", "decoder", ("attn.q", "attn.v")),
    "DebertaV2": _like_bert("DebertaV2", attention=("query_proj", "value_proj"), relative_attention=True),
    "DistilBert": Model(
        "DistilBert",
        _made(
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=32,
        ),
        ("q_lin", "v_lin"),
        "encoder",
        "word_embeddings",
        "vocab_projector",
    ),
    "ModernBert": Model(
        "ModernBert", _made("ModernBertConfig", **TEXT), ("Wqkv", "Wo"), "encoder", "tok_embeddings", "decoder"
    ),
    "T5": Model("T5", _made("T5Config", **T5), ("q", "v"), "seq2seq", EMBED, LM, seq2seq),
    "T5 gated": Model(
        "T5",
        _made("T5Config", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        ("q", "v"),
        "seq2seq",
        EMBED,
        LM,
        seq2seq,
    ),
    "MT5": Model("MT5", _made("MT5Config", **T5), ("q", "v"), "seq2seq", EMBED, LM, seq2seq),
    "Bart": _seq2seq("Bart"),
    "MBart": _seq2seq("MBart"),
    "Pegasus": _seq2seq("Pegasus"),
    "BlenderbotSmall": _seq2seq("BlenderbotSmall"),
    "Whisper": Model(
        "Whisper",
        _made("WhisperConfig", **{**SEQ2SEQ, "max_source_positions": 50, "num_mel_bins": 16}),
        QV,
        "speech",
        EMBED,
        "proj_out",
        whisper,
    ),
    "ViT": _image("ViT", QV),
    "DeiT": _image("DeiT", QV),
    "Dinov2": _image("Dinov2", QV),
    "Beit": _image("Beit", QV),
    "ViTMSN": _image("ViTMSN", QV),
    "Swin": _image(
        "Swin",
        QV,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        num_attention_heads=[2, 2],
        window_size=2,
        patch_size=2,
    ),
    "ConvNext": _image("ConvNext", ("pwconv1", "pwconv2"), hidden_sizes=[16, 16], depths=[1, 1], num_stages=2),
    "CLIP": Model("CLIP", _made("CLIPConfig", **CLIP), QV, "clip", call=image_and_text),
    "Siglip": Model(
        "Siglip",
        lambda: transformers.SiglipConfig(
            vision_config=dict(IMAGE), text_config=dict(TEXT, projection_size=32, max_position_embeddings=6)
        ),
        QV,
        "clip",
        call=image_and_text,
    ),
    "Wav2Vec2": Model("Wav2Vec2", _made("Wav2Vec2Config", **AUDIO), QV, "audio", call=wave),
    "Hubert": Model("Hubert", _made("HubertConfig", **AUDIO), QV, "audio", call=wave),
}
