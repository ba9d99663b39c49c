"""Every architecture, with an adapter that PEFT has written: the graph in the bundle is the model that PEFT merges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from float32_sums import engines_bound
from onnx import TensorProto
from tiny_models import (
    ARCHITECTURES,
    SHAPES,
    Architecture,
    Shape,
    answers,
    call,
    export,
    load_base,
    merged_by_peft,
    model_path,
    open_session,
    save_adapter,
    save_base,
    worst_differences,
)

from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL
from exporter.graph.digest import graph_digest
from exporter.writing import Exported
from lora.files.tensorfile import Array

LONGEST = 28  # tokens, the past's included, in any test here
DECODERS = [name for name, architecture in ARCHITECTURES.items() if architecture.task_type == "CAUSAL_LM"]


@dataclass(frozen=True)
class Case:
    """An architecture, exported once: the task ``adapted`` and the model that PEFT merges."""

    architecture: Architecture
    base: Path
    bundle: Bundle
    merged: Any
    session: onnxruntime.InferenceSession

    @cached_property
    def bound(self) -> float:
        """Of the largest output: about 2e-5, and 1.2e-6 is the largest seen.

        Merged weights that are off by a thousandth show as 1e-3, one element of one bias as 6e-5.
        """
        return engines_bound(self.path, LONGEST)

    @property
    def path(self) -> Path:
        return model_path(self.bundle, "adapted")

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.path, load_external_data=False).graph


@dataclass(frozen=True)
class Other:
    """A second task of the same head in the same bundle, and the torch model that it stands for."""

    exported: Exported
    model: Any
    session: onnxruntime.InferenceSession


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("architecture")
    base = save_base(architecture, folder / "base")
    adapter = save_adapter(architecture, base, folder / "adapter")
    bundle = export(architecture, base, adapter, "adapted", folder / "bundle").bundle
    return Case(
        architecture,
        base,
        bundle,
        merged_by_peft(architecture, base, adapter),
        open_session(model_path(bundle, "adapted")),
    )


@pytest.fixture(scope="module")
def other(case: Case) -> Other:
    """Of the unadapted base where its head is its own, else of an adapter with another seed."""
    adapter = None
    if case.architecture.head:
        adapter = save_adapter(case.architecture, case.base, case.base.parent / "other", seed=2)
    model = (
        merged_by_peft(case.architecture, case.base, adapter) if adapter else load_base(case.architecture, case.base)
    )
    exported = export(case.architecture, case.base, adapter, "other", case.bundle.path)
    return Other(exported, model, open_session(model_path(exported.bundle, "other")))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_the_graph_computes_what_the_model_that_peft_merges_does(case: Case, shape: Shape):
    made = call(case.architecture, case.merged, input_names(case.session), shape)
    differences = worst_differences(run(case.session, made.feed), made.expected)
    assert all(difference <= case.bound for difference in differences.values()), differences


def test_another_task_in_the_bundle_computes_its_own_model_and_not_this_one(case: Case, other: Other):
    made = call(case.architecture, other.model, input_names(case.session), SHAPES[-1])
    same, different = (
        worst_differences(run(session, made.feed), made.expected) for session in (other.session, case.session)
    )
    assert all(difference <= case.bound for difference in same.values()), same
    assert max(different.values()) > 500 * case.bound, different


def test_all_tasks_of_a_head_have_one_graph_and_the_second_is_not_traced(case: Case, other: Other):
    bundle = other.exported.bundle
    digests = {
        graph_digest(onnx.load(model_path(bundle, task), load_external_data=False)) for task in ("adapted", "other")
    }
    assert (
        digests
        == {bundle.task("adapted").parts[MODEL].graph}
        == {bundle.task("other").parts[MODEL].graph}
        == set(bundle.manifest.graphs)
    )
    assert not other.exported.traced


@pytest.mark.parametrize("case", ["GPT2", "T5", "CLIP vision"], indirect=True)
def test_a_trace_of_the_unadapted_base_gives_the_graph_of_the_merged_model(case: Case, tmp_path: Path):
    alone = export(case.architecture, case.base, None, "unadapted", tmp_path / "bundle")
    assert alone.traced
    assert (
        graph_digest(onnx.load(model_path(alone.bundle, "unadapted"), load_external_data=False))
        == case.bundle.task("adapted").parts[MODEL].graph
    )


def test_every_parameter_that_the_outputs_depend_on_is_an_external_initializer_of_its_name(case: Case):
    model = load_base(case.architecture, case.base).requires_grad_()
    made = call(case.architecture, case.merged, input_names(case.session), SHAPES[1])
    feed = {
        name: torch.from_numpy(values) for name, values in made.feed.items() if not name.startswith("past_key_values")
    }
    sum(values.sum() for values in answers(case.architecture, model, feed).values()).backward()
    read = {
        name.removeprefix(case.architecture.inner)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert {tensor.name for tensor in case.graph.initializer if tensor.data_location == TensorProto.EXTERNAL} == read


def test_no_large_tensor_is_inside_the_graph(case: Case):
    inline = {
        tensor.name: math.prod(tensor.dims)
        for tensor in case.graph.initializer
        if tensor.data_location != TensorProto.EXTERNAL
    }
    assert {name: size for name, size in inline.items() if size > 1024} == {}


def test_onnx_finds_the_model_valid(case: Case):
    onnx.checker.check_model(case.path, full_check=True)


def test_nothing_in_the_graph_is_called_lora(case: Case):
    graph = case.graph
    names = [tensor.name for tensor in graph.initializer] + [value.name for value in (*graph.input, *graph.output)]
    names += [name for node in graph.node for name in (node.name, *node.input, *node.output)]
    assert names
    assert [name for name in names if "lora" in name.lower()] == []


@pytest.mark.parametrize("case", DECODERS, indirect=True)
def test_a_prefill_and_steps_of_one_token_give_the_logits_of_one_pass(case: Case):
    ids = np.random.default_rng(0).integers(3, 96, (2, 12))
    whole = run(case.session, decoder_feed(case.session, ids))
    given = run(case.session, decoder_feed(case.session, ids[:, :7]))
    logits = [given["logits"]]
    for length in range(8, 13):
        given = run(case.session, decoder_feed(case.session, ids[:, :length], past=given))
        logits.append(given["logits"])
    given["logits"] = np.concatenate(logits, axis=1)
    differences = worst_differences(given, whole)
    assert [step.shape[1] for step in logits] == [7, 1, 1, 1, 1, 1]
    assert all(difference <= case.bound for difference in differences.values()), differences


@pytest.mark.parametrize("case", DECODERS, indirect=True)
def test_a_row_that_is_padded_on_the_left_gives_the_logits_that_it_gives_alone(case: Case):
    lengths, longest = (7, 1, 5), 7
    ids = np.random.default_rng(0).integers(3, 96, (3, longest + 1))
    mask = np.stack([np.arange(longest + 1) >= longest - length for length in lengths]).astype(np.int64)
    ids[mask == 0] = 0
    prefill = run(case.session, decoder_feed(case.session, ids[:, :longest], mask[:, :longest]))
    step = run(case.session, decoder_feed(case.session, ids, mask, past=prefill))
    for row, length in enumerate(lengths):
        alone = run(case.session, decoder_feed(case.session, ids[row : row + 1, longest - length :]))["logits"][0, -2:]
        together = np.stack([prefill["logits"][row, -1], step["logits"][row, -1]])
        differences = worst_differences({"logits": together}, {"logits": alone})
        assert differences["logits"] <= case.bound


def run(session: onnxruntime.InferenceSession, feed: Mapping[str, Array]) -> dict[str, Array]:
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, dict(feed)), strict=True))


def input_names(session: onnxruntime.InferenceSession) -> list[str]:
    return [value.name for value in session.get_inputs()]


def decoder_feed(
    session: onnxruntime.InferenceSession,
    ids: Array,
    mask: Array | None = None,
    past: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """The tokens of ``ids`` that are not in ``past``, the outputs of an earlier run, yet; positions count a row's own
    tokens.
    """
    mask = np.ones_like(ids) if mask is None else mask
    cached = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    cache = {
        name: past[name.replace("past_key_values", "present")]
        if past
        else np.zeros((len(ids), heads, 0, width), np.float32)
        for name, (_, heads, _, width) in cached.items()
    }
    known = next(iter(cache.values())).shape[2]
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return {"input_ids": ids[:, known:], "attention_mask": mask, "position_ids": positions[:, known:], **cache}
