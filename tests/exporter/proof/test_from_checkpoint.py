"""The reference that is made of the checkpoint: independent of how the exporter reads axes, one layer at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import DONE, answer
from torch import nn
from zoo_bundles import CASES, Made, make

from exporter.bundle.manifest import open_bundle
from exporter.bundle.task_part import task_part
from exporter.proof.from_checkpoint import of_checkpoint
from exporter.proof.reference import OF_THE_BUNDLE
from exporter.proof.streaming import Streamed
from exporter.proof.verify import verify
from exporter.task import Request, export_task
from lora.adapter import LowRank
from lora.bases.structure import Parameter
from lora.errors import ExportError
from lora.merging import fit, layouts

NAME = "GPT2: classifier, every layer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    made = make(CASES[NAME], tmp_path_factory.mktemp("checkpoint"))
    made.export()
    return made


def stages(verification: Any) -> dict[str, bool | None]:
    return {stage.name: stage.passed for stage in verification.stages}


def test_a_good_task_passes_and_the_reference_is_named(made: Made):
    bundle = open_bundle(made.folder / "bundle")
    (verified,) = made.verified(bundle)
    assert verified.passed
    assert verified.reference == (
        f"transformers' own model of {made.base}, changed by the formula of each layer's class"
    )
    part = task_part(bundle, "task")
    assert verify(part, [made.feed(part)], {}).reference == OF_THE_BUNDLE


@pytest.fixture
def misread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every square weight is taken for its transpose, wherever the exporter or the bundle reads one."""

    def transposed(path: Path, update: LowRank, parameter: Parameter) -> LowRank:
        read = rightly(path, update, parameter)
        square = len(parameter.shape) == 2 and parameter.shape[0] == parameter.shape[1]
        other = {"linear": "transposed", "transposed": "linear"}
        return LowRank(**{**read.__dict__, "layout": other[read.layout]}) if square else read

    rightly = layouts.in_layout
    monkeypatch.setattr(fit, "in_layout", transposed)


def test_a_misreading_of_every_square_weight_is_seen(made: Made, misread: None, tmp_path: Path):
    bundle = export_task(Request(made.base, made.adapter, "task"), tmp_path / "bundle").bundle
    part = task_part(bundle, "task")
    assert verify(part, [made.feed(part)], {}).passed, "the bundle's own reading is the same"
    (verified,) = made.verified(bundle)
    assert not verified.passed
    assert stages(verified) == {"stored weights": False, "merged torch": False}


def test_its_values_are_the_formula_in_float64(made: Made):
    bundle = open_bundle(made.folder / "bundle")
    part = task_part(bundle, "task")
    with of_checkpoint(part, made.base) as reference:
        name = "transformer.h.0.attn.c_proj.weight"
        exact, base = reference.exact(name), reference.base(name)
    assert exact.dtype == np.float64
    assert np.abs(exact - base).max() > 1e-3
    np.testing.assert_allclose(exact, part.own[name], atol=1e-6)


def test_another_base_is_refused(made: Made, tiny_base: Path):
    part = task_part(open_bundle(made.folder / "bundle"), "task")
    with (
        pytest.raises(ExportError, match=r"is not the base of .*; give the base that it was exported from"),
        of_checkpoint(part, tiny_base),
    ):
        pass


def test_a_task_in_half_precision_is_held_against_the_base_in_it(made: Made, tmp_path: Path):
    request = Request(made.base, made.adapter, "task", precision="bfloat16", store="factors")
    (verified,) = made.verified(export_task(request, tmp_path / "bundle").bundle)
    assert verified.passed


def test_the_command_says_which_reference_it_used(made: Made):
    found: Any = answer("verify", made.folder / "bundle", "--task", "task", "--base", made.base, status=DONE)
    assert found["reference"].startswith(f"transformers' own model of {made.base}")
    assert json.loads(json.dumps(found))["passed"]


# --- One layer at a time ----------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Five layers, and a head that is one of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(5))
        self.norm = nn.LayerNorm(4)
        self.again = self.layers[0][0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(self.norm(x))


def test_a_streamed_model_answers_as_it_is_and_holds_one_layer_s_weights():
    torch.manual_seed(0)
    model, inputs = Stack(), torch.randn(3, 4, dtype=torch.float64)
    values = {name: tensor.detach().clone() for name, tensor in model.named_parameters(remove_duplicate=False)}
    want = copy.deepcopy(model).double()(inputs).detach()
    held: list[int] = []

    def value(names: tuple[str, ...]) -> torch.Tensor:
        held.append(sum(parameter.untyped_storage().nbytes() for parameter in set(model.parameters())))
        return values[names[0]]

    streamed = Streamed(model, value)
    torch.testing.assert_close(streamed.run(lambda: model(inputs)), want, rtol=0, atol=0)
    layer = (4 * 4 + 4) * 8
    assert max(held) <= layer + 12 * 8, "at most a layer, and a NaN for each other parameter"


class Reads(nn.Module):
    """A model that takes a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.layer.weight


def test_a_weight_that_is_read_from_outside_its_layer_is_there_all_the_same():
    model, inputs = Reads(), torch.randn(2, 4, dtype=torch.float64)
    weight = model.layer.weight.detach().clone()
    streamed = Streamed(model, lambda names: weight if names == ("layer.weight",) else torch.zeros(4))
    torch.testing.assert_close(streamed.run(lambda: model(inputs)), inputs @ weight.double(), rtol=0, atol=0)
    assert model.layer.weight.isnan().all()
