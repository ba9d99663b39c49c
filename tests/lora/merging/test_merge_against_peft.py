"""Every kind of layer that can be merged, held against a float64 formula and against PEFT's own merge.

PEFT trains nothing here: its layers are filled with random factors, saved by ``save_pretrained`` and read by us.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn

from lora.formats.peft import read_peft
from lora.merging.delta import error_bound
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply, merge

R, ALPHA = 4, 6.0
# n roundings cost at most n epsilons of what is added up (Higham 2002, section 3.1): R products, their sum, the
# scaling, W; of values below 4.
CLOSE = {"rtol": 0, "atol": (R + 3) * float(np.finfo(np.float32).eps) * 4}


class Holder(nn.Module):
    """A model with one layer, ``layer``, and another that no adapter touches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(3, 5)


class Experts(nn.Module):
    def __init__(self, *shapes: tuple[int, ...], is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for index, shape in enumerate(shapes):
            setattr(self, f"w{index}", nn.Parameter(torch.randn(shape)))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(7, 12)


def save(model: nn.Module, folder: Path, **config) -> nn.Module:
    """Wrap a copy of ``model`` by PEFT, fill every adapter tensor with random values, save it, and return it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"]} | config)
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(torch.rand_like(parameter) + 0.5)
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        wrapped.save_pretrained(folder)
    return wrapped


def base_of(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def ours(model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    base = base_of(model)
    targets = changes_by_parameter(base, read_peft(folder))
    return {merged.parameter: merged.stored for merged in merge(base, targets, folder)}


def oracle64(model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    base = base_of(model)
    return {
        name: apply(changes, base[name], np.float64)
        for name, changes in changes_by_parameter(base, read_peft(folder)).items()
    }


def rounding(model: nn.Module, folder: Path) -> dict[str, np.ndarray]:
    """How far any float32 merge may be from the formula, elementwise, in whatever order it adds; what no change names
    may not differ.
    """
    base = base_of(model)
    targets = changes_by_parameter(base, read_peft(folder)).items()
    return {
        name: sum(error_bound(change, base[name].astype(np.float64)) for change in changes) for name, changes in targets
    }


def theirs(wrapped: nn.Module) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return base_of(wrapped.merge_and_unload())


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), {}),
    "square linear": (lambda: nn.Linear(8, 8), {}),
    "rslora": (lambda: nn.Linear(12, 7), {"use_rslora": True}),
    "rank pattern": (lambda: nn.Linear(12, 7), {"rank_pattern": {"layer": 2}}),
    "alpha pattern": (lambda: nn.Linear(12, 7), {"alpha_pattern": {".*ayer": 3}}),
    "both patterns": (lambda: nn.Linear(12, 7), {"rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 16}}),
    "conv1d of transformers": (conv1d, {"fan_in_fan_out": True}),
    "dora": (lambda: nn.Linear(12, 7), {"use_dora": True}),
    "dora rslora": (lambda: nn.Linear(12, 7), {"use_dora": True, "use_rslora": True}),
    "dora conv1d": (conv1d, {"fan_in_fan_out": True, "use_dora": True}),
    "lora bias": (lambda: nn.Linear(12, 7), {"lora_bias": True}),
    "bias all": (lambda: nn.Linear(12, 7), {"bias": "all"}),
    "bias lora_only": (lambda: nn.Linear(12, 7), {"bias": "lora_only"}),
    "embedding": (lambda: nn.Embedding(20, 6), {}),
    "dora embedding": (lambda: nn.Embedding(20, 6), {"use_dora": True}),
    "conv 1x1": (lambda: nn.Conv2d(5, 7, 1), {}),
    "conv 1-d": (lambda: nn.Conv1d(5, 7, 3), {}),
    "conv 2-d": (lambda: nn.Conv2d(5, 7, (3, 2)), {}),
    "conv 3-d": (lambda: nn.Conv3d(2, 7, 3), {}),
    "dora conv": (lambda: nn.Conv2d(5, 7, 3), {"use_dora": True}),
    "modules to save": (lambda: nn.Linear(12, 7), {"modules_to_save": ["other"]}),
    "expert out-in": (lambda: Experts((3, 6, 10)), {"target_modules": [], "target_parameters": ["layer.w0"]}),
    "expert in-out": (
        lambda: Experts((3, 6, 10), is_transposed=True),
        {"target_modules": [], "target_parameters": ["layer.w0"]},
    ),
    "two expert parameters": (
        lambda: Experts((3, 6, 10), (3, 11, 6)),
        {"target_modules": [], "target_parameters": ["layer.w0", "layer.w1"]},
    ),
    "flat parameter": (lambda: Experts((6, 10)), {"target_modules": [], "target_parameters": ["layer.w0"]}),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_merge_equals_peft_and_the_formula(kind: str, tmp_path: Path):
    make, config = LAYERS[kind]
    torch.manual_seed(0)
    model = Holder(make())
    wrapped = save(model, tmp_path, **config)
    mine, exact, peft_merged = ours(model, tmp_path), oracle64(model, tmp_path), theirs(wrapped)
    assert mine, "nothing was merged"
    allowed = rounding(model, tmp_path)
    for name, before in base_of(model).items():
        for whose, found in (("ours", mine.get(name, before)), ("PEFT's", peft_merged[name])):
            difference = np.abs(found - exact.get(name, before.astype(np.float64)))
            assert (difference <= allowed.get(name, 0)).all(), f"{kind}: {name}, {whose}: {difference.max()}"


def factors(
    folder: Path, path: str, a: str = "lora_A.weight", b: str = "lora_B.weight"
) -> tuple[np.ndarray, np.ndarray]:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return (tensors[f"base_model.model.{path}.{part}"].astype(np.float64) for part in (a, b))


def one_merged(tmp_path: Path, layer: nn.Module, **config) -> tuple[np.ndarray, np.ndarray]:
    """The layer's weight before and after our merge, in float64."""
    model = Holder(layer)
    save(model, tmp_path, **config)
    return base_of(model)["layer.weight"].astype(np.float64), ours(model, tmp_path)["layer.weight"]


def test_linear_is_w_plus_alpha_over_r_times_ba(tmp_path: Path):
    before, after = one_merged(tmp_path, nn.Linear(12, 7))
    a, b = factors(tmp_path, "layer")
    np.testing.assert_allclose(after, before + ALPHA / R * b @ a, **CLOSE)


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path):
    before, after = one_merged(tmp_path, nn.Linear(12, 7), use_rslora=True)
    a, b = factors(tmp_path, "layer")
    np.testing.assert_allclose(after, before + ALPHA / math.sqrt(R) * b @ a, **CLOSE)


def test_conv1d_of_transformers_takes_the_transposed_product(tmp_path: Path):
    before, after = one_merged(tmp_path, conv1d(), fan_in_fan_out=True)
    a, b = factors(tmp_path, "layer")
    np.testing.assert_allclose(after, before + ALPHA / R * (b @ a).T, **CLOSE)


def test_dora_rescales_each_output_row_to_its_magnitude(tmp_path: Path):
    before, after = one_merged(tmp_path, nn.Linear(12, 7), use_dora=True)
    a, b = factors(tmp_path, "layer")
    (magnitude, _) = factors(tmp_path, "layer", "lora_magnitude_vector")
    updated = before + ALPHA / R * b @ a
    np.testing.assert_allclose(
        after, magnitude[:, None] * updated / np.linalg.norm(updated, axis=1, keepdims=True), **CLOSE
    )


def test_embedding_takes_the_transposed_product_of_its_own_factors(tmp_path: Path):
    before, after = one_merged(tmp_path, nn.Embedding(20, 6))
    a, b = factors(tmp_path, "layer", "lora_embedding_A", "lora_embedding_B")
    np.testing.assert_allclose(after, before + ALPHA / R * (b @ a).T, **CLOSE)


def test_conv_is_the_composition_of_its_two_convolutions(tmp_path: Path):
    before, after = one_merged(tmp_path, nn.Conv2d(5, 7, (3, 2)))
    a, b = factors(tmp_path, "layer")
    np.testing.assert_allclose(after, before + ALPHA / R * np.einsum("or,rihw->oihw", b[:, :, 0, 0], a), **CLOSE)


def test_experts_are_updated_each_by_its_own_product(tmp_path: Path):
    model = Holder(Experts((3, 6, 10)))
    save(model, tmp_path, target_modules=[], target_parameters=["layer.w0"])
    a, b = factors(tmp_path, "layer")
    update = np.einsum("ore,eri->eoi", b.reshape(6, R, 3), a.reshape(3, R, 10)) * ALPHA / R
    np.testing.assert_allclose(ours(model, tmp_path)["layer.w0"], base_of(model)["layer.w0"] + update, **CLOSE)


@pytest.mark.parametrize("indices", [[1, 5, 19], {"embed_tokens": [1, 5, 19]}])
def test_trained_tokens_replace_the_listed_rows(indices: object, tmp_path: Path):
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(20, 6), "layer": nn.Linear(6, 6)})
    wrapped = save(model, tmp_path, trainable_token_indices=indices)
    before, mine, peft_merged = base_of(model), ours(model, tmp_path), theirs(wrapped)
    np.testing.assert_array_equal(mine["embed_tokens.weight"], peft_merged["embed_tokens.weight"])
    changed_rows = np.flatnonzero((mine["embed_tokens.weight"] != before["embed_tokens.weight"]).any(axis=1))
    assert list(changed_rows) == [1, 5, 19]


def test_multihead_attention_updates_both_projections_once_where_peft_doubles_the_second(tmp_path: Path):
    """PEFT 0.21.2 applies out_proj's update twice (huggingface/peft PR #3774); the formula applies it once."""
    model = Holder(nn.MultiheadAttention(16, 2))
    wrapped = save(model, tmp_path)
    before, mine, peft_merged = base_of(model), ours(model, tmp_path), theirs(wrapped)
    for name, path in (("layer.in_proj_weight", "layer"), ("layer.out_proj.weight", "layer.base_layer.out_proj")):
        a, b = factors(tmp_path, path)
        np.testing.assert_allclose(mine[name], before[name] + ALPHA / R * b @ a, **CLOSE, err_msg=name)
    a, b = factors(tmp_path, "layer.base_layer.out_proj")
    np.testing.assert_allclose(peft_merged["layer.in_proj_weight"], mine["layer.in_proj_weight"], **CLOSE)
    np.testing.assert_allclose(
        peft_merged["layer.out_proj.weight"], before["layer.out_proj.weight"] + 2 * ALPHA / R * b @ a, **CLOSE
    )
