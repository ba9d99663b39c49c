"""What a bundle knows of its base: how each weight is stored, whatever the flag in an adapter's file says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engines import load
from exporter.bundle.check import check_bundle
from exporter.bundle.edits import only_tasks
from exporter.bundle.layout import to_graph
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.records import Weight, encode
from exporter.bundle.structure import joined, of_graphs, of_parameters, read_structure
from exporter.bundle.task_part import task_part
from exporter.task import Request, add_task, export_task
from lora.bases.structure import BaseStructure, Parameter, Piece, from_json, with_aliases
from lora.errors import BundleError, CheckpointError
from lora.files.tensorfile import Array
from scripts.support.zoo import output, save_adapter, save_base
from scripts.support.zoo_cases import all_cases

SQUARE = "transformer.h.0.attn.c_proj.weight"  # (32, 32), a Conv1D's
BOUND = 2e-5
CASE = next(case for case in all_cases() if case.name == "GPT2: classifier, every layer")
IDS = torch.arange(3, 15).reshape(2, 6)


@dataclass(frozen=True)
class Exported:
    """A bundle with the task ``first``; and its adapter, unmerged."""

    folder: Path
    bundle: Bundle
    expected: Array


def save(folder: Path, base: Path) -> Array:
    """Write an adapter of the mixed base; what its unmerged model answers."""
    wrapped, _ = save_adapter(CASE, base, folder)
    config = folder / "adapter_config.json"  # PEFT writes the flag of the layer that came last, and heeds none
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": False}))
    return np.asarray(output(wrapped, {"input_ids": IDS}))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """GPT-2, whose layers are Conv1D, under a classifier that is a linear layer: one flag fits not both."""
    folder = tmp_path_factory.mktemp("mixed")
    save_base(CASE, folder / "base")
    expected = save(folder / "adapter", folder / "base")
    request = Request(folder / "base", folder / "adapter", "first")
    return Exported(folder, export_task(request, folder / "bundle").bundle, expected)


def answer(bundle: Path, task: str) -> Array:
    with load(bundle, task, threads=1) as session:
        return session.run({"input_ids": IDS.numpy(), "attention_mask": np.ones((2, 6), np.int64)})["logits"]


def without_structure(bundle: Path) -> Bundle:
    """As an older export wrote it."""
    manifest = open_bundle(bundle).manifest
    base = msgspec.structs.replace(manifest.base, structure=None)
    (bundle / "manifest.json").write_bytes(encode(msgspec.structs.replace(manifest, base=base)))
    return open_bundle(bundle)


def difference(got: Array, want: Array) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_a_square_weight_of_a_mixed_base_is_merged_as_the_model_stores_it(mixed: Exported):
    assert difference(answer(mixed.bundle.path, "first"), mixed.expected) < BOUND


@pytest.mark.parametrize("store", ["dense", "factors"])
def test_a_task_that_is_added_is_read_in_the_same_way(mixed: Exported, tmp_path: Path, store: Any):
    bundle = Path(shutil.copytree(mixed.bundle.path, tmp_path / "bundle"))
    add_task(bundle, mixed.folder / "adapter", "second", store=store)
    assert difference(answer(bundle, "second"), mixed.expected) < BOUND
    assert check_bundle(bundle) == []


def test_a_bundle_without_the_file_is_read_by_the_adapters_word_which_is_wrong_here(mixed: Exported, tmp_path: Path):
    bundle = without_structure(Path(shutil.copytree(mixed.bundle.path, tmp_path / "bundle")))
    add_task(bundle.path, mixed.folder / "adapter", "second")
    assert difference(answer(bundle.path, "second"), mixed.expected) > 0.01
    assert {change.layout for change in task_part(bundle, "first").changes[SQUARE]} == {"linear"}
    assert {change.layout for change in task_part(mixed.bundle, "first").changes[SQUARE]} == {"transposed"}


def test_the_file_is_the_manifests_and_says_the_kind_of_each_weight(mixed: Exported):
    file = mixed.bundle.manifest.base.structure
    assert file is not None
    assert (file.path.startswith("base/structure-"), file.path.endswith(".json")) == (True, True)
    structure = read_structure(mixed.bundle)
    assert structure is not None
    kinds = {name: structure.parameters[name].kind for name in (SQUARE, "score.weight", "transformer.wte.weight")}
    assert list(kinds.values()) == ["conv1d", "linear", "embedding"]
    assert all(parameter.stored == (Piece(name),) for name, parameter in structure.parameters.items())


def test_a_head_that_comes_later_joins_the_file(mixed: Exported, tmp_path: Path):
    bundle = Path(shutil.copytree(mixed.bundle.path, tmp_path / "bundle"))
    added = export_task(Request(mixed.folder / "base", None, "unadapted", task_type="CAUSAL_LM"), bundle)
    structure, former = read_structure(added.bundle), read_structure(mixed.bundle)
    assert structure is not None
    assert former is not None
    assert structure.parameters.keys() - former.parameters.keys() == {"lm_head.weight"}
    assert structure.parameters.keys() > former.parameters.keys()
    assert structure.model == "GPT2ForSequenceClassification, GPT2LMHeadModel"
    assert check_bundle(bundle) == []
    assert difference(answer(bundle, "first"), mixed.expected) < BOUND
    kept = only_tasks(added.bundle, ["first"])
    assert kept.base.structure == added.bundle.manifest.base.structure


@pytest.mark.parametrize("content", [b"{}", b"\xff", b'{"model": "", "parameters": {"a": 1}}'])
def test_a_file_that_is_no_structure_is_named(mixed: Exported, tmp_path: Path, content: bytes):
    with pytest.raises(CheckpointError, match=r"structure.json: not the structure of a base .*export the base again"):
        from_json(content, tmp_path / "structure.json")


def test_a_damaged_file_is_an_error_and_an_export_writes_it_anew(mixed: Exported, tmp_path: Path):
    bundle = Path(shutil.copytree(mixed.bundle.path, tmp_path / "bundle"))
    file = mixed.bundle.manifest.base.structure
    assert file is not None
    (bundle / file.path).write_bytes(b"x" * file.size)
    with pytest.raises(BundleError, match="content does not match the manifest's SHA-256"):
        add_task(bundle, mixed.folder / "adapter", "second", store="factors")
    export_task(Request(mixed.folder / "base", mixed.folder / "adapter", "second"), bundle)
    assert read_structure(open_bundle(bundle)) == read_structure(mixed.bundle)


def test_reading_it_needs_no_torch(mixed: Exported, tmp_path: Path):
    program = """
import sys
from pathlib import Path
from exporter.task import add_task
add_task(Path(sys.argv[1]), Path(sys.argv[2]), "second")
print(sorted({"torch", "transformers"} & set(sys.modules)))
"""
    bundle = Path(shutil.copytree(mixed.bundle.path, tmp_path / "bundle"))
    command = [sys.executable, "-c", program, bundle, mixed.folder / "adapter"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- From a checkpoint's structure to that of a bundle's graphs ------------------------------------------------------

FUSED = with_aliases(
    BaseStructure(
        "A",
        {
            "head.weight": Parameter("linear", (3, 4)),
            "body.norm.weight": Parameter("norm", (4,), (Piece("old.gamma"),)),
            "body.both.weight": Parameter("linear", (8, 4), (Piece("left", ((0, 4),)), Piece("right", ((4, 8),)))),
            "out.weight": Parameter("linear", (9, 4)),
            "in.weight": Parameter("embedding", (9, 4), (Piece("in.weight"),)),
        },
        tied=(("in.weight", "out.weight"),),
    )
)


def test_a_parameter_that_the_checkpoint_cuts_is_whole_in_a_bundle_and_found_by_its_name_on_the_disk():
    structure = of_parameters(FUSED)
    assert structure.parameters["body.both.weight"].stored == (Piece("body.both.weight"),)
    assert structure.find("old.gamma") == structure.parameters["body.norm.weight"]
    assert structure.find("left") is None
    assert from_json(structure.to_json(), "here") == structure
    assert from_json(structure.to_json(), "here").aliases == structure.aliases


def test_shapes_and_values_are_the_graphs():
    weights = {"head.weight": Weight((1, 0), (4, 7), "float32"), "in.weight": Weight(None, (9, 4), "float32")}
    structure = of_graphs(of_parameters(FUSED), weights, {"in.weight"})
    assert structure is not None
    assert structure.parameters["head.weight"] == Parameter("linear", (7, 4))
    assert structure.shared() == {"out.weight": "in.weight"}, "tied in these graphs"
    assert to_graph(np.zeros((7, 4)), (1, 0)).shape == (4, 7)


def test_a_weight_that_the_file_says_nothing_of_is_read_by_the_adapters_word():
    structure = of_graphs(of_parameters(FUSED), {"other.weight": Weight(None, (4, 4), "float32")}, ())
    assert structure is not None
    assert structure.parameters["other.weight"].kind == "flagged"


def test_models_of_one_body_are_joined():
    other = BaseStructure("B", {"classifier.weight": Parameter("linear", (2, 4))})
    both = joined(of_parameters(FUSED), other)
    assert both is not None
    assert (both.model, both.parameters.keys()) == ("A, B", FUSED.parameters.keys() | {"classifier.weight"})
    assert joined(both, other) == both
