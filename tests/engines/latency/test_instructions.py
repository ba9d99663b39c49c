"""Instructions counted under valgrind: equal for equal models, and more for one that does more."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.backends import Model
from engines.backends.onnxruntime import OnnxRuntime
from engines.latency.arm_engines import OpenModel
from engines.latency.harness import Arm
from engines.latency.instructions import check_countable, count_instructions
from lora.errors import EngineError

INPUTS = {"x": np.ones((64, 128), np.float32)}
has_valgrind = pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")


def products(number: int) -> Arm:
    """A model of so many products of matrices, one after the other."""
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.05, (128, 128)).astype(np.float32), "w")
    names = ["x", *(f"h{index}" for index in range(1, number)), "y"]
    nodes = [helper.make_node("MatMul", [names[index], "w"], [names[index + 1]]) for index in range(number)]
    ports = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 128]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "products", [next(ports)], [next(ports)], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return Arm(str(number), OpenModel(OnnxRuntime(threads=1), Model(model.SerializeToString(), Path())))


@has_valgrind
@pytest.mark.slow
def test_a_product_more_is_its_share_of_instructions_more():
    """Forty-one products beside forty are a fortieth more; what Python does around a run is in both."""
    counts = count_instructions([products(40), products(41)], INPUTS)
    assert counts["41"] / counts["40"] == pytest.approx(1 + 1 / 40, abs=0.002)
    assert counts["40"] > 40 * 64 * 128 * 128 / 16  # sixteen multiplications and additions an instruction, at most


def test_without_valgrind_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match=r"^--count-instructions: valgrind is not installed; install it, or leave"):
        check_countable(on_thread=True)


def test_engines_that_run_elsewhere_are_refused_by_name():
    with pytest.raises(EngineError, match="layers and tactics, is shown by 'lorafuse verify --engine'"):
        check_countable(on_thread=False)


def test_a_count_that_fails_says_what_valgrind_said(monkeypatch: pytest.MonkeyPatch):
    failed = subprocess.CompletedProcess([], 1, "", "==1== header\n==1== can't do this")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EngineError, match=r"^arm '1': valgrind could not count .* \(it said: ==1== can't do this\)$"):
        count_instructions([products(1)], INPUTS)
