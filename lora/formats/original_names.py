"""Names of diffusion models as their authors gave them, and what diffusers calls the same modules.

Trainers keep the authors' names: kohya's for SDXL, with dots written as underscores (``input_blocks_4_1_…``); and for
Flux, flattened or dotted (``double_blocks.0.img_attn.qkv``), where one layer may be several of diffusers'. A fused
projection's update is cut by the rows of B: (B · A) of each part has A in common.

SDXL: https://github.com/huggingface/diffusers/blob/main/scripts/convert_diffusers_to_original_sdxl.py
Flux: https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/layers.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lora.adapter import LowRank
from lora.errors import AdapterError

LAYERS = 2  # resnets a block of SDXL's U-Net; its names don't say it
RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTSIDE_BLOCKS = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
}
BLOCK = re.compile(r"(?P<side>input|middle|output)_blocks?_(?P<first>\d+)(?:_(?P<second>\d))?_(?P<rest>.+)")


def of_sdxl(name: str) -> str:
    """diffusers' flattened name of a module of SDXL's U-Net; a name that is none of the authors' stays as it is."""
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    found = BLOCK.fullmatch(name)
    if found is None:
        return name
    first, second, rest = int(found["first"]), int(found["second"] or 0), found["rest"]
    match found["side"]:
        case "middle":  # a resnet, an attention, a resnet
            return _part("mid_block", "attentions" if first == 1 else "resnets", first // 2, rest)
        case "input":
            block, layer = divmod(first - 1, LAYERS + 1)
            if layer == LAYERS:
                return f"down_blocks_{block}_downsamplers_0_conv"
            return _part(f"down_blocks_{block}", "attentions" if second else "resnets", layer, rest)
    block, layer = divmod(first, LAYERS + 1)
    if rest == "conv":  # after the last layer, behind the attention or in its place
        return f"up_blocks_{block}_upsamplers_0_conv"
    return _part(f"up_blocks_{block}", "attentions" if second else "resnets", layer, rest)


def _part(block: str, kind: str, layer: int, rest: str) -> str:
    inner = RESNET.get(rest, rest) if kind == "resnets" else rest
    return f"{block}_{kind}_{layer}_{inner}"


@dataclass(frozen=True)
class Part:
    """One of diffusers' layers, and its share of the rows of the authors'; 0 is what the others leave.

    A share is counted in widths of the model. ``swapped`` says that the two halves are in the other order.
    """

    module: str
    share: int = 0
    swapped: bool = False


def _fused(block: str, *names: str) -> tuple[Part, ...]:
    return tuple(Part(f"{block}.{name}", 1) for name in names)


# From the authors' module, with the block's number as {}, to diffusers'.
FLUX: dict[str, tuple[Part, ...]] = {
    "double_blocks.{}.img_attn.qkv": _fused("transformer_blocks.{}.attn", "to_q", "to_k", "to_v"),
    "double_blocks.{}.txt_attn.qkv": _fused("transformer_blocks.{}.attn", "add_q_proj", "add_k_proj", "add_v_proj"),
    "double_blocks.{}.img_attn.proj": (Part("transformer_blocks.{}.attn.to_out.0"),),
    "double_blocks.{}.txt_attn.proj": (Part("transformer_blocks.{}.attn.to_add_out"),),
    "double_blocks.{}.img_mlp.0": (Part("transformer_blocks.{}.ff.net.0.proj"),),
    "double_blocks.{}.img_mlp.2": (Part("transformer_blocks.{}.ff.net.2"),),
    "double_blocks.{}.txt_mlp.0": (Part("transformer_blocks.{}.ff_context.net.0.proj"),),
    "double_blocks.{}.txt_mlp.2": (Part("transformer_blocks.{}.ff_context.net.2"),),
    "double_blocks.{}.img_mod.lin": (Part("transformer_blocks.{}.norm1.linear"),),
    "double_blocks.{}.txt_mod.lin": (Part("transformer_blocks.{}.norm1_context.linear"),),
    "single_blocks.{}.linear1": (
        *_fused("single_transformer_blocks.{}.attn", "to_q", "to_k", "to_v"),
        Part("single_transformer_blocks.{}.proj_mlp"),
    ),
    "single_blocks.{}.linear2": (Part("single_transformer_blocks.{}.proj_out"),),
    "single_blocks.{}.modulation.lin": (Part("single_transformer_blocks.{}.norm.linear"),),
    # diffusers' own, after fuse_qkv_projections.
    "transformer_blocks.{}.attn.to_qkv": _fused("transformer_blocks.{}.attn", "to_q", "to_k", "to_v"),
    "transformer_blocks.{}.attn.to_added_qkv": _fused(
        "transformer_blocks.{}.attn", "add_q_proj", "add_k_proj", "add_v_proj"
    ),
    "single_transformer_blocks.{}.attn.to_qkv": _fused("single_transformer_blocks.{}.attn", "to_q", "to_k", "to_v"),
    "img_in": (Part("x_embedder"),),
    "txt_in": (Part("context_embedder"),),
    "time_in.in_layer": (Part("time_text_embed.timestep_embedder.linear_1"),),
    "time_in.out_layer": (Part("time_text_embed.timestep_embedder.linear_2"),),
    "vector_in.in_layer": (Part("time_text_embed.text_embedder.linear_1"),),
    "vector_in.out_layer": (Part("time_text_embed.text_embedder.linear_2"),),
    "guidance_in.in_layer": (Part("time_text_embed.guidance_embedder.linear_1"),),
    "guidance_in.out_layer": (Part("time_text_embed.guidance_embedder.linear_2"),),
    "final_layer.linear": (Part("proj_out"),),
    "final_layer.adaLN_modulation.1": (Part("norm_out.linear", swapped=True),),
}
FLUX_FLAT = {name.replace(".", "_"): parts for name, parts in FLUX.items()}
NUMBER = re.compile(r"(?<=_blocks[._])\d+")


def of_flux(update: LowRank, path: object, flattened: bool) -> Iterator[LowRank]:
    """The update of the authors' layer as updates of diffusers'; one of another name stays as it is.

    Raises AdapterError where the factors have too few rows for the parts.
    """
    number = NUMBER.search(update.module)
    pattern = NUMBER.sub("{}", update.module, count=1)
    parts = (FLUX_FLAT if flattened else FLUX).get(pattern)
    if parts is None:
        yield update
        return
    start, rows = 0, update.b.shape[0]
    for part in parts:
        size = _rows(update, parts) * part.share if part.share else rows - start
        if size <= 0 or start + size > rows:
            raise AdapterError(
                f"{path}: module '{update.module}' has factors A {update.a.shape} and B {update.b.shape}, which are not"
                " of a fused projection of Flux; the file is of another model"
            )
        b = update.b[start : start + size]
        start += size
        module = part.module.format(number[0] if number else "")
        if flattened:
            module = module.replace(".", "_")
        yield replace(update, module=module, b=np.roll(b, size // 2, axis=0) if part.swapped else b)


def _rows(update: LowRank, parts: tuple[Part, ...]) -> int:
    """The width of the model: a fused layer's share; of queries, keys and values alone a third of the rows."""
    if all(part.share for part in parts):
        rows: int = update.b.shape[0]
        return rows // len(parts)
    width: int = update.a.shape[1]
    return width
