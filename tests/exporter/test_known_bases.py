"""Bases that names alone misread, exported, verified against their checkpoints, and run: each is held against PEFT's
unmerged forward. (Merged into checkpoints: tests/lora/merging/test_known_bases.py.)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from zoo_bundles import CASES, make

from engines import load
from exporter.bundle.task_part import task_parts
from lora.errors import ExportError, LorafuseError

BOUND = 2e-5
ROWS = {
    "a square weight beside a Conv1D": ["GPT2: classifier, every layer", "BERT to GPT-2: every linear layer"],
    "the first prefix that fits": ["CLIP: image's part"],
    "a saved tensor that the base lacks": ["ViT: saved biases", "ViT: head"],
    "untying": ["T5: output embedding", "Bart: output embedding", "Llama tied: output embedding"],
    "a classifier on a causal base": ["Llama: classifier"],
    "other methods": ["GPT2: DoRA", "GPT2: IA3Config", "Llama tied: trained tokens"],
}
TASK_TYPES = {"ViT: saved biases": "IMAGE_CLS", "ViT: head": "IMAGE_CLS"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each base has its bundle: a head that is known already is not traced again."""
    return tmp_path_factory.mktemp("bundles")


@pytest.mark.parametrize("name", [name for names in ROWS.values() for name in names])
def test_a_base_that_names_misread_is_exported_exactly_and_verified(name: str, tmp_path: Path, bundles: Path):
    made = make(CASES[name], tmp_path)
    exported = made.export(bundles / name.partition(":")[0], task_type=TASK_TYPES.get(name))
    assert made.difference(made.answers(exported.bundle)) < BOUND
    (verified,) = made.verified(exported.bundle)
    assert verified.passed
    assert verified.reference.startswith("transformers' own model of ")
    assert exported.unread == (("encoder.pooler.dense.weight",) if "GPT-2" in name else ())


def test_an_adapter_of_one_tower_reaches_that_tower(tmp_path: Path):
    made = make(CASES["CLIP: text's part"], tmp_path)
    bundle = made.export().bundle
    changed = {part.role: part.changes.keys() for part in task_parts(bundle, "task")}
    assert {name.split(".")[0] for name in changed["text"]} == {"text_model"}
    assert changed["vision"] == set()
    with load(bundle.path, "task", threads=1) as session:
        (part, _) = task_parts(bundle, "task")
        assert made.difference(session.run(made.feed(part), part="text")) < BOUND
    assert all(verified.passed for verified in made.verified(bundle))


def test_an_adapter_that_does_not_say_its_tower_is_refused(tmp_path: Path):
    made = make(CASES["CLIP: text's part"], tmp_path)
    config = made.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_mapping": None}))
    with pytest.raises(ExportError, match="may be of the text or the vision tower, and the file does not say which"):
        made.export()


def test_one_of_several_inputs_that_are_one_tensor_is_refused(tmp_path: Path, bundles: Path):
    made = make(CASES["T5: input embedding"], tmp_path)
    with pytest.raises(LorafuseError, match=r"'decoder\.embed_tokens\.weight' has no place in the graph"):
        made.export(bundles / "T5")
