"""A bundle that the last version of schema 3 wrote: a language model's tasks, dense and as factors, and a classifier.

``schema3/answers.npz`` holds what that version answered, with ONNX Runtime 1.32 on one thread.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from float32_sums import engines_bound

import engines
from engines.feeds.inputs import random_inputs, sizes
from exporter.bundle.check import check_bundle
from exporter.bundle.manifest import open_bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from exporter.upgrade import upgrade
from lora.errors import BundleError
from lora.files.tensorfile import Array

SCHEMA3 = Path(__file__).parent / "schema3"
TASKS = ("chat", "terse", "topics")


@pytest.fixture
def former(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SCHEMA3 / "bundle", tmp_path / "bundle"))


def answers(bundle: Path, task: str) -> Array:
    graph = task_part(open_bundle(bundle), task).graph
    with engines.load(bundle, task, threads=1) as session:
        return session.run(random_inputs(graph, 96, sizes(2, 4), seed=0))["logits"]


def test_a_former_bundle_is_refused_with_the_command_that_upgrades_it(former: Path):
    with pytest.raises(BundleError, match=rf"schema 3 .* run 'lorafuse bundle upgrade {former}'\Z"):
        open_bundle(former)


def test_every_file_but_the_manifest_stays_as_it_was(former: Path):
    files = {path: path.read_bytes() for path in former.rglob("*") if path.is_file() and path.name != "manifest.json"}
    upgrade(former)
    assert {path: path.read_bytes() for path in files} == files
    assert check_bundle(former) == []
    assert list(former.parent.glob(".*")) == []


@pytest.mark.parametrize("task", TASKS)
def test_an_upgraded_task_answers_as_it_did(former: Path, task: str):
    upgrade(former)
    want = np.load(SCHEMA3 / "answers.npz")[task]
    # Another processor may round otherwise; the same weights in the same graph stay within what sums allow.
    part = task_part(open_bundle(former), task)
    bound = engines_bound(former / part.part.model.path, 4) * np.abs(want).max()
    np.testing.assert_allclose(answers(former, task), want, rtol=0, atol=bound)


def test_what_schema_3_did_not_hold_is_read_from_the_graphs(former: Path):
    manifest = upgrade(former).manifest
    assert manifest.base.tied == (("transformer.wte.weight", "lm_head.weight"),)
    weight = task_part(open_bundle(former), "topics").graph.weights["score.weight"]
    assert (weight.dtype, sorted(weight.shape)) == ("float32", [3, 16])
    (engine,) = manifest.tasks["topics"].parts[MODEL].engines
    assert engine.backend == "onnxruntime"


def test_a_damaged_graph_is_refused_and_nothing_changes(former: Path):
    model = former / json.loads((former / "manifest.json").read_bytes())["tasks"]["topics"]["model"]["path"]
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    before = (former / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="SHA-256"):
        upgrade(former)
    assert (former / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"schema": 2}', "expected schema 3; export the tasks again"),
        (b'{"schema": 3}', "not a bundle's manifest"),
        (b"[]", "not a bundle's manifest"),
        (b'{"schema": 4}', "nothing to upgrade"),
    ],
)
def test_another_schema_is_refused_in_one_line(former: Path, content: bytes, words: str):
    (former / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        upgrade(former)
    assert (former / "manifest.json").read_bytes() == content


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path):
    with pytest.raises(BundleError, match="not a bundle"):
        upgrade(tmp_path)


KILLED = """
import os, sys
from pathlib import Path
from exporter.upgrade import upgrade
steps, at = 0, int(sys.argv[2])
def hook(event, args):
    global steps
    if event in ("open", "os.rename", "shutil.rmtree", "os.mkdir"):
        if "staging" in str(args) or "manifest" in str(args):
            steps += 1
            if steps == at:
                os.kill(os.getpid(), 9)
sys.addaudithook(hook)
upgrade(Path(sys.argv[1]))
"""


def test_a_run_that_is_killed_at_any_step_leaves_a_bundle_of_one_schema(former: Path, tmp_path: Path):
    """Either the former manifest, whole, or the new one."""
    before, seen = (former / "manifest.json").read_bytes(), set()
    upgraded = Path(shutil.copytree(former, tmp_path / "upgraded"))
    upgrade(upgraded)
    after = (upgraded / "manifest.json").read_bytes()
    for at in range(1, 40):
        bundle = Path(shutil.copytree(former, tmp_path / str(at) / "bundle"))
        done = subprocess.run([sys.executable, "-c", KILLED, bundle, str(at)], check=False)
        found = (bundle / "manifest.json").read_bytes()
        assert found in (before, after)
        seen.add(found)
        if done.returncode == 0:
            break
    assert seen == {before, after}
