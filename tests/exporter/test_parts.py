"""A model of two parts: one adapter over both towers of CLIP, with their projections, is one task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import IMAGE, TEXT

import engines
from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import task_part, task_parts
from exporter.proof.verify import verify
from exporter.task import Request, add_task, export_task
from lora.errors import BundleError, EngineError
from lora.files.tensorfile import Array

BOTH = ["q_proj", "v_proj", "text_projection", "visual_projection"]
PARTS = ("text", "vision")


def trained(base: Path, out: Path, seed: int, targets: list[str] | str) -> peft.PeftModel:
    """PEFT's adapter with random values, saved; and the model that it is in, unmerged."""
    torch.manual_seed(seed)
    model = transformers.CLIPModel.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    adapted.save_pretrained(str(out))
    return adapted.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "base"
    text = dict(TEXT, projection_dim=16, eos_token_id=2)
    config = transformers.CLIPConfig(vision_config=dict(IMAGE, projection_dim=16), text_config=text, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(base: Path) -> dict[str, peft.PeftModel]:
    return {name: trained(base, base.parent / name, seed, BOTH) for seed, name in enumerate(("one", "other"))}


@pytest.fixture(scope="module")
def bundle(base: Path, models: Mapping[str, peft.PeftModel]) -> Bundle:
    export_task(Request(base, base.parent / "one", "one"), base.parent / "bundle")
    return add_task(base.parent / "bundle", base.parent / "other", "other", store="factors").bundle


def inputs(part: str) -> dict[str, Array]:
    random = np.random.default_rng(0)
    if part == "vision":
        size = IMAGE["image_size"]
        return {"pixel_values": random.normal(size=(3, IMAGE.get("num_channels", 3), size, size)).astype(np.float32)}
    ids = random.integers(3, 60, (3, 9))
    ids[:, 6:] = 2  # an end, and padding after it
    return {"input_ids": ids, "attention_mask": (np.arange(9) < np.array([[7], [7], [7]])).astype(np.int64)}


def wanted(model: peft.PeftModel, part: str) -> dict[str, Array]:
    given = {name: torch.from_numpy(values) for name, values in inputs(part).items()}
    with torch.no_grad():
        answer = (model.get_text_features if part == "text" else model.get_image_features)(**given)
    embeds = "text_embeds" if part == "text" else "image_embeds"
    return {embeds: answer.pooler_output.numpy(), "last_hidden_state": answer.last_hidden_state.numpy()}


def assert_near(got: Mapping[str, Array], want: Mapping[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=0, atol=2e-5 * np.abs(values).max(), err_msg=name)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", ["one", "other"])
def test_each_part_answers_as_pefts_model(bundle: Bundle, models: Mapping[str, peft.PeftModel], task: str, part: str):
    with engines.load(bundle.path, task, threads=1) as session:
        assert_near(session.run(inputs(part), part), wanted(models[task], part))


@pytest.mark.parametrize("mode", ["dedicated", "resident"])
def test_a_runtime_runs_parts_of_several_tasks_and_of_the_base(
    bundle: Bundle, base: Path, models: Mapping[str, peft.PeftModel], mode: str
):
    plain = transformers.CLIPModel.from_pretrained(base).eval()
    with engines.open(bundle.path, mode, threads=1) as runtime:
        for part in PARTS:
            for task in ("one", "other"):
                assert_near(runtime.run(task, inputs(part), part=part), wanted(models[task], part))
            assert_near(runtime.run("one", inputs(part), adapted=False, part=part), wanted(plain, part))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", ["one", "other"])
def test_each_part_is_verified(bundle: Bundle, task: str, part: str):
    result = verify(task_part(bundle, task, part), [inputs(part)], {})
    assert result.passed
    assert result.differs


def test_the_bundle_is_whole_and_its_base_is_stored_once(bundle: Bundle):
    assert check_bundle(bundle.path) == []
    assert {graph.part for graph in bundle.manifest.graphs.values()} == set(PARTS)
    assert [part.role for part in task_parts(bundle, "one")] == list(PARTS)
    names = [set(task_part(bundle, "one", part).base) for part in PARTS]
    assert not names[0] & names[1]


def test_a_part_must_be_named(bundle: Bundle):
    with (
        engines.load(bundle.path, "one", threads=1) as session,
        pytest.raises(EngineError, match="parts: text, vision"),
    ):
        session.run(inputs("text"))
    with pytest.raises(BundleError, match="no part 'model'; give one of its parts: text, vision"):
        task_part(bundle, "one")


def test_a_part_that_a_task_leaves_alone_is_the_bases_own_graph(bundle: Bundle, base: Path, tmp_path: Path):
    """An adapter of the text's tower alone adds nothing of the image's."""
    trained(base, tmp_path / "words", 5, r"text_model\..*\.[qv]_proj")
    copy = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    added = add_task(copy, tmp_path / "words", "words").bundle
    image = task_part(added, "words", "vision").part
    assert image.weights is None
    assert image.model == task_part(added, "other", "vision").part.model
    assert task_part(open_bundle(copy), "words", "text").part.weights is not None
