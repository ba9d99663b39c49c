"""Parts of diffusers' pipelines as bases, and adapters of them under the names that trainers use.

The models are small and random; diffusers loads the merged folder, and PEFT's layers in its model are the oracle.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lora.errors import CheckpointError
from lora.formats.read import ReadOptions
from lora.merging.checkpoint import Storing
from lora.merging.several import Blending
from lora.merging.to_folder import Sources, merge_folder

diffusers = pytest.importorskip("diffusers")
WIDTH = 16


def unet(folder: Path, **saving: Any) -> Any:
    """A U-Net laid out as SDXL's: no attention in the first block, two resnets a block."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, WIDTH, WIDTH),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 16,
    )
    model.save_pretrained(folder, **saving)
    return model


def flux(folder: Path) -> Any:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    model.save_pretrained(folder)
    return model


def factors(seed: int, out: int, inner: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=size).astype(np.float32) for size in ((4, inner), (out, 4)))


def merged(base: Path, tensors: dict, folder: Path, component: str | None = None) -> dict[str, np.ndarray]:
    """What diffusers loads of the merged folder."""
    save_file(tensors, folder / "adapter.safetensors")
    sources = Sources(base, ((folder / "adapter.safetensors", 1.0),), ReadOptions(component=component))
    merge_folder(sources, folder / "out", Storing(), Blending())
    kind = json.loads((base / "config.json").read_text())["_class_name"]
    loaded = getattr(diffusers, kind).from_pretrained(folder / "out")
    return {name: values.numpy() for name, values in loaded.state_dict().items()}


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: values.numpy().copy() for name, values in model.state_dict().items()}


def assert_only(after: dict, before: dict, expected: dict[str, np.ndarray]) -> None:
    """Exactly these tensors change, by these updates."""
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(expected)
    for name, update in expected.items():
        np.testing.assert_allclose(after[name], before[name] + update, atol=1e-5, err_msg=name)


SDXL = {
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_transformer_blocks_0_attn2_to_k": "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k",
    "middle_block_1_transformer_blocks_0_attn1_to_v": "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "output_blocks_2_1_transformer_blocks_0_attn1_to_q": "up_blocks.0.attentions.2.transformer_blocks.0.attn1.to_q",
    "output_blocks_3_1_transformer_blocks_0_attn1_to_q": "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_1_0_emb_layers_1": "down_blocks.0.resnets.0.time_emb_proj",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_2_0_in_layers_2": "down_blocks.0.resnets.1.conv1",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


@pytest.mark.parametrize("name", SDXL)
def test_sdxl_s_own_names_are_diffusers_modules(name: str, tmp_path: Path):
    before = weights(unet(tmp_path / "unet"))
    weight = f"{SDXL[name]}.weight"
    shape = before[weight].shape
    a, b = factors(0, shape[0], int(np.prod(shape[1:])))
    kernel = (a.reshape(4, *shape[1:]), b.reshape(*b.shape, *[1] * (len(shape) - 2)))
    keys = {f"lora_unet_{name}.lora_down.weight": kernel[0], f"lora_unet_{name}.lora_up.weight": kernel[1]}
    after = merged(tmp_path / "unet", keys | {f"lora_unet_{name}.alpha": np.array(2, np.float32)}, tmp_path)
    assert_only(after, before, {weight: (0.5 * b @ a).reshape(shape)})


def test_kohya_s_names_of_diffusers_modules_reach_a_sharded_unet(tmp_path: Path):
    before = weights(unet(tmp_path / "unet", max_shard_size="50KB"))
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json").exists()
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    a, b = factors(0, WIDTH, WIDTH)
    flat = f"lora_unet_{module.replace('.', '_')}"
    keys = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
    assert_only(merged(tmp_path / "unet", keys, tmp_path), before, {f"{module}.weight": b @ a})


Q, K, V = "to_q", "to_k", "to_v"
FLUX = {
    "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.{part}" for part in (Q, K, V)],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "single_blocks.1.linear1": [
        *(f"single_transformer_blocks.1.attn.{part}" for part in (Q, K, V)),
        "single_transformer_blocks.1.proj_mlp",
    ],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
}
SPELLINGS = {
    "kohya": lambda name: (f"lora_unet_{name.replace('.', '_')}", ".lora_down.weight", ".lora_up.weight"),
    "the authors'": lambda name: (name, ".lora_A.weight", ".lora_B.weight"),
    "ai-toolkit": lambda name: (f"diffusion_model.{name}", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FLUX)
def test_flux_s_own_names_are_diffusers_modules(name: str, spelling: str, tmp_path: Path):
    before = weights(flux(tmp_path / "transformer"))
    shapes = [before[f"{module}.weight"].shape for module in FLUX[name]]
    a, b = factors(0, sum(shape[0] for shape in shapes), shapes[0][1])
    prefix, down, up = SPELLINGS[spelling](name)
    after = merged(tmp_path / "transformer", {prefix + down: a, prefix + up: b}, tmp_path)
    rows = np.split(b @ a, np.cumsum([shape[0] for shape in shapes])[:-1])
    assert_only(after, before, {f"{module}.weight": part for module, part in zip(FLUX[name], rows, strict=True)})


def test_the_last_modulation_of_flux_has_its_halves_in_the_other_order(tmp_path: Path):
    before = weights(flux(tmp_path / "transformer"))
    a, b = factors(0, 2 * WIDTH, WIDTH)
    name = "final_layer.adaLN_modulation.1"
    after = merged(tmp_path / "transformer", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path)
    shift, scale = np.split(b @ a, 2)
    assert_only(after, before, {"norm_out.linear.weight": np.concatenate([scale, shift])})


@pytest.mark.parametrize("made", [unet, flux])
def test_an_adapter_that_diffusers_saved_is_peft_s_unmerged_model(made: Any, tmp_path: Path):
    import peft

    model = made(tmp_path / "base")
    before = weights(model)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    component = "unet" if made is unet else "transformer"
    state = {f"{component}.{key}": values.numpy() for key, values in peft.get_peft_model_state_dict(model).items()}
    save_file(state, tmp_path / "plain.safetensors")
    alphas = {key.replace(".lora_A.weight", ".alpha"): np.array(8, np.float32) for key in state if "lora_A" in key}
    after = merged(tmp_path / "base", state | alphas, tmp_path)
    model.fuse_lora()
    theirs = {name.replace(".base_layer", ""): values for name, values in weights(model).items() if "lora_" not in name}
    for name in before:
        np.testing.assert_allclose(after[name], theirs[name], atol=1e-4, err_msg=name)
    assert any(not np.array_equal(after[name], before[name]) for name in before)


def test_a_whole_pipeline_is_refused_and_its_parts_are_named(tmp_path: Path):
    unet(tmp_path / "pipeline/unet")
    (tmp_path / "pipeline/model_index.json").write_text("{}")
    a, b = factors(0, WIDTH, WIDTH)
    keys = {"lora_unet_mid_to_q.lora_down.weight": a, "lora_unet_mid_to_q.lora_up.weight": b}
    save_file(keys, tmp_path / "adapter.safetensors")
    sources = Sources(tmp_path / "pipeline", ((tmp_path / "adapter.safetensors", 1.0),), ReadOptions())
    with pytest.raises(
        CheckpointError, match=r"a diffusers pipeline of several models; give the folder.*pipeline/unet"
    ):
        merge_folder(sources, tmp_path / "out", Storing(), Blending())
