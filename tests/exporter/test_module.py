"""Any torch module, through Python."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnxruntime
import peft
import pytest
import torch
from float32_sums import engines_bound
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import exporter
from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.bundle.task_types import MODULE
from exporter.proof.reference import merged_values, torch_runner
from exporter.proof.verify import verify
from exporter.task import add_task
from lora.errors import AdapterError, BundleError, ExportError
from lora.files.tensorfile import Array


class Network(nn.Module):
    """A convolution with a BatchNorm that has seen data, and two linear layers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        self.train()(torch.randn(64, 3, 6, 6))

    def forward(self, image: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.norm(self.conv(image)).mean(dim=(2, 3)))))


class TwoAndTwo(nn.Module):
    """Two inputs with axes of different lengths, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(10, 6), nn.Linear(6, 5)

    def forward(self, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.mix(self.embed(tokens))
        return mixed, (mixed * weights.unsqueeze(-1)).sum(dim=1)


IMAGES = {"image": torch.ones(2, 3, 6, 6)}


def save_adapter(folder: Path, seed: int = 0) -> Path:
    """PEFT's own adapter of ``hidden`` and ``out``."""
    wrapped = peft.get_peft_model(Network().eval(), peft.LoraConfig(r=2, target_modules=["hidden", "out"]))
    wrapped.save_pretrained(folder)
    random = np.random.default_rng(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: random.normal(size=value.shape).astype(np.float32) for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def run(bundle: Bundle, task: str, **inputs: Tensor) -> list[Array]:
    session = onnxruntime.InferenceSession(bundle.path / bundle.task(task).parts[MODEL].model.path)
    return session.run(None, {name: values.numpy() for name, values in inputs.items()})


def bound(bundle: Bundle, task: str, length: int) -> float:
    """How far torch and ONNX Runtime may be apart, as a share of the largest output."""
    return engines_bound(bundle.path / bundle.task(task).parts[MODEL].model.path, length)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_adapter(tmp_path_factory.mktemp("adapters") / name, seed) for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def bundle(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The module as it is, with one adapter from the module, and with another from the bundle."""
    out = tmp_path_factory.mktemp("module") / "bundle"
    exporter.export(Network(), IMAGES, out, task="plain")
    exporter.export(Network(), IMAGES, out, task="one", adapter=adapters["one"])
    return add_task(out, adapters["two"], "two").bundle


@pytest.mark.parametrize("batch", [1, 5])
def test_the_graph_computes_what_the_module_and_pefts_merge_compute(
    bundle: Bundle, adapters: dict[str, Path], batch: int
):
    image = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        want = {"plain": Network().eval()(image).numpy()}
        for name, adapter in adapters.items():
            want[name] = peft.PeftModel.from_pretrained(Network().eval(), adapter).merge_and_unload()(image).numpy()
    for name, values in want.items():
        np.testing.assert_allclose(
            run(bundle, name, image=image)[0], values, atol=bound(bundle, name, 1) * np.abs(values).max(), err_msg=name
        )
    assert np.abs(want["one"] - want["plain"]).max() > 0.1
    assert check_bundle(bundle.path) == []


def test_every_weight_keeps_its_name_a_batchnorms_too(bundle: Bundle):
    assert task_part(bundle, "one").graph.weights.keys() == {
        name for name, value in Network().state_dict().items() if value.is_floating_point()
    }
    assert len(bundle.manifest.base.weights) == len(bundle.manifest.graphs) == 1
    assert task_part(bundle, "one").graph.head.task_type == MODULE


def test_the_module_is_left_as_it_was(tmp_path: Path):
    module = Network()
    before = copy.deepcopy(module.state_dict())
    exporter.export(module, IMAGES, tmp_path / "bundle", task="plain", precision="float16")
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_axes_outputs_and_precision_are_the_callers(tmp_path: Path):
    inputs = {"tokens": torch.ones(2, 5, dtype=torch.long), "weights": torch.ones(2, 5)}
    axes = {name: {0: "rows", 1: "length"} for name in inputs}
    exported = exporter.export(
        TwoAndTwo(),
        inputs,
        tmp_path / "bundle",
        task="plain",
        axes=axes,
        outputs=("mixed", "summed"),
        precision="float16",
    )
    graph = task_part(exported.bundle, "plain").graph
    assert [(port.name, port.dtype, port.shape) for port in (*graph.inputs, *graph.outputs)] == [
        ("tokens", "int64", ("rows", "length")),
        ("weights", "float32", ("rows", "length")),
        ("mixed", "float32", ("rows", "length", 5)),
        ("summed", "float32", ("rows", 5)),
    ]
    assert {values.dtype for values in merged_values(task_part(exported.bundle, "plain")).values()} == {
        np.dtype(np.float16)
    }
    tokens, weights = torch.arange(9).reshape(3, 3), torch.rand(3, 3)
    with torch.no_grad():
        want = TwoAndTwo()(tokens, weights)
    for got, value in zip(run(exported.bundle, "plain", tokens=tokens, weights=weights), want, strict=True):
        np.testing.assert_allclose(got, value.numpy(), atol=5e-3 * float(value.abs().max()))


class Recurrent(nn.Module):
    """A GRU of two layers that reads in both directions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gru, self.out = (
            nn.Embedding(20, 8),
            nn.GRU(8, 6, num_layers=2, batch_first=True, bidirectional=True),
            nn.Linear(12, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(tokens))[0])


def test_a_recurrent_network_is_onnxs_own_over_any_length(tmp_path: Path):
    wrapped = peft.get_peft_model(
        Recurrent().eval(), peft.LoraConfig(r=2, target_modules=["embed", "out"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    axes = {"tokens": {0: "batch", 1: "length"}}
    tokens = {"tokens": torch.ones(2, 5, dtype=torch.long)}
    bundle = exporter.export(
        Recurrent(), tokens, tmp_path / "bundle", task="one", adapter=tmp_path / "adapter", axes=axes
    ).bundle
    assert task_part(bundle, "one").graph.weights.keys() == Recurrent().state_dict().keys()
    assert task_part(bundle, "one").graph.outputs[0].shape == ("batch", "length", 3)
    merged = peft.PeftModel.from_pretrained(Recurrent().eval(), tmp_path / "adapter").merge_and_unload()
    for length in (1, 5, 9):
        other = torch.arange(3 * length).reshape(3, length) % 15
        with torch.no_grad():
            want = merged(other).numpy()
        np.testing.assert_allclose(
            run(bundle, "one", tokens=other)[0], want, atol=bound(bundle, "one", length) * np.abs(want).max()
        )


def test_axes_that_are_not_named_are_fixed(tmp_path: Path):
    bundle = exporter.export(Network(), IMAGES, tmp_path / "bundle", task="plain", axes={}).bundle
    assert task_part(bundle, "plain").graph.inputs[0].shape == (2, 3, 6, 6)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, image: Tensor) -> Tensor:
        return image * self.weight[0] if image.sum() > 0 else image


def test_a_module_that_torch_can_not_trace_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(ExportError, match=r"\AUntraceable: torch can't trace this as a MODULE model \([^\n]*\Z"):
        exporter.export(Untraceable(), IMAGES, tmp_path / "bundle", task="plain")
    assert list(tmp_path.iterdir()) == []


def test_another_modules_weights_are_another_base(bundle: Bundle):
    with pytest.raises(BundleError, match="use a bundle of its own"):
        exporter.export(Network(seed=1), IMAGES, bundle.path, task="other")


def test_an_adapter_of_another_module_is_refused(tmp_path: Path, adapters: dict[str, Path]):
    with pytest.raises(AdapterError, match="trained on another model"):
        exporter.export(
            TwoAndTwo(),
            {"tokens": torch.ones(2, 5, dtype=torch.long), "weights": torch.ones(2, 5)},
            tmp_path / "b",
            task="x",
            adapter=adapters["one"],
        )
    assert list(tmp_path.iterdir()) == []


def test_the_bundle_can_not_rebuild_the_module_and_says_so(bundle: Bundle):
    with pytest.raises(
        ExportError, match=r"task 'one' was exported from a Python module, which the bundle can't rebuild"
    ):
        torch_runner(task_part(bundle, "one"), merged_values(task_part(bundle, "one")))
    with pytest.raises(ExportError, match="compare with the module itself"):
        verify(task_part(bundle, "one"), [{"image": IMAGES["image"].numpy()}], {})


def test_the_manifest_of_a_module_reads_like_another(bundle: Bundle):
    assert sorted(open_bundle(bundle.path).manifest.tasks) == ["one", "plain", "two"]
    assert json.loads((bundle.path / "manifest.json").read_text())["base"]["precision"] == "float32"
