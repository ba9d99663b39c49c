"""The stages of verification that engines run."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.backends import NoDeviceError
from engines.building.verify_runners import runners
from engines.feeds.text import TextEncoder
from exporter.bundle.manifest import Bundle, open_bundle
from exporter.bundle.task_part import task_part
from lora.errors import BundleError
from lora.files.tensorfile import Array


def test_every_task_has_the_graph_and_the_default_engine(tiny_bundle: Bundle):
    assert list(runners(task_part(tiny_bundle, "first"))) == ["ONNX graph", "engine onnxruntime"]


def test_built_engines_are_stages_too(rtx_bundle: Path):
    assert list(runners(task_part(open_bundle(rtx_bundle), "first"))) == [
        "ONNX graph",
        "engine onnxruntime",
        "engine tensorrt-rtx",
    ]


def test_graph_and_engine_give_equal_outputs(real_bundle: Bundle):
    part = task_part(real_bundle, "movies")
    stages = runners(part)
    inputs = TextEncoder(real_bundle).encode(["A moving, funny film.", "Dull."], part.graph)
    graph, engine = (stages[name](inputs) for name in ("ONNX graph", "engine onnxruntime"))
    assert graph.shape == (2, 2)
    np.testing.assert_allclose(graph, engine, atol=1e-5)


def test_stages_of_two_tasks_run_their_own_task(real_bundle: Bundle, tokens: dict[str, Array]):
    shapes = {
        task: runners(task_part(real_bundle, task))["engine onnxruntime"](tokens).shape
        for task in ("movies", "supersense")
    }
    assert shapes == {"movies": (2, 2), "supersense": (2, 12)}


@pytest.mark.usefixtures("no_device")
def test_tensorrt_engine_without_a_device_raises_at_the_call_and_not_before(rtx_bundle: Path, tokens: dict[str, Array]):
    stage = runners(task_part(open_bundle(rtx_bundle), "first"))["engine tensorrt-rtx"]
    with pytest.raises(NoDeviceError):
        stage(tokens)


def test_session_is_opened_at_the_first_call_and_kept(tiny_copy: Path, tokens: dict[str, Array]):
    stages = runners(task_part(open_bundle(tiny_copy), "first"))
    first = stages["engine onnxruntime"](tokens)
    shutil.rmtree(tiny_copy)
    np.testing.assert_array_equal(stages["engine onnxruntime"](tokens), first)


def test_no_session_is_opened_before_the_first_call(tiny_copy: Path, tokens: dict[str, Array]):
    stages = runners(task_part(open_bundle(tiny_copy), "first"))
    shutil.rmtree(tiny_copy)
    for stage in ("ONNX graph", "engine onnxruntime"):
        with pytest.raises(BundleError):
            stages[stage](tokens)
