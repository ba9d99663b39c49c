"""Every layer of loralib, merged by loralib itself and by us from the state dict that it saves."""

from __future__ import annotations

from pathlib import Path

import loralib
import numpy as np
import pytest
import torch

from lora.formats.loralib import read_loralib
from lora.merging.fit import changes_by_parameter
from lora.merging.merge import apply

ALPHA = 3
# {layer: it, and what the file does not say of it}
LAYERS = {
    "linear": (lambda: loralib.Linear(6, 5, r=4, lora_alpha=ALPHA), {}),
    "linear, square": (lambda: loralib.Linear(6, 6, r=4, lora_alpha=ALPHA), {"fan_in_fan_out": False}),
    "linear, stored (in, out)": (lambda: loralib.Linear(6, 5, r=4, lora_alpha=ALPHA, fan_in_fan_out=True), {}),
    "linear, square, stored (in, out)": (
        lambda: loralib.Linear(6, 6, r=4, lora_alpha=ALPHA, fan_in_fan_out=True),
        {"fan_in_fan_out": True},
    ),
    "embedding": (lambda: loralib.Embedding(9, 5, r=4, lora_alpha=ALPHA), {}),
    "conv1d": (lambda: loralib.Conv1d(6, 5, 1, r=4, lora_alpha=ALPHA), {}),
    "conv2d": (lambda: loralib.Conv2d(6, 5, 3, r=4, lora_alpha=ALPHA), {}),
    "conv2d, extent 1": (lambda: loralib.Conv2d(6, 5, 1, r=4, lora_alpha=ALPHA), {}),
    "conv2d, grouped": (lambda: loralib.Conv2d(6, 4, 3, r=4, lora_alpha=ALPHA, groups=2), {}),
    "conv3d": (lambda: loralib.Conv3d(6, 5, 1, r=4, lora_alpha=ALPHA), {}),
    "fused": (
        lambda: loralib.MergedLinear(6, 15, r=4, lora_alpha=ALPHA, enable_lora=[True, True, True]),
        {"enable_lora": (True, True, True)},
    ),
    "fused, two of three": (
        lambda: loralib.MergedLinear(6, 15, r=4, lora_alpha=ALPHA, enable_lora=[True, False, True]),
        {"enable_lora": (True, False, True)},
    ),
    "fused, one of three": (
        lambda: loralib.MergedLinear(6, 15, r=4, lora_alpha=ALPHA, enable_lora=[False, True, False]),
        {"enable_lora": (False, True, False)},
    ),
    "fused, stored (in, out)": (
        lambda: loralib.MergedLinear(
            6, 15, r=4, lora_alpha=ALPHA, enable_lora=[True, False, True], fan_in_fan_out=True
        ),
        {"enable_lora": (True, False, True)},
    ),
    "fused, square, stored (in, out)": (
        lambda: loralib.MergedLinear(6, 6, r=4, lora_alpha=ALPHA, enable_lora=[False, True], fan_in_fan_out=True),
        {"enable_lora": (False, True), "fan_in_fan_out": True},
    ),
}


def trained(layer: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(layer).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: values.detach().numpy().copy() for name, values in model.state_dict().items() if "lora_" not in name}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_merge_is_loralibs(name: str, suffix: str, tmp_path: Path):
    layer, unsaid = LAYERS[name]
    model = trained(layer())
    base, file = arrays(model), saved(loralib.lora_state_dict(model), tmp_path / f"lora{suffix}")
    model.eval()  # merges
    ((parameter, changes),) = changes_by_parameter(base, read_loralib(file, ALPHA, **unsaid)).items()
    np.testing.assert_allclose(
        apply(changes, base[parameter], np.float64), arrays(model)[parameter], rtol=1e-12, atol=1e-12
    )
    assert not np.allclose(base[parameter], arrays(model)[parameter])


def saved(state: dict[str, torch.Tensor], file: Path) -> Path:
    if file.suffix == ".pt":
        torch.save(state, file)
    else:
        from safetensors.torch import save_file

        save_file(state, file)
    return file


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_saved_biases_are_read(bias: str, tmp_path: Path):
    model = trained(loralib.Linear(6, 5, r=4, lora_alpha=ALPHA))
    base = arrays(model)
    model[0].bias.data += 1
    targets = changes_by_parameter(
        base, read_loralib(saved(loralib.lora_state_dict(model, bias), tmp_path / "lora.pt"), ALPHA)
    )
    np.testing.assert_array_equal(apply(targets["0.bias"], base["0.bias"], np.float64), base["0.bias"] + 1)


def test_a_wrapped_convolutions_bias_is_read(tmp_path: Path):
    model = trained(loralib.Conv2d(6, 5, 3, r=4, lora_alpha=ALPHA))
    plain = {name.replace(".conv", ""): values for name, values in arrays(model).items()}
    model[0].conv.bias.data += 1
    targets = changes_by_parameter(
        plain, read_loralib(saved(loralib.lora_state_dict(model, "all"), tmp_path / "lora.pt"), ALPHA)
    )
    assert sorted(targets) == ["0.bias", "0.weight"]
    np.testing.assert_array_equal(apply(targets["0.bias"], plain["0.bias"], np.float64), plain["0.bias"] + 1)
