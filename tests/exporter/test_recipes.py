"""Tasks of adapters in every format, of several adapters with weights, and over quantized bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from command import lorafuse
from quantized_bases import four_bit, gguf_file
from safetensors.numpy import load_file, save_file
from zoo_bundles import Made

from engines import load
from exporter.bundle.check import check_bundle
from exporter.bundle.edits import remove_task
from exporter.bundle.manifest import open_bundle
from exporter.bundle.recipe import RECIPE, read_recipe
from exporter.bundle.task_part import task_part
from exporter.proof.from_checkpoint import of_checkpoint
from exporter.proof.verify import verify
from exporter.task import Adapters, Request, add_task, export_task
from exporter.variants.graphs import unmerged_graph
from lora.bases.opening import open_base
from lora.errors import AdapterError, CheckpointError
from lora.files.mapped import MappedFile
from lora.files.tensorfile import Array
from lora.formats.read import ReadOptions
from lora.merging.several import Blending
from scripts.support.zoo import Case, output, save_adapter, save_base
from scripts.support.zoo_models import MODELS

RANK, ALPHA = 4, 8
IDS = torch.arange(3, 15).reshape(2, 6)
PREFIX = "base_model.model."
LORALIB = ReadOptions(alpha=ALPHA)
LLAMA = Case(
    "Llama",
    MODELS["Llama"].config,
    "LlamaForCausalLM",
    "LlamaForCausalLM",
    MODELS["Llama"].call,
    {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
)


def updates(folder: Path) -> dict[str, tuple[Array, Array]]:
    """{module: its A and B} of a PEFT adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    return {
        module: (tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"])
        for module in modules
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Beside the base and the adapter a bundle, which has the base as the task ``unadapted``."""
    folder = tmp_path_factory.mktemp("recipes")
    save_base(LLAMA, folder / "base")
    wrapped, _ = save_adapter(LLAMA, folder / "base", folder / "adapter")
    export_task(Request(folder / "base", None, "unadapted"), folder / "bundle")
    asked = {"input_ids": IDS}
    return Made(folder, asked, np.asarray(output(wrapped, asked)))


@pytest.fixture
def bundle(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder / "bundle", tmp_path / "bundle"))


def inputs() -> dict[str, Array]:
    empty = {
        f"past_key_values.{n}.{kind}": np.zeros((2, 4, 0, 8), np.float32) for n in (0, 1) for kind in ("key", "value")
    }
    positions = np.tile(np.arange(6), (2, 1))
    return {"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 6), np.int64), "position_ids": positions, **empty}


def answer(bundle: Path, task: str) -> Array:
    with load(bundle, task, threads=1) as session:
        return session.run(inputs())["logits"]


def close(got: Array, want: Array) -> bool:
    return float(np.abs(got - want).max()) < 2e-5 * float(np.abs(want).max())


def answered(weights: dict[str, Array], folder: Path) -> Array:
    """What transformers' model of the base in ``folder`` answers with these weights."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
    return np.asarray(output(model, {"input_ids": IDS}))


def kohya(made: Made, path: Path) -> tuple[Path, ReadOptions]:
    tensors: dict[str, Array] = {}
    for module, (a, b) in updates(made.adapter).items():
        flat = "lora_te_" + module.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": np.array(ALPHA, "f4")}
    save_file(tensors, path / "kohya.safetensors")
    return path / "kohya.safetensors", ReadOptions()


def diffusers(made: Made, path: Path) -> tuple[Path, ReadOptions]:
    tensors = {}
    for module, (a, b) in updates(made.adapter).items():
        name = f"text_encoder.{module}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.alpha": np.array(ALPHA, "f4")}
    save_file(tensors, path / "pytorch_lora_weights.safetensors")
    return path / "pytorch_lora_weights.safetensors", ReadOptions()


def loralib_tensors(made: Made) -> dict[str, Array]:
    named = updates(made.adapter).items()
    return {
        f"{module}.lora_{factor}": values for module, pair in named for factor, values in zip("AB", pair, strict=True)
    }


def loralib(made: Made, path: Path) -> tuple[Path, ReadOptions]:
    save_file(loralib_tensors(made), path / "loralib.safetensors")
    return path / "loralib.safetensors", LORALIB


def pickled(made: Made, path: Path) -> tuple[Path, ReadOptions]:
    torch.save({name: torch.from_numpy(values) for name, values in loralib_tensors(made).items()}, path / "lora.pt")
    return path / "lora.pt", LORALIB


def pickled_peft(made: Made, path: Path) -> tuple[Path, ReadOptions]:
    folder = Path(shutil.copytree(made.adapter, path / "pickled"))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(values) for name, values in tensors.items()}, folder / "adapter_model.bin")
    return folder, ReadOptions()


@pytest.mark.parametrize("store", ["dense", "factors"])
@pytest.mark.parametrize("write", [kohya, diffusers, loralib, pickled, pickled_peft])
def test_an_adapter_of_every_format_is_the_same_task(made: Made, bundle: Path, tmp_path: Path, write: Any, store: Any):
    path, options = write(made, tmp_path)
    added = add_task(bundle, Adapters(((path, 1.0),), options), "task", store=store)
    assert close(answer(bundle, "task"), made.expected)
    part = task_part(open_bundle(bundle), "task")
    assert verify(part, [inputs()], {}).passed
    recorded = any(file.path.endswith(RECIPE) for file in added.bundle.task("task").adapter)
    assert recorded == (write is not pickled_peft)
    assert check_bundle(bundle) == []


def test_an_export_takes_what_adding_takes(made: Made, bundle: Path, tmp_path: Path):
    path, options = loralib(made, tmp_path)
    exported = export_task(Request(made.base, Adapters(((path, 1.0),), options), "task"), bundle)
    assert (exported.traced, exported.formula) == (False, "W + ΔW")
    assert close(answer(bundle, "task"), made.expected)


def other(made: Made, folder: Path) -> Path:
    """An adapter of the same modules with other values."""
    shutil.copytree(made.adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: values[..., ::-1].copy() for name, values in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize("store", ["dense", "factors"])
def test_several_adapters_are_added_with_their_weights(made: Made, bundle: Path, tmp_path: Path, store: Any):
    second = other(made, tmp_path / "other")
    given = Adapters(((made.adapter, 0.75), (second, -0.5)))
    task = add_task(bundle, given, "both", store=store).bundle.task("both")
    weights = load_file(made.base / "model.safetensors")
    for folder, weight in given.paths:
        for module, (a, b) in updates(folder).items():
            weights[f"{module}.weight"] = weights[f"{module}.weight"] + np.float32(weight * ALPHA / RANK) * (b @ a)
    assert close(answer(bundle, "both"), answered(weights, made.base))
    part = task_part(open_bundle(bundle), "both")
    assert verify(part, [inputs()], {}).passed
    with of_checkpoint(part, made.base) as reference:
        assert verify(part, [inputs()], {}, reference).passed
    swapped = Adapters(given.paths[::-1])
    assert (
        add_task(bundle, swapped, "swapped", store=store).bundle.task("swapped").adapter_sha256 == task.adapter_sha256
    )
    assert check_bundle(bundle) == []
    folders = {file.path.split("/")[1] for file in task.adapter}
    remove_task(bundle, "both")
    assert not any((bundle / "adapters" / folder).exists() for folder in folders)


@pytest.mark.parametrize("rule", ["ties", "dare_ties"])
def test_a_blend_is_the_same_dense_and_as_factors(made: Made, bundle: Path, tmp_path: Path, rule: Any):
    given = Adapters(((made.adapter, 1.0), (other(made, tmp_path / "other"), 1.0)), blending=Blending(rule, 0.6, 3))
    for name in ("dense", "factors"):
        add_task(bundle, given, name, store=name)
    np.testing.assert_array_equal(answer(bundle, "dense"), answer(bundle, "factors"))
    assert verify(task_part(open_bundle(bundle), "dense"), [inputs()], {}).passed


def test_the_unmerged_arm_of_several_adapters_has_a_branch_for_each(
    made: Made, bundle: Path, tmp_path: Path, run_graph
):
    add_task(bundle, Adapters(((made.adapter, 0.75), (other(made, tmp_path / "other"), -0.5))), "both")
    graph = unmerged_graph(task_part(open_bundle(bundle), "both"))
    assert close(run_graph(graph, bundle, inputs()), answer(bundle, "both"))


def test_adapters_of_two_kinds_of_tasks_are_refused(made: Made, bundle: Path, tmp_path: Path, write_adapter):
    given = Adapters(((made.adapter, 1.0), (write_adapter(), 1.0)))
    with pytest.raises(
        AdapterError, match=r"was trained for \w+, and .* for \w+; combine adapters of one kind of task"
    ):
        add_task(bundle, given, "both")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not the recipe of a task"),
        (b'{"adapters": [{"files": ["x"], "weight": 1}]', "not the recipe of a task"),
    ],
)
def test_a_recipe_that_can_t_be_read_is_named(content: bytes, message: str, tmp_path: Path):
    with pytest.raises(AdapterError, match=message):
        read_recipe([MappedFile(tmp_path / RECIPE, content, (0, 0, 0, 0))])


def test_a_recipe_names_files_of_its_task_only(tmp_path: Path):
    content = (
        b'{"adapters": [{"files": ["../x"], "weight": 1}], "options": {},'
        b' "blending": {"rule": "linear", "density": 0.5, "seed": 0}}'
    )
    with pytest.raises(AdapterError, match=r"names '\.\./x', which is no file of the task"):
        read_recipe([MappedFile(tmp_path / RECIPE, content, (0, 0, 0, 0))])


def test_the_command_takes_several_and_says_the_formula(made: Made, bundle: Path, tmp_path: Path):
    path, _ = loralib(made, tmp_path)
    said = lorafuse("bundle", "add", bundle, "--task", "task", "--adapter", f"{path}=0.5", "--alpha", "8").stdout
    assert "formula: W + ΔW" in said
    export_task(Request(made.base, Adapters(((path, 0.5),), LORALIB), "again"), bundle)
    np.testing.assert_array_equal(answer(bundle, "task"), answer(bundle, "again"))


# --- Quantized bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [four_bit, gguf_file])
def test_a_quantized_base_is_exported_as_what_it_stands_for(made: Made, tmp_path: Path, quantize: Any):
    base = quantize(made.base, tmp_path / "quantized")
    with pytest.raises(CheckpointError, match="--dequantize"):
        export_task(Request(base, made.adapter, "task"), tmp_path / "bundle")
    exported = export_task(Request(base, made.adapter, "task", dequantize=True), tmp_path / "bundle")
    opened = open_base(base, dequantize=True)
    assert exported.formula == opened.formula
    assert exported.formula.startswith("dequant(")
    assert exported.bundle.manifest.base.sha256 == opened.fingerprint()
    weights = {name: np.asarray(opened.tensors[name], np.float32) for name in opened.tensors}
    for module, (a, b) in updates(made.adapter).items():
        weights[f"{module}.weight"] = weights[f"{module}.weight"] + np.float32(ALPHA / RANK) * (b @ a)
    assert close(answer(tmp_path / "bundle", "task"), answered(weights, made.base))
    part = task_part(exported.bundle, "task")
    with of_checkpoint(part, base) as reference:
        assert verify(part, [inputs()], {}, reference).passed
    again = export_task(Request(base, made.adapter, "again", dequantize=True), tmp_path / "bundle")
    assert not again.traced
