"""The torch model that a bundle's graph came from, run on any weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from float32_sums import engines_bound
from safetensors.numpy import load_file

from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import TaskPart, task_part
from exporter.proof.reference import base_values, merged_values, of_bundle, streamed_runner, torch_runner
from exporter.task import Request, export_task
from lora.files.tensorfile import Array


def exact_values(part: TaskPart) -> dict[str, Array]:
    reference = of_bundle(part)
    return {name: reference.exact(name) for name in part.graph.weights}


HEAD = {"classifier.weight", "classifier.bias"}
ADAPTED = {
    f"bert.encoder.layer.{layer}.attention.self.{target}.weight" for layer in (0, 1) for target in ("query", "value")
}


@pytest.fixture(scope="module")
def adapter(tiny_bundle: Bundle) -> dict[str, Array]:
    """The tensors of the adapter that ``first`` was merged from, without PEFT's prefix."""
    saved = load_file(tiny_bundle.path.parent / "adapter" / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): values for name, values in saved.items()}


def test_base_values_are_the_checkpoints_and_the_head_is_the_tasks(
    tiny_bundle: Bundle, tiny_base: Path, adapter: dict[str, Array]
):
    want = {f"bert.{name}": values for name, values in load_file(tiny_base / "model.safetensors").items()} | {
        name: adapter[name] for name in HEAD
    }
    got = base_values(task_part(tiny_bundle, "first"))
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values)


def test_merged_values_differ_from_the_bases_where_the_adapter_acts_and_nowhere_else(tiny_bundle: Bundle):
    part = task_part(tiny_bundle, "first")
    base, merged = base_values(part), merged_values(part)
    assert {name for name in base if not np.array_equal(base[name], merged[name])} == ADAPTED


def test_exact_values_are_the_formula_in_float64(tiny_bundle: Bundle, tiny_base: Path, adapter: dict[str, Array]):
    base, exact = load_file(tiny_base / "model.safetensors"), exact_values(task_part(tiny_bundle, "first"))
    assert {values.dtype for values in exact.values()} == {np.dtype(np.float64)}
    for name in ADAPTED:
        a, b = (adapter[name.replace(".weight", f".lora_{factor}.weight")].astype(np.float64) for factor in "AB")
        np.testing.assert_allclose(
            exact[name], base[name.removeprefix("bert.")].astype(np.float64) + 8 / 4 * (b @ a), rtol=1e-15
        )


def test_exact_and_stored_values_differ_by_rounding_only(tiny_bundle: Bundle):
    part = task_part(tiny_bundle, "first")
    exact, merged = exact_values(part), merged_values(part)
    assert 0 < max(float(np.abs(exact[name] - merged[name]).max()) for name in ADAPTED) < 1e-6


@pytest.mark.parametrize(("exact", "dtype"), [(False, np.float32), (True, np.float64)])
def test_the_runner_computes_in_float32_or_for_an_oracle_in_float64(
    tiny_bundle: Bundle, token_ids, exact: bool, dtype: type
):
    part = task_part(tiny_bundle, "first")
    values = merged_values(part)
    run = streamed_runner(part, values.__getitem__) if exact else torch_runner(part, values)
    outputs = run(token_ids())
    assert (outputs.dtype, outputs.shape) == (dtype, (3, 2))


def test_the_runner_is_the_transformers_model(tiny_bundle: Bundle, tiny_base: Path, token_ids, shape: tuple[int, int]):
    part = task_part(tiny_bundle, "first")
    model = transformers.BertForSequenceClassification.from_pretrained(tiny_base, num_labels=2).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in merged_values(part).items()})
    inputs = token_ids(shape)
    with torch.no_grad():
        want = model(**{name: torch.from_numpy(values) for name, values in inputs.items()}).logits.numpy()
    got = torch_runner(part, merged_values(part))(inputs)
    # torch's fused attention has kernels of its own
    bound = engines_bound(tiny_bundle.path / part.part.model.path, shape[1])
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


def test_the_runner_refuses_values_that_leave_a_weight_random(tiny_bundle: Bundle):
    part = task_part(tiny_bundle, "first")
    values = merged_values(part)
    del values["bert.pooler.dense.weight"]
    with pytest.raises(AssertionError, match=r"no values for weights of the graph: \['bert\.pooler\.dense\.weight'\]"):
        torch_runner(part, values)


def test_the_runner_needs_nothing_but_the_bundle(tiny_bundle: Bundle, tmp_path: Path, token_ids):
    copy = Bundle(Path(shutil.copytree(tiny_bundle.path, tmp_path / "elsewhere")), tiny_bundle.manifest)
    parts = [task_part(bundle, "first") for bundle in (tiny_bundle, copy)]
    here, there = (torch_runner(part, merged_values(part))(token_ids()) for part in parts)
    np.testing.assert_allclose(here, there, rtol=1e-5)


def test_a_saved_bias_of_the_encoder_counts_as_the_tasks_change(tiny_copy: Path, tiny_base: Path, write_adapter):
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    adapter = write_adapter(config={"bias": "lora_only"}, tensors={f"base_model.model.{bias}": np.full(32, 0.5)})
    bundle = export_task(Request(tiny_base, adapter, "second"), tiny_copy).bundle
    part = task_part(bundle, "second")
    np.testing.assert_array_equal(merged_values(part)[bias], np.full(32, 0.5, np.float32))
    np.testing.assert_array_equal(exact_values(part)[bias], np.full(32, 0.5))
    np.testing.assert_array_equal(base_values(part)[bias], np.zeros(32, np.float32))
