"""A language model whose output embedding is its input's: one tensor in the graph until an adapter makes them two."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from float32_sums import engines_bound
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file
from tiny_models import (
    ARCHITECTURES,
    DECODER,
    SHAPES,
    Shape,
    call,
    export,
    load_base,
    model_path,
    open_session,
    save_adapter,
    save_base,
    unmerged,
    worst_differences,
)

from exporter.bundle.layout import to_model
from exporter.bundle.manifest import Bundle
from exporter.bundle.task_part import task_part
from lora.files.tensorfile import Array

TIED = dataclasses.replace(ARCHITECTURES["Llama"], config=transformers.LlamaConfig(**DECODER, tie_word_embeddings=True))
INPUT, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# What each adapter changes, by the name of its task.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 60]},
    "saved-output": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-input": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "input": {"target_modules": ["q_proj", "embed_tokens"]},
}
STAY_TIED = ("attention", "tokens")
UNTIE = ("saved-output", "saved-input", "output", "input")


@dataclass(frozen=True)
class Case:
    """One bundle with a task for each of ``ADAPTERS``, and which of them were traced."""

    base: Path
    bundle: Bundle
    traced: dict[str, bool]

    def adapter(self, task: str) -> Path:
        return self.base.parent / task

    def embeddings(self, task: str) -> dict[str, TensorProto]:
        """The graph's embeddings, with where their values lie."""
        graph = onnx.load(model_path(self.bundle, task), load_external_data=False).graph
        return {tensor.name: tensor for tensor in graph.initializer if tensor.name in (INPUT, OUTPUT)}

    def values(self, task: str) -> dict[str, Array]:
        """Their values, in the model's axis order."""
        weights = task_part(self.bundle, task).graph.weights
        loaded = {tensor.name: tensor for tensor in onnx.load(model_path(self.bundle, task)).graph.initializer}
        return {
            name: to_model(numpy_helper.to_array(loaded[name]), weights[name].order) for name in self.embeddings(task)
        }


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tied")
    base = save_base(TIED, folder / "base")
    assert OUTPUT not in load_file(base / "model.safetensors")
    adapters = {task: save_adapter(TIED, base, folder / task, **changes) for task, changes in ADAPTERS.items()}
    exported = {task: export(TIED, base, adapter, task, folder / "bundle") for task, adapter in adapters.items()}
    return Case(base, exported[list(ADAPTERS)[-1]].bundle, {task: each.traced for task, each in exported.items()})


@pytest.fixture(scope="module")
def embedding(case: Case) -> Array:
    return load_file(case.base / "model.safetensors")[INPUT]


def merged(case: Case, task: str) -> Any:
    """PEFT merges into a tensor in place, so that two embeddings must be two before it does."""
    model = load_base(TIED, case.base)
    if task in UNTIE:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.config.tie_word_embeddings = False
    return peft.PeftModel.from_pretrained(model, case.adapter(task)).merge_and_unload().eval()


def worst(case: Case, task: str, model: Any, shape: Shape) -> float:
    """The largest difference, in what two engines may differ by."""
    session = open_session(model_path(case.bundle, task))
    made = call(TIED, model, [value.name for value in session.get_inputs()], shape)
    given = dict(zip([value.name for value in session.get_outputs()], session.run(None, made.feed), strict=True))
    return max(worst_differences(given, made.expected).values()) / engines_bound(
        model_path(case.bundle, task), shape[1] + shape[2]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("task", ADAPTERS)
def test_the_graph_computes_what_the_model_does_in_which_the_adapter_was_trained(case: Case, task: str, shape: Shape):
    assert worst(case, task, unmerged(TIED, case.base, case.adapter(task)), shape) <= 1


@pytest.mark.parametrize("task", ADAPTERS)
def test_the_graph_computes_what_the_model_that_peft_merges_does(case: Case, task: str):
    assert worst(case, task, merged(case, task), SHAPES[-1]) <= 1


def test_the_tasks_differ_from_the_base_and_from_each_other(case: Case):
    models = {task: merged(case, task) for task in ADAPTERS} | {"base": load_base(TIED, case.base)}
    apart = [
        worst(case, task, model, SHAPES[-1]) for task in ADAPTERS for name, model in models.items() if name != task
    ]
    assert min(apart) > 500


@pytest.mark.parametrize("task", STAY_TIED)
def test_an_adapter_that_changes_both_or_neither_leaves_one_initializer(case: Case, task: str):
    assert case.embeddings(task).keys() == {INPUT}
    assert task_part(case.bundle, task).graph.head.tied


@pytest.mark.parametrize("task", UNTIE)
def test_an_adapter_that_changes_one_of_the_two_makes_them_two(case: Case, task: str):
    assert case.embeddings(task).keys() == {INPUT, OUTPUT}
    assert not task_part(case.bundle, task).graph.head.tied


@pytest.mark.parametrize("task", ["attention", "saved-output", "output"])
def test_the_input_embedding_stays_the_bases_where_the_adapter_leaves_it(case: Case, embedding: Array, task: str):
    np.testing.assert_array_equal(case.values(task)[INPUT], embedding)


@pytest.mark.parametrize("task", ["saved-input", "input"])
def test_the_output_embedding_stays_the_bases_where_the_adapter_leaves_it(case: Case, embedding: Array, task: str):
    np.testing.assert_array_equal(case.values(task)[OUTPUT], embedding)
    assert np.abs(case.values(task)[INPUT] - embedding).max() > 0.1


def test_an_update_of_the_output_is_on_top_of_the_bases_embedding(case: Case, embedding: Array):
    factors = load_file(case.adapter("output") / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.lm_head.lora_{factor}.weight"] for factor in "AB")
    np.testing.assert_allclose(case.values("output")[OUTPUT], embedding + 8 / 4 * b @ a, atol=1e-6)


def test_trained_tokens_change_their_rows_alone(case: Case, embedding: Array):
    changed = (case.values("tokens")[INPUT] != embedding).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [5, 60]


def test_the_bundle_says_which_parameters_are_one_tensor_in_the_base(case: Case):
    assert case.bundle.manifest.base.tied == ((INPUT, OUTPUT),)


def test_both_kinds_live_in_one_bundle_that_keeps_the_bases_embedding_once(case: Case):
    assert len(case.bundle.manifest.graphs) == 2
    assert case.traced == dict.fromkeys(ADAPTERS, False) | {"attention": True, "saved-output": True}
    places = {
        tuple(entry.value for entry in case.embeddings(task)[INPUT].external_data)
        for task in ("attention", "saved-output", "output")
    }
    assert len(places) == 1
    assert places.pop()[0] in {file.path for file in case.bundle.manifest.base.weights}
