"""ONNX Runtime: inputs checked by name, weights found from bytes and a folder, one package of two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from engines.backends import BuildOptions, Model
from engines.backends.onnxruntime import OnnxRuntime
from engines.serving.load import task_model
from exporter.bundle.manifest import Bundle
from exporter.bundle.records import MODEL
from exporter.bundle.task_part import task_part
from lora.errors import EngineError
from lora.files.tensorfile import Array
from lora.progress import unheard

ROOT = Path(__file__).parents[3]
MAKE = "from engines.backends import backend; print(backend('onnxruntime').version())"


@pytest.fixture
def tiny_model(tiny_bundle: Bundle) -> Model:
    return task_model(task_part(tiny_bundle, "first"))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("input_ids", np.zeros((2, 5), np.int32), "input 'input_ids' is int32 of rank 2; expected int64 of rank 2"),
        (
            "attention_mask",
            np.zeros((2, 5), np.float32),
            "input 'attention_mask' is float32 of rank 2; expected int64 of rank 2",
        ),
        (
            "token_type_ids",
            np.zeros(5, np.int64),
            "input 'token_type_ids' is int64 of rank 1; expected int64 of rank 2",
        ),
        ("input_ids", np.zeros((1, 2, 5), np.int64), "input 'input_ids' is int64 of rank 3; expected int64 of rank 2"),
    ],
)
def test_input_of_wrong_dtype_or_rank_is_named_with_what_was_expected(
    tiny_model: Model, tokens: dict[str, Array], name: str, values: Array, said: str
):
    with OnnxRuntime().load(tiny_model, None) as session, pytest.raises(EngineError) as error:
        session.run({**tokens, name: values})
    assert str(error.value) == said


@pytest.mark.parametrize(
    "names", [["input_ids", "attention_mask"], ["input_ids", "attention_mask", "token_type_ids", "labels"], []]
)
def test_inputs_missing_or_left_over_are_listed_beside_those_expected(
    tiny_model: Model, tokens: dict[str, Array], names: list[str]
):
    with OnnxRuntime().load(tiny_model, None) as session, pytest.raises(EngineError) as error:
        session.run({name: tokens.get(name, tokens["input_ids"]) for name in names})
    assert (
        str(error.value)
        == f"inputs {sorted(names)} given; this engine takes exactly ['attention_mask', 'input_ids', 'token_type_ids']"
    )


def test_input_values_that_fail_inside_the_engine_are_an_engine_error_in_one_line(
    tiny_model: Model, tokens: dict[str, Array]
):
    with (
        OnnxRuntime().load(tiny_model, None) as session,
        pytest.raises(EngineError, match=r"can't run these inputs .*out of data bounds") as error,
    ):
        session.run({**tokens, "input_ids": tokens["input_ids"] + 1_000_000})
    assert "\n" not in str(error.value)


def test_weights_are_found_from_the_bytes_and_the_folder(
    tiny_bundle: Bundle, tokens: dict[str, Array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "elsewhere"))
    graph = folder / tiny_bundle.task("first").parts[MODEL].model.path
    stock = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(["logits"], tokens)[0]
    monkeypatch.chdir(tmp_path)
    with OnnxRuntime().load(Model(graph.read_bytes(), folder), None) as session:
        np.testing.assert_allclose(session.run(tokens)["logits"], stock, atol=1e-6)


def test_folder_without_the_weights_is_refused_by_name(tiny_model: Model, tmp_path: Path):
    with pytest.raises(EngineError, match=rf"^{tmp_path}: ONNX Runtime .* can't load the model \(.*safetensors"):
        OnnxRuntime().load(replace(tiny_model, folder=tmp_path), None)


def test_builders_options_are_refused(tiny_model: Model):
    with pytest.raises(EngineError, match="compiles nothing ahead"):
        OnnxRuntime().build(tiny_model, BuildOptions(("8.9",)), unheard)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads through /proc")
@pytest.mark.parametrize("threads", [1, min(3, os.cpu_count() or 1)])
def test_threads_bound_what_a_session_starts(tiny_model: Model, threads: int):
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    with OnnxRuntime(threads).load(tiny_model, None):
        assert len(list(tasks.iterdir())) - before == threads - 1  # the caller's own thread computes too


def test_both_packages_installed_are_refused(tmp_path: Path):
    second = tmp_path / "onnxruntime_gpu-1.32.0.dist-info"
    second.mkdir()
    (second / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.32.0\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", MAKE],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (
        "EngineError: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, then"
        " install one" in done.stderr
    )


def test_neither_package_installed_names_both_extras(tmp_path: Path):
    for package in (
        "numpy",
        "safetensors",
    ):  # all that the backend needs beside ONNX Runtime, in an environment of its own
        (tmp_path / package).symlink_to(Path(str(find_spec(package).origin)).parent)
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; {MAKE}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert "EngineError: onnxruntime is not installed; install lorafuse[cpu], or lorafuse[gpu]" in done.stderr
